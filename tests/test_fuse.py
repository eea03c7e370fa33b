"""Joined projections compute the same, and come apart bit for bit."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_hf
from model_helpers import assert_equal, params_of

from jrope.errors import JropeError
from jrope.generation.run import generate
from jrope.model.config import LlamaConfig
from jrope.model.llama import forward
from jrope.model.scores import score
from jrope.tree import flatten
from jrope.weights.fuse import Order, fuse, unfuse

ORDERS: tuple[Order, ...] = ("out_in", "in_out")
MODELS: dict[str, dict[str, Any]] = {
    "GQA": {},
    "MHA, biases": {"kv_heads": 4, "bias": True, "layers": 1},
    "MQA, attention_bias": {"kv_heads": 1, "attention_bias": True, "head_dim": 24},
    "tied, mlp_bias": {"tied": True, "mlp_bias": True},
}
each_model = pytest.mark.parametrize("case", MODELS)
each_order = pytest.mark.parametrize("order", ORDERS)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)
LENGTHS = np.array([9, 4])

run = jax.jit(forward, static_argnames="config")


@cache
def model(case: str, dtype: str = "float32") -> tuple[dict[str, Any], LlamaConfig]:
    return params_of(make_tiny_hf(**MODELS[case]), dtype)


def logits(params: Any, config: LlamaConfig) -> np.ndarray:
    return np.asarray(run(params, TOKENS, config=config)[0], np.float64)


@each_order
@each_model
def test_names_and_shapes(case: str, order: Order) -> None:
    params, config = model(case)
    names = {*flatten(fuse(params, order)["model"]["layers"]["0"])}
    matrix = {"out_in": "weight", "in_out": "kernel"}[order]
    want = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    for block, parts, bias in (
        ("self_attn", ("qkv_proj", "o_proj"), config.attention_bias),
        ("mlp", ("gate_up_proj", "down_proj"), config.mlp_bias),
    ):
        want |= {f"{block}.{p}.{matrix}" for p in parts}
        want |= {f"{block}.{p}.bias" for p in parts if bias}
    assert names == want
    joined = fuse(params, order)["model"]["layers"]["0"]["self_attn"]["qkv_proj"]
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    shape = (heads * config.head_dim, config.hidden_size)
    assert joined[matrix].shape == (shape if order == "out_in" else shape[::-1])


@each_order
@each_model
def test_logits_are_the_same(case: str, order: Order) -> None:
    """To float32 sums in another order: 2 layers of 30 ulp each, of the largest."""
    params, config = model(case)
    want, got = logits(params, config), logits(fuse(params, order), config)
    assert np.abs(got - want).max() <= 4e-6 * np.abs(want).max()


@each_order
def test_bfloat16_logits_are_the_same(order: Order) -> None:
    """Sums are float32 and rounded once: at most a few last bits of 2**-9 differ."""
    params, config = model("MHA, biases", "bfloat16")
    want, got = logits(params, config), logits(fuse(params, order), config)
    gap = np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2))
    assert gap <= 2.0**-8


@each_order
@each_model
def test_unfuse_is_bit_equal(case: str, order: Order) -> None:
    params, config = model(case, "bfloat16")
    fused = fuse(params, order)
    assert_equal(unfuse(fused, config), params)
    for other in ORDERS:  # fused again, it only turns
        assert_equal(fuse(fused, other), fuse(params, other))
    assert_equal(unfuse(params, config), params)


def test_the_given_tree_stays() -> None:
    params, config = model("GQA")
    before = flatten(params)
    fused = fuse(params, "in_out")
    unfuse(fused, config)
    assert flatten(params).keys() == before.keys()
    assert all(x is before[name] for name, x in flatten(params).items())
    assert fused["lm_head"]["weight"] is params["lm_head"]["weight"]  # nor is it copied


def test_generate_and_score_take_either_tree() -> None:
    params, config = model("MHA, biases")
    trees = [params, fuse(params, "in_out")]
    options: dict[str, Any] = {"config": config, "max_new_tokens": 16}
    tokens = [generate(tree, TOKENS, LENGTHS, **options).tokens for tree in trees]
    np.testing.assert_array_equal(*tokens)
    scores = [score(tree, TOKENS, LENGTHS, config=config) for tree in trees]
    np.testing.assert_allclose(*scores, atol=1e-5)


@each_order
def test_one_row_at_a_time(order: Order) -> None:
    """The matrix-vector product of a single 16-bit token, beside float32.

    The roundings of two layers add up to 1.0 (rows) and 1.4 (in_out, whose norm is
    rounded first) steps of 2**-8; a factor or a weight left out is tens of them.
    """
    params, config = model("MHA, biases", "bfloat16")
    one = partial(run, tokens=TOKENS[:1, :1], config=config)
    want, _ = one(jax.tree.map(lambda x: x.astype(jnp.float32), params))
    (plain, _), (fused, _) = one(params), one(fuse(params, order))
    allowed = 2.0**-7 * float(jnp.abs(want).max())
    np.testing.assert_allclose(plain, want, atol=allowed)
    np.testing.assert_allclose(fused, want, atol=allowed)


@pytest.mark.parametrize("order", ["inout", "", None])
def test_unknown_order(order: Any) -> None:
    message = f"order: got {order!r}, want one of out_in, in_out"
    with pytest.raises(JropeError, match=message):
        fuse(model("GQA")[0], order)
