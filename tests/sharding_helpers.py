"""A tiny model whose every part eight devices can share, and ways to place it."""

import dataclasses
import os
import re
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import jrope
from jrope.model.config import LlamaConfig, parameter_shapes
from jrope.rope import DynamicNTK, LongRope, Rope, Yarn
from jrope.tree import nest

EIGHT = "--xla_force_host_platform_device_count=8"
if EIGHT not in os.environ.get("XLA_FLAGS", ""):
    pytest.skip(
        f"with XLA_FLAGS={EIGHT}, as test_devices.py runs it", allow_module_level=True
    )

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    attention_bias=True,
    mlp_bias=True,
    tie_word_embeddings=False,
    initializer_range=0.3,
    rope=Rope(theta=1e4, rotary_dim=8),
    bos_token_id=None,
    eos_token_id=(),
    pad_token_id=None,
)
ROPE = CONFIG.rope
LONGROPE = LongRope(
    short_factor=(1.0,) * 4, long_factor=(3.0,) * 4, original_length=8, factor=4
)
ROPES = {
    "plain": ROPE,
    "yarn": dataclasses.replace(ROPE, scaling=Yarn(factor=4, original_length=8)),
    "dynamic": dataclasses.replace(
        ROPE, scaling=DynamicNTK(factor=2, original_length=8)
    ),
    "longrope": dataclasses.replace(ROPE, scaling=LONGROPE),
}
for _lengths in ("growing", "hf"):
    for _name in ("dynamic", "longrope"):
        ROPES[f"{_name}-{_lengths}"] = dataclasses.replace(
            ROPES[_name], lengths=_lengths
        )

_RANDOM = np.random.default_rng(0)
TOKENS = _RANDOM.integers(0, CONFIG.vocab_size, (8, 12)).astype(np.int32)
LENGTHS = np.array([12, 1, 7, 12, 3, 9, 12, 8], np.int32)


def with_rope(name: str, **fields: Any) -> LlamaConfig:
    return dataclasses.replace(CONFIG, rope=ROPES[name], **fields)


def make_params(config: LlamaConfig = CONFIG, dtype: str = "float32") -> Any:
    """Random parameters, biases too, so that none can be added twice unseen."""
    random = np.random.default_rng(1)
    return nest(
        {
            name: jnp.asarray(0.3 * random.standard_normal(shape, np.float32), dtype)
            for name, shape in parameter_shapes(config).items()
        }
    )


def explicit(text: str) -> Any:
    """The mesh of `jrope.mesh` with explicit axes, which `jax.make_mesh` makes."""
    mesh = jrope.mesh(text)
    kinds = (AxisType.Explicit,) * len(mesh.axis_names)
    return jax.sharding.Mesh(mesh.devices, mesh.axis_names, axis_types=kinds)


def assert_close(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def collectives(program: str) -> Counter[tuple[str, str]]:
    """(operation, shape of a result) -> how often it stands in a compiled program."""
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    lines = re.findall(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", program)
    shapes = ((kind, re.findall(r"\w+\[[\d,]*\]", results)) for results, kind in lines)
    return Counter((kind, shape) for kind, several in shapes for shape in several)
