"""The model as a function and as a Flax module: what it computes and refuses."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import (
    METHODS,
    changed,
    close,
    each_rope,
    logits_of,
    tokens_of,
    truth,
)
from model_helpers import make as make

from jrope.errors import JropeError
from jrope.model.config import parameter_shapes
from jrope.model.llama import Llama, forward, init_params
from jrope.parity.report import stage
from jrope.parity.torch_side import torch_stages
from jrope.rope import ROPE_TYPES, Rope
from jrope.tree import flatten

SHAPES: dict[str, dict[str, Any]] = {
    "MHA": {"kv_heads": 4},
    "GQA": {"kv_heads": 2},
    "MQA": {"kv_heads": 1},
    "tied": {"tied": True},
    "both biases": {"bias": True},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "wide heads": {"head_dim": 24},
    "narrow heads": {"head_dim": 8, "kv_heads": 1},
    "one layer": {"layers": 1},
    "large eps": {"rms_norm_eps": 0.5},
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def test_every_method_is_here() -> None:
    assert {*METHODS} == {"default", *ROPE_TYPES}


# What it computes


@each_shape
def test_equals_transformers(make: Any, shape: dict[str, Any]) -> None:
    model = make(**shape)
    tokens = tokens_of(model.config, 2, 12)
    steps = np.tile(np.arange(12), (2, 1))
    want = torch_stages(model.torch, np.asarray(tokens), steps)["logits"]
    close(logits_of(model, tokens), want)


@each_shape
def test_equals_the_papers(make: Any, shape: dict[str, Any]) -> None:
    model = make(**shape)
    tokens = tokens_of(model.config, 2, 12)
    close(logits_of(model, tokens), truth(model, tokens), 1e-5)


@each_rope
def test_every_method_equals_the_papers(make: Any, rope: Rope) -> None:
    model = make(rope=rope)
    tokens = tokens_of(model.config, 2, 40)
    close(logits_of(model, tokens), truth(model, tokens), 1e-5)


@pytest.mark.parametrize("shape", [{"bias": True}, {"head_dim": 24, "tied": True}])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_is_as_good_as_torch(
    make: Any, shape: dict[str, Any], dtype: str
) -> None:
    import torch

    model = make(**shape)
    tokens = tokens_of(model.config, 4, 40)
    steps = np.tile(np.arange(40), (4, 1))
    params = jax.tree.map(lambda w: w.astype(dtype), model.params)
    got, cache = jax.jit(forward, static_argnames="config")(
        params, tokens, config=model.config
    )
    assert got.dtype == jnp.float32 and cache.keys[0].dtype == dtype
    kind = type(model.torch)
    narrow = kind(model.torch.config).eval().to(getattr(torch, dtype))
    narrow.load_state_dict(model.torch.state_dict())
    wide = kind(model.torch.config).eval()
    wide.load_state_dict(narrow.state_dict())
    theirs, want = (
        torch_stages(twin, np.asarray(tokens), steps)["logits"]
        for twin in (narrow, wide)
    )
    ratio = stage("logits", np.asarray(got), want, theirs).ratio
    assert ratio is not None and ratio <= 1.10


# Misuse


def test_unknown_ids_spoil_their_row_alone(make: Any) -> None:
    model = make()
    tokens = tokens_of(model.config, 4, 6)
    plain = logits_of(model, tokens)
    size = model.config.vocab_size
    bad = tokens.at[0, 2].set(size).at[1, 3].set(-1).at[2, 0].set(2**31 - 1)
    got = logits_of(model, bad)
    assert np.isnan(got[0, 2:]).all() and np.isnan(got[1, 3:]).all()
    assert np.isnan(got[2]).all()
    np.testing.assert_array_equal(got[3], plain[3])


@pytest.mark.parametrize("count", [1, 4])
def test_rows_that_overflow_are_nan_alone(make: Any, count: int) -> None:
    model = make()
    tokens = tokens_of(model.config, 2, 8 + count)
    run = partial(forward, model.params, config=model.config)
    lengths = jnp.array([8, 3])
    _, cache = run(tokens[:, :8], lengths=lengths, capacity=8)
    got, cache = run(tokens[:, 8:], cache=cache)
    assert np.isnan(np.asarray(got[0])).all()
    assert cache.lengths.tolist() == [8 + count, 3 + count]
    row = jnp.concatenate([tokens[1:, :3], tokens[1:, 8:]], axis=1)
    close(got[1], run(row, rope_lengths=8)[0][0, 3:], 2e-6)
    again, _ = run(tokens[:, :1], cache=cache)
    assert np.isnan(np.asarray(again[0])).all()
    assert np.isfinite(np.asarray(again[1])).all()


def test_one_row_that_overflows_is_nan(make: Any) -> None:
    model = make()
    tokens = tokens_of(model.config, 1, 4)
    run = partial(forward, model.params, config=model.config)
    _, cache = run(tokens)
    for _ in range(2):
        got, cache = run(tokens[:, :1], cache=cache)
        assert np.isnan(np.asarray(got)).all()


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "one axis": (np.zeros(3, np.int32), {}, r"got int32 \[3\], want integers"),
    "floats": (np.zeros((1, 3), np.float32), {}, r"got float32 \[1, 3\]"),
    "capacity": (np.zeros((1, 3), np.int32), {"capacity": 2}, "at least T = 3"),
}


@pytest.mark.parametrize(("tokens", "given", "message"), BAD.values(), ids=BAD)
def test_wrong_arguments(
    make: Any, tokens: np.ndarray, given: dict[str, Any], message: str
) -> None:
    model = make()
    with pytest.raises(JropeError, match=message):
        forward(model.params, jnp.asarray(tokens), config=model.config, **given)


def test_one_capacity_only(make: Any) -> None:
    model = make()
    tokens = tokens_of(model.config, 1, 2)
    _, cache = forward(model.params, tokens, config=model.config, capacity=4)
    with pytest.raises(JropeError, match="capacity: the given cache already has one"):
        forward(model.params, tokens, cache=cache, config=model.config, capacity=4)


def test_positions_have_the_tokens_shape(make: Any) -> None:
    model = make()
    tokens = tokens_of(model.config, 2, 3)
    with pytest.raises((AssertionError, JropeError)):
        forward(model.params, tokens, jnp.arange(3)[None], config=model.config)


# The Flax module


@pytest.mark.parametrize("tied", [False, True])
def test_module_owns_the_same_tree(make: Any, tied: bool) -> None:
    model = make(tied=tied)
    tokens = tokens_of(model.config, 2, 5)
    module = Llama(model.config)
    variables = module.init(jax.random.key(0), tokens)
    assert {*variables} == {"params"}
    shapes = {name: w.shape for name, w in flatten(variables["params"]).items()}
    assert shapes == parameter_shapes(model.config)
    assert shapes == {name: w.shape for name, w in model.weights.items()}
    logits, cache = module.apply({"params": model.params}, tokens, capacity=9)
    want, other = forward(model.params, tokens, config=model.config, capacity=9)
    np.testing.assert_array_equal(logits, want)
    for ours, right in zip(jax.tree.leaves(cache), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, right)


def test_module_has_a_dtype(make: Any) -> None:
    model = make()
    module = Llama(model.config, param_dtype=jnp.bfloat16)
    shapes = jax.eval_shape(
        module.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32)
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("bfloat16")}


def test_fresh_weights(make: Any) -> None:
    config = changed(make(bias=True).config, initializer_range=0.3)
    fresh = flatten(init_params(jax.random.key(1), config))
    again = flatten(init_params(jax.random.key(1), config))
    for name, weight in fresh.items():
        np.testing.assert_array_equal(weight, again[name])
        if name.endswith("bias"):
            assert not weight.any()
        elif weight.ndim == 1:
            assert bool((weight == 1).all())
        else:
            assert abs(float(jnp.std(weight)) - 0.3) < 0.03
            assert abs(float(jnp.mean(weight))) < 0.03
    layers = [fresh[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1)]
    assert not bool((layers[0] == layers[1]).all())
    narrow = init_params(jax.random.key(1), config, jnp.bfloat16)
    assert narrow["model"]["norm"]["weight"].dtype == jnp.bfloat16
