"""What only a TPU runs, computed here on a CPU, beside what every other device runs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jrope import numerics
from jrope.model import attention, kernels


def random(*shape, dtype="float32"):
    normal = np.random.default_rng(len(shape)).standard_normal
    return jnp.asarray(normal(shape, np.float32), dtype)


def test_casts_round_as_reduced_precision_does():
    powers = 10.0 ** np.arange(-20, 20)
    x = np.random.default_rng(0).standard_normal((250, 40)) * powers[None, :]
    with jax.enable_x64(True):
        got = jax.jit(numerics._cast_there_and_back)(x)
    assert got.dtype == np.float64
    np.testing.assert_array_equal(got, x.astype(np.float32))


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (1, 1)])
@pytest.mark.parametrize("window", [None, 3])
def test_a_decode_step_sees_its_own_heads_and_slots(heads, window):
    q, k, v = (
        random(3, n, h, 8) for n, h in zip((1, 16, 16), (*heads, heads[1]), strict=True)
    )
    slots = jnp.asarray([[0], [3], [15]], jnp.int32)
    queries = attention.Queries(slots=slots, segments=None, window=window)
    got = jax.jit(attention._one_query_on_tpu)(q, k, v, queries, None)
    want = jax.jit(attention.one_query)(q, k, v, queries)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_the_tpu_kernel_is_causal_attention_of_grouped_heads():
    q, k, v = (random(1, 256, n, 128, dtype="bfloat16") for n in (4, 2, 2))
    with pltpu.force_tpu_interpret_mode():
        got = kernels.flash(q, k, v)
    q, k, v = (np.asarray(x, np.float64)[0] for x in (q, k, v))
    for head in range(4):
        scores = q[:, head] @ k[:, head // 2].T / math.sqrt(128)
        scores[np.triu_indices(256, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        want = weights / weights.sum(axis=1, keepdims=True) @ v[:, head // 2]
        np.testing.assert_allclose(got[0, :, head].astype(float), want, atol=2e-2)


def test_the_tpu_kernel_is_traced_for_a_tpu_alone():
    assert not kernels.flash_takes(random(1, 512, 2, 128, dtype="bfloat16"))
