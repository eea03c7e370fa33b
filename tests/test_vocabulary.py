"""The best token of a row, as a CPU finds it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrope.sharding.vocabulary import BLOCK, argmax

SPECIAL = (0.0, -0.0, 9.0, np.inf, -np.inf, np.nan, -np.nan)


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, 5 * BLOCK, 9 * BLOCK + 7])
def test_is_the_first_of_the_largest_and_a_nan_above_all(size: int) -> None:
    random = np.random.default_rng(size)
    rows = [np.full(size, x, np.float32) for x in SPECIAL]
    for x in SPECIAL:
        for _ in range(8):  # several of a kind, in one block and in many
            row = random.standard_normal(size).astype(np.float32)
            row[random.integers(0, size, 3)] = x
            rows.append(row)
    logits = np.stack(rows)
    got = jax.jit(argmax)(logits)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, np.argmax(logits, axis=-1))


@pytest.mark.parametrize(("platform", "pairs"), [("cpu", False), ("cuda", True)])
def test_a_cpu_compares_no_index_of_every_logit(platform: str, pairs: bool) -> None:
    traced = jax.jit(argmax).trace(jnp.zeros((2, 100 * BLOCK), jnp.float32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert (f"2x{100 * BLOCK}xi32" in text) == pairs
