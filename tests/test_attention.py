"""Attention against a float64 softmax, whichever implementation the shape chooses."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_helpers import WAYS, choose
from hypothesis import given
from hypothesis import strategies as st

from jrope.model.attention import attend
from jrope.model.config import LlamaConfig, parameter_shapes
from jrope.model.llama import forward
from jrope.numerics import matmul_precision
from jrope.rope import Rope
from jrope.tree import nest

HEADS = [(4, 4), (4, 2), (4, 1)]
each_heads = pytest.mark.parametrize("heads", HEADS, ids=["MHA", "GQA", "MQA"])


def softmax_attention(q: Any, k: Any, v: Any, starts: Any) -> np.ndarray:
    """Query t of row b sees slots 0 to starts[b] + t; float64, head by head."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        last = starts[b] + t + 1
        scores = k[b, :last, n // group] @ q[b, t, n] / math.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, :last, n // group]
    return out


def random(
    batch: int, count: int, slots: int, heads: tuple[int, int], size: int = 8
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q, k, v in float32; scores are a few units apart."""
    normal = np.random.default_rng(0).standard_normal
    shapes = ((count, heads[0]), (slots, heads[1]), (slots, heads[1]))
    q, k, v = (normal((batch, *shape, size), np.float32) for shape in shapes)
    return jnp.asarray(2 * q), jnp.asarray(k), jnp.asarray(v)


@pytest.fixture(params=["blocks", "blocks elsewhere"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 8, of a CPU and of other devices."""
    choose(monkeypatch, request.param)


@pytest.fixture(params=["once", "whole elsewhere"])
def whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All scores at once, on a CPU and on other devices."""
    choose(monkeypatch, request.param)


def attended(*given: jax.Array) -> jax.Array:
    """`attend` as one program, traced here and now: with the blocks of this test."""
    return jax.jit(lambda *arrays: attend(*arrays))(*given)


def close(got: Any, want: Any, tolerance: float = 2e-6) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), want, atol=tolerance)


# Blocks are 8 queries and 8 keys: below, at and above one and several.
COUNTS = [9, 16, 17, 31, 50]


@pytest.mark.usefixtures("whole")
@each_heads
@pytest.mark.parametrize("count", [1, 2, 33])
def test_whole(count: int, heads: tuple[int, int]) -> None:
    q, k, v = random(2, count, count, heads)
    close(attended(q, k, v), softmax_attention(q, k, v, [0, 0]))


@pytest.mark.usefixtures("whole")
@each_heads
@pytest.mark.parametrize("count", [1, 5])
def test_whole_with_a_past(count: int, heads: tuple[int, int]) -> None:
    starts = [0, 3, 11]
    q, k, v = random(3, count, 16, heads)
    got = attended(q, k, v, jnp.array(starts, jnp.int32))
    close(got, softmax_attention(q, k, v, starts))


@pytest.mark.usefixtures("blocks")
@each_heads
@pytest.mark.parametrize("count", COUNTS)
def test_blockwise(count: int, heads: tuple[int, int]) -> None:
    q, k, v = random(2, count, count, heads)
    close(attended(q, k, v), softmax_attention(q, k, v, [0, 0]))


@pytest.mark.usefixtures("blocks")
@each_heads
def test_blockwise_with_a_past(heads: tuple[int, int]) -> None:
    """Rows that begin in the first, in a middle and at the end of a block."""
    starts = [0, 15, 40]
    q, k, v = random(3, 20, 64, heads)
    got = attended(q, k, v, jnp.array(starts, jnp.int32))
    close(got, softmax_attention(q, k, v, starts))


def test_blockwise_in_its_real_size() -> None:
    """A few queries of 1100, on both sides of each block's edge."""
    q, k, v = random(1, 1100, 1100, (2, 1), 4)
    got = jax.jit(attend)(q, k, v)
    for t in (0, 511, 512, 1023, 1024, 1099):
        want = softmax_attention(q[:, t : t + 1], k, v, [t])
        close(got[:, t : t + 1], want)


@pytest.mark.usefixtures("blocks")
def test_blockwise_anywhere() -> None:
    q, k, v = random(2, 20, 70, (2, 1), 4)
    run = jax.jit(lambda *given: attend(*given))  # traced here, with these blocks

    @given(past=st.lists(st.integers(0, 50), min_size=2, max_size=2))
    def check(past: list[int]) -> None:
        got = run(q, k, v, jnp.array(past, jnp.int32))
        close(got, softmax_attention(q, k, v, past))

    check()


@pytest.mark.parametrize("count", [6, 600])
def test_slots_past_the_last_query_are_not_seen(count: int) -> None:
    q, k, v = random(1, count, count + 700, (2, 1), 4)
    starts = jnp.array([3], jnp.int32)
    run = jax.jit(attend)
    want = run(q, k, v, starts)
    end = 3 + count
    huge = run(q, k.at[:, end:].set(1e30), v.at[:, end:].set(1e30), starts)
    np.testing.assert_array_equal(huge, want)
    seen = run(q, k, v.at[:, end - 1].add(1), starts)
    assert float(jnp.abs(seen - want)[:, -1].max()) > 1e-4


@pytest.mark.parametrize("large", [3e4, 1e10])
@pytest.mark.parametrize("size", [4, 8])  # which divide scores exactly, and do not
@pytest.mark.parametrize("count", [6, 600, 1100])
def test_large_scores_do_not_overflow(count: int, size: int, large: float) -> None:
    """Nor where the largest score is subtracted from blocks that nothing masks."""
    q, k, v = random(1, count, count, (2, 1), size)
    got = jax.jit(attend)(q * large, k * large, v)
    assert np.isfinite(np.asarray(got)).all()
    last = count - 1
    want = softmax_attention(q[:, last:] * large, k * large, v, [last])
    close(got[:, last:], want)


@pytest.mark.parametrize("way", ["once", "whole elsewhere"])
def test_what_is_hidden_is_not_seen_whatever_is_visible(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two queries see keys at infinite distance alone: NaN, not the rest."""
    choose(monkeypatch, way)
    q, k, v = random(1, 6, 6, (2, 1), 4)
    q, k = jnp.abs(q) * 1e25, -jnp.abs(k).at[:, :2].multiply(1e25)
    got = np.asarray(attended(q, k, v))
    assert np.isnan(got[:, :2]).all()
    close(got[:, 2:], softmax_attention(q[:, 2:], k, v, [2]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("count", [40, 600])
def test_16_bit(count: int, dtype: str) -> None:
    """Weights are rounded once and the result once: 2 roundings of 2**-9, 2**-12."""
    q, k, v = (x.astype(dtype) for x in random(1, count, count, (2, 1), 4))
    got = jax.jit(attend)(q, k, v)
    assert got.dtype == dtype
    last = count - 1
    want = softmax_attention(q[:, last:].astype(jnp.float32), k, v, [last])
    step = {"bfloat16": 2**-9, "float16": 2**-12}[dtype]
    size = float(np.abs(np.asarray(v, np.float64)).max())
    close(got[:, last:], want, 2 * step * size)


def softmax_slopes(q: Any, k: Any, v: Any, dy: Any) -> tuple[np.ndarray, ...]:
    """Of sum(y dy) by q, k and v, of a prompt; float64."""
    q, k, v, dy = (np.asarray(x, np.float64) for x in (q, k, v, dy))
    group, count = q.shape[2] // k.shape[2], q.shape[1]
    k, v = (np.repeat(x, group, axis=2) for x in (k, v))
    scale = 1 / math.sqrt(q.shape[3])
    scores = np.einsum("btnh,bsnh->bnts", q, k) * scale
    scores[..., np.triu(np.ones((count, count), bool), 1)] = -np.inf
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    slopes = np.einsum("btnh,bsnh->bnts", dy, v)
    slopes -= (slopes * weights).sum(axis=-1, keepdims=True)
    slopes *= weights * scale
    dq = np.einsum("bnts,bsnh->btnh", slopes, k)
    others = (slopes, q), (weights, dy)
    dk, dv = (np.einsum("bnts,btnh->bsnh", *x) for x in others)
    shape = *dk.shape[:2], -1, group, dk.shape[3]
    return dq, dk.reshape(shape).sum(axis=3), dv.reshape(shape).sum(axis=3)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients(dtype: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values have 8 in common, which only an exact total of the weights cancels.

    Roundings of 16 bits are those of weights and of their slopes; of a total of rounded
    weights they are twice as many.
    """
    choose(monkeypatch, way)
    q, k, v = random(2, 40, 40, (4, 2), 64)
    q, k, v, dy = (x.astype(dtype) for x in (q / 2, k, v + 8, q[::-1]))

    def slopes(*given: jax.Array) -> tuple[jax.Array, ...]:
        return jax.vjp(lambda *x: attend(*x), *given)[1](dy)

    got, want = jax.jit(slopes)(q, k, v), softmax_slopes(q, k, v, dy)
    step = {"float32": 64, "bfloat16": 6}[dtype] * float(jnp.finfo(dtype).eps) / 2
    for ours, right in zip(got, want, strict=True):
        error = np.asarray(ours, np.float64) - right
        assert np.mean(error**2) < step**2 * np.mean(right**2)


def test_float32_products_are_float32() -> None:
    assert matmul_precision(jnp.dtype("float32")) == jax.lax.Precision.HIGHEST
    assert matmul_precision(jnp.dtype("bfloat16")) == jax.lax.Precision.DEFAULT


# Memory, from the compiled program: nothing runs.


def abstract(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def temporaries(function: Any, *shapes: Any) -> int:
    analysis = jax.jit(function).lower(*shapes).compile().memory_analysis()
    return analysis.temp_size_in_bytes


@pytest.mark.parametrize("past", [False, True])
def test_long_prompts_build_no_square(past: bool) -> None:
    length, heads = 4096, 8
    q, k = abstract(1, length, heads, 32), abstract(1, length, 2, 32)
    starts = (abstract(1, dtype=jnp.int32),) if past else ()
    square = length * length * heads * 4
    assert temporaries(attend, q, k, k, *starts) < square / 8


def test_gradients_of_long_prompts_build_no_square() -> None:
    """Backward holds a few arrays of one query block: 512 x S, not T x S."""
    length, heads = 16384, 4
    q, k = abstract(1, length, heads, 32), abstract(1, length, 2, 32)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(attend(q, k, v))

    square = length * length * heads * 4
    assert temporaries(jax.grad(loss, (0, 1, 2)), q, k, k) < square / 4


def test_gradients_hold_no_block_twice() -> None:
    """Of a query block over all keys, no more than six arrays in float32."""
    length, heads = 2048, 9
    q, k = abstract(1, length, heads, 64), abstract(1, length, 3, 64)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(attend(q, k, v)))

    block = 256 * length * heads * 4
    assert temporaries(jax.value_and_grad(loss, (0, 1, 2)), q, k, k) < 6 * block


def smollm2(layers: int) -> LlamaConfig:
    """SmolLM2-135M's shapes."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=True,
        initializer_range=0.02,
        rope=Rope(theta=100000.0, rotary_dim=64),
        bos_token_id=1,
        eos_token_id=(2,),
        pad_token_id=2,
    )


def test_32k_prompt_fits_in_4_gib() -> None:
    """A whole model of 135M parameters: what prefill needs beyond the weights."""
    config, length = smollm2(layers=30), 32768
    flat = parameter_shapes(config)
    params = nest({n: abstract(*s, dtype=jnp.bfloat16) for n, s in flat.items()})

    def prefill(params: Any, tokens: jax.Array) -> Any:
        return forward(params, tokens, config=config, logits="last")

    tokens = abstract(1, length, dtype=jnp.int32)
    analysis = jax.jit(prefill).lower(params, tokens).compile().memory_analysis()
    cache = 2 * 30 * length * 3 * 64 * 2
    assert cache <= analysis.output_size_in_bytes <= cache + 2**20
    assert analysis.temp_size_in_bytes + cache < 4 * 2**30
