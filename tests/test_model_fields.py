"""No field of the configuration that nobody reads."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import PLAIN, Model, changed, logits_of, tokens_of
from model_helpers import make as make

from jrope.errors import JropeError
from jrope.generation.run import generate
from jrope.hf import config_to_hf
from jrope.model.config import LlamaConfig, parameter_shapes
from jrope.model.llama import forward, init_params
from jrope.model.with_rope import with_rope
from jrope.rope import Linear, Rope
from jrope.tree import flatten


def is_read_by_forward(model: Model, other: LlamaConfig) -> None:
    tokens = tokens_of(model.config, 1, 40)
    plain = logits_of(model, tokens)
    try:
        got = logits_of(model, tokens, config=other)
    except (TypeError, ValueError, KeyError):
        return  # the weights do not fit
    assert got.shape != plain.shape or np.abs(got - plain).max() > 1e-4


def is_read_by_shapes(model: Model, other: LlamaConfig) -> None:
    assert parameter_shapes(other) != parameter_shapes(model.config)
    fresh = init_params(jax.random.key(0), other)
    shapes = {name: leaf.shape for name, leaf in flatten(fresh).items()}
    assert shapes == parameter_shapes(other)
    forward(fresh, jnp.zeros((1, 2), jnp.int32), config=other)


def is_read_by_init(model: Model, other: LlamaConfig) -> None:
    for config in (model.config, other):
        fresh = init_params(jax.random.key(0), config)
        spread = float(jnp.std(fresh["model"]["embed_tokens"]["weight"]))
        assert abs(spread / config.initializer_range - 1) < 0.1


def is_read_by_with_rope(model: Model, other: LlamaConfig) -> None:
    for config in (model.config, other):
        scaling: Any = with_rope(config, "yarn", factor=2.0).rope.scaling
        assert scaling.original_length == config.max_position_embeddings


def greedy(model: Model, config: LlamaConfig) -> Any:
    return generate(
        model.params, np.array([[1, 2, 3]]), config=config, max_new_tokens=4
    )


def is_read_by_generate_as_end(model: Model, other: LlamaConfig) -> None:
    plain = greedy(model, changed(model.config, eos_token_id=()))
    assert plain.lengths.tolist() == [4]
    second = int(plain.tokens[0, 1])
    ended = greedy(model, changed(other, eos_token_id=(60, second)))
    assert ended.lengths.tolist() == [2]
    assert ended.tokens[0].tolist() == [*plain.tokens[0, :2].tolist(), 0, 0]


def is_read_by_generate_as_padding(model: Model, other: LlamaConfig) -> None:
    first = int(greedy(model, model.config).tokens[0, 0])
    ended = greedy(model, changed(other, eos_token_id=(first,)))
    assert ended.tokens[0, 1:].tolist() == [other.pad_token_id] * 3


def is_read_by_request(model: Model, other: LlamaConfig) -> None:
    with pytest.raises(JropeError, match=f"bos_token_id .{other.bos_token_id}."):
        generate(model.params, np.array([[1]]), [0], config=other)


def is_read_by_save(_: Model, other: LlamaConfig) -> None:
    with pytest.raises(JropeError, match=f"model_type is '{other.model_type}'"):
        config_to_hf(other)


def is_read_in_bfloat16(model: Model, other: LlamaConfig) -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    model = model._replace(params=params)
    tokens = tokens_of(model.config, 1, 40)
    got, plain = logits_of(model, tokens, config=other), logits_of(model, tokens)
    assert np.abs(got - plain).max() > 1e-3


# field: another value, and who reads it
READERS: dict[str, tuple[Any, Callable[[Model, LlamaConfig], None]]] = {
    "vocab_size": (60, is_read_by_shapes),
    "hidden_size": (32, is_read_by_shapes),
    "intermediate_size": (80, is_read_by_shapes),
    "num_hidden_layers": (1, is_read_by_forward),
    "num_attention_heads": (2, is_read_by_shapes),
    "num_key_value_heads": (1, is_read_by_shapes),
    "head_dim": (20, is_read_by_forward),
    "max_position_embeddings": (128, is_read_by_with_rope),
    "rms_norm_eps": (0.1, is_read_by_forward),
    "hidden_act": ("gelu", is_read_by_forward),
    "attention_bias": (True, is_read_by_shapes),
    "mlp_bias": (True, is_read_by_shapes),
    "tie_word_embeddings": (True, is_read_by_forward),
    "initializer_range": (0.5, is_read_by_init),
    "rope": (PLAIN(theta=100.0), is_read_by_forward),
    "bos_token_id": (7, is_read_by_request),
    "eos_token_id": ((7,), is_read_by_generate_as_end),
    "pad_token_id": (7, is_read_by_generate_as_padding),
    "model_type": ("elephant", is_read_by_save),
    "o_bias": (True, is_read_by_shapes),
    "windows": ((5, None), is_read_by_forward),
    "rotary": ((True, False), is_read_by_forward),
    "attention_scale": (0.5, is_read_by_forward),
    "embedding_multiplier": (1.5, is_read_by_forward),
    "residual_multiplier": (0.5, is_read_by_forward),
    "logits_divisor": (2.0, is_read_by_forward),
    "score_cap": (0.5, is_read_by_forward),
    "logit_cap": (2.0, is_read_by_forward),
    "qk_norm": ("head", is_read_by_shapes),
    "norm": ("gemma", is_read_by_forward),
    "norm_at": ("sandwich", is_read_by_shapes),
    "wide_rotation": (True, is_read_in_bfloat16),
    "local_rope": (PLAIN(theta=100.0), is_read_by_forward),
}


def test_every_field_has_a_reader() -> None:
    assert {*READERS} == {f.name for f in dataclasses.fields(LlamaConfig)}


@pytest.mark.parametrize("field", READERS)
def test_fields_are_read(make: Any, field: str) -> None:
    model = make()
    value, check = READERS[field]
    assert value != getattr(model.config, field)
    if field == "local_rope":
        model = model._replace(config=changed(model.config, windows=(5, None)))
    check(model, changed(model.config, **{field: value}))


ROPE_FIELDS: dict[str, Any] = {
    "theta": 500.0,
    "rotary_dim": 12,
    "scaling": Linear(factor=2),
    "condense": 2.0,
    "layout": "interleaved",
    "precision": "accurate",
}


def test_every_rope_field_has_another_value() -> None:
    """But `lengths`, which plain RoPE has no use for: tests/test_growing.py."""
    assert {*ROPE_FIELDS, "lengths"} == {f.name for f in dataclasses.fields(Rope)}


@pytest.mark.parametrize("field", ROPE_FIELDS)
def test_rope_fields_are_read(make: Any, field: str) -> None:
    model = make()
    rope = dataclasses.replace(model.config.rope, **{field: ROPE_FIELDS[field]})
    tokens = tokens_of(model.config, 1, 8)
    positions = jnp.arange(8, dtype=jnp.int32)[None] * 149_796 + 3  # up to 2**20
    plain = logits_of(model, tokens, positions=positions)
    config = changed(model.config, rope=rope)
    other = logits_of(model, tokens, positions=positions, config=config)
    assert np.abs(other - plain).max() > 1e-3
