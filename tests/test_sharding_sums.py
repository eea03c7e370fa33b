"""How partial sums travel between devices: what they become, and how many bytes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from sharding_helpers import CONFIG, LENGTHS, TOKENS, make_params

import jrope
from jrope.generation.loop import prefill
from jrope.generation.request import chunk_inputs, prepare
from jrope.sharding.axes import Axes
from jrope.sharding.meshes import layout, layout_of

HIDDEN = CONFIG.hidden_size


def sums_of(shares, sums, dtype):
    """Every device's [1, T, D] added up, as one array of what each of them has."""
    there = layout(jrope.mesh("model=8"), Axes(sums=sums))
    split = PartitionSpec("model")

    def run(x):
        return there.axes.product(x, dtype).astype(dtype)

    return np.asarray(jax.jit(there.map(run, split, split))(shares))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("count", [16, 5, 1])
def test_sums_are_rounded_once_or_before_they_are_added(count, dtype):
    random = np.random.default_rng(0)
    shares = random.integers(-(2**13), 2**13, (8, count, HIDDEN)) / np.float32(2**11)
    shares = jnp.asarray(shares, jnp.float32)  # whose sums are exact in any order
    exact = np.asarray(shares.sum(axis=0).astype(dtype))
    early = shares.astype(dtype).astype(jnp.float32).sum(axis=0).astype(dtype)
    early = np.asarray(early)
    assert (exact != early).any()
    for sums in ("float32", "rounded", "auto"):
        for got in sums_of(shares, sums, dtype):
            np.testing.assert_array_equal(got, exact)
    got = sums_of(shares, "narrow", dtype).astype(np.float32)
    assert (got != exact.astype(np.float32)).any()
    if dtype == "bfloat16":  # a CPU adds float16 in float16
        for x in got:
            np.testing.assert_array_equal(x, early.astype(np.float32))


def sent(sums):
    """The collectives over `model` of a prefill in bfloat16: kind, type of the result.

    As they are asked for: a CPU's compiler widens those of 16 bits.
    """
    params = jrope.shard(make_params(dtype="bfloat16"), jrope.mesh("model=8"), CONFIG)
    how = {"max_new_tokens": 4, "sums": sums}
    request = prepare(TOKENS, LENGTHS, CONFIG, layout_of(params), **how)
    static = {"config": CONFIG, "scored": False, "layout": request.layout}
    given = params, *chunk_inputs(request, 0), None, None
    text = prefill.lower(*given, capacity=request.capacity, **static).as_text()
    kinds = r"stablehlo\.(all_reduce|reduce_scatter|all_gather)\".*?-> tensor<(\S+)>"
    return sorted(re.findall(kinds, text, re.DOTALL))


def test_what_a_prefill_sends():
    tokens = 8 * 16  # the bucket's
    embedding = ("all_reduce", f"8x16x{HIDDEN}xbf16")
    wide = ("all_reduce", f"8x16x{HIDDEN}xf32")
    rounded = [
        ("all_gather", f"{tokens}x{HIDDEN}xbf16"),
        ("reduce_scatter", f"{tokens // 8}x{HIDDEN}xf32"),
    ]
    assert sent("float32") == [embedding, wide, wide]
    assert sent("narrow") == [embedding] * 3
    assert sent("rounded") == sent("auto") == sorted([embedding, *rounded, *rounded])


def test_a_choice_that_there_is_not_is_refused():
    params = jrope.shard(make_params(), jrope.mesh("model=8"), CONFIG)
    with pytest.raises(jrope.JropeError, match="got 'wide', want one of auto, float32"):
        jrope.generate(params, TOKENS, config=CONFIG, sums="wide")
