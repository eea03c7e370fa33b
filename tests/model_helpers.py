"""A tiny random model three times over, its logits, and every rope for it."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jrope.hf import config_from_hf
from jrope.model.config import LlamaConfig
from jrope.model.llama import forward
from jrope.parity.report import Error
from jrope.rope import (
    DynamicNTK,
    DynamicYarn,
    Linear,
    Llama3,
    LongRope,
    NTKAware,
    Proportional,
    Rope,
    Yarn,
)
from jrope.tree import flatten, nest


class Model(NamedTuple):
    """A tiny random model three times over."""

    torch: Any
    weights: dict[str, np.ndarray]
    params: Any
    config: LlamaConfig


@pytest.fixture(scope="module")
def make(tiny_hf: Any) -> Callable[..., Model]:
    """A tiny model of the shape asked for; `rope` replaces the rotary embedding."""

    import torch

    def build(rope: Rope | None = None, **shape: Any) -> Model:
        tiny = tiny_hf(**shape)
        torch.set_num_threads(1)  # two only wait for each other at this size
        params, config = params_of(tiny)
        if rope is not None:
            config = dataclasses.replace(config, rope=rope)
        return Model(tiny.model, tiny.weights, params, config)

    return build


def params_of(tiny: Any, dtype: str = "float32") -> tuple[dict[str, Any], LlamaConfig]:
    """A tiny transformers model as our parameters and configuration."""
    flat = {name: jnp.asarray(x, dtype) for name, x in tiny.weights.items()}
    return nest(flat), config_from_hf(tiny.config)


def assert_equal(got: Any, want: Any) -> None:
    """Two trees of the same names, dtypes and bits."""
    got, want = flatten(got), flatten(want)
    assert {*got} == {*want}
    for name, x in want.items():
        assert got[name].dtype == x.dtype, name
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def tokens_of(config: LlamaConfig, *shape: int, seed: int = 0) -> jax.Array:
    random = np.random.default_rng(seed)
    return jnp.asarray(random.integers(0, config.vocab_size, shape, np.int32))


def logits_of(model: Model, tokens: jax.Array, **given: Any) -> np.ndarray:
    given = {"config": model.config, **given}
    return np.asarray(forward(model.params, tokens, **given)[0])


def close(got: Any, want: Any, tolerance: float = 5e-6) -> None:
    """The largest difference is a small part of the largest number."""
    assert Error.of(np.asarray(got), np.asarray(want)).of_max <= tolerance


PLAIN = partial(Rope, theta=10000.0, rotary_dim=16)
METHODS = {
    "default": None,
    "linear": Linear(factor=2),
    "ntk": NTKAware(factor=2),
    "dynamic": DynamicNTK(factor=2, original_length=16),
    "yarn": Yarn(factor=4, original_length=16),
    "dynamic-yarn": DynamicYarn(original_length=16),
    "llama3": Llama3(
        factor=4, original_length=16, low_freq_factor=1, high_freq_factor=4
    ),
    "longrope": LongRope(
        short_factor=(1.0,) * 8, long_factor=(3.0,) * 8, original_length=16, factor=4
    ),
    "proportional": Proportional(partial_rotary_factor=0.5),
}
ROPES = {name: PLAIN(scaling=method) for name, method in METHODS.items()}
ROPES["condense"] = PLAIN(condense=2.5)
ROPES["partial"] = PLAIN(rotary_dim=8)
ROPES["interleaved"] = PLAIN(layout="interleaved")
ROPES["accurate"] = PLAIN(precision="accurate")
each_rope = pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)


def some_ropes(*names: str) -> Any:
    return pytest.mark.parametrize("rope", [ROPES[n] for n in names], ids=names)


def truth(model: Model, tokens: jax.Array) -> np.ndarray:
    """Logits in float64, frequencies from jrope: their own tests hold them."""
    config, rope = model.config, model.config.rope
    frequencies, scaling = rope.frequencies(tokens.shape[1], np.float64)
    return reference.forward(
        model.weights,
        np.asarray(tokens),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        frequencies=np.asarray(frequencies) / rope.condense,
        scaling=scaling,
        eps=config.rms_norm_eps,
        activation=config.hidden_act,
        layout=rope.layout,
    ).logits


def changed(config: LlamaConfig, **fields: Any) -> LlamaConfig:
    return dataclasses.replace(config, **fields)
