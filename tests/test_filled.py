"""Decode steps of several rows on a CPU, over the blocks of slots that they see."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrope.model.attention import attend, one_query
from jrope.model.bits import to_bits
from jrope.model.filled import AT_ONCE, BLOCK, FEWEST, attend_filled, filled_takes
from jrope.model.queries import Queries

SLOTS, HEADS, KV_HEADS, SIZE = 5 * BLOCK, 6, 3, 8
EDGES = (0, BLOCK - 1, BLOCK, 2 * BLOCK + 5, SLOTS - 1, 3 * BLOCK - 1, 1, SLOTS - 2)
Arrays = tuple[jax.Array, Any, Any]


def random(slots: int = SLOTS, dtype: Any = "float32") -> Arrays:
    """q, k, v; more blocks than are seen at a time."""
    normal, rows = np.random.default_rng(0).standard_normal, len(EDGES)
    shapes = ((1, HEADS), (slots, KV_HEADS), (slots, KV_HEADS))
    q, k, v = (normal((rows, *shape, SIZE), np.float32) for shape in shapes)
    return jnp.asarray(2 * q, dtype), jnp.asarray(k, dtype), jnp.asarray(v, dtype)


def short(dtype: Any = "bfloat16") -> Arrays:
    """The same as an engine holds 16-bit floats on a CPU."""
    q, k, v = random(dtype=dtype)
    return q, to_bits(k), to_bits(v)


def wanted(q: Any, k: Any, v: Any, starts: Any, window: int | None) -> np.ndarray:
    """In float64, row by row and head by head."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, n in np.ndindex(len(q), HEADS):
        last, head = starts[b] + 1, n // (HEADS // KV_HEADS)
        seen = slice(0 if window is None else max(last - window, 0), last)
        scores = k[b, seen, head] @ q[b, 0, n] / math.sqrt(SIZE)
        weights = np.exp(scores - scores.max())
        out[b, 0, n] = weights / weights.sum() @ v[b, seen, head]
    return out


@pytest.fixture(scope="module")
def see() -> Any:
    """`attend` without a window, as one program."""
    return jax.jit(attend)


def loops(given: Arrays, platform: str = "cpu", starts: Any = EDGES) -> bool:
    """Whether the program for a platform is the one that looks at blocks."""
    given = jax.tree.map(lambda x: x[: len(starts)], given)
    traced = jax.jit(attend).trace(*given, jnp.asarray(starts))
    return "while" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("window", [None, 1, BLOCK, BLOCK + 9, 3 * BLOCK])
def test_is_a_softmax_over_what_a_row_sees(window: int | None) -> None:
    assert len(EDGES) * SLOTS > AT_ONCE
    check(random(), window)


@pytest.mark.parametrize("part", [2, 4])
def test_blocks_may_be_shorter(part: int) -> None:
    given = random(SLOTS + BLOCK // part)
    assert loops(given)
    check(given, BLOCK + 9)


def check(given: Arrays, window: int | None) -> None:
    starts = np.array(EDGES, np.int32)
    got = jax.jit(partial(attend, window=window))(*given, starts)
    want = wanted(*given, starts, window)
    np.testing.assert_allclose(got, want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("window", [None, BLOCK + 9])
def test_16_bits_are_rounded_as_over_all_slots(window: int | None) -> None:
    starts = np.array(EDGES, np.int32)
    got = jax.jit(partial(attend, window=window))(*short(), starts)
    assert got.dtype == jnp.bfloat16
    want = wanted(*random(dtype="bfloat16"), starts, window)
    np.testing.assert_allclose(got.astype(jnp.float32), want, atol=0.02, rtol=0)


@pytest.mark.parametrize("how", [{"scale": 0.3}, {"cap": 1.5}])
def test_scores_are_those_of_all_slots(how: dict[str, float]) -> None:
    given, starts = random(), jnp.asarray(EDGES)
    got = jax.jit(partial(attend, **how))(*given, starts)
    fields: dict[str, Any] = {"slots": starts[:, None], "segments": None}
    want = one_query(*given, Queries(**fields, window=None, **how))
    np.testing.assert_allclose(got, want, atol=2e-6, rtol=0)


@pytest.mark.parametrize("given", [random(), short()], ids=["float32", "bits"])
def test_a_row_is_the_same_to_the_bit_beside_and_behind_others(
    given: Arrays, see: Any
) -> None:
    got = see(*given, jnp.asarray(EDGES))
    for row, start in enumerate(EDGES):
        alone = np.zeros(len(EDGES), np.int32)
        alone[row] = start
        np.testing.assert_array_equal(see(*given, alone)[row], got[row])
    turned = jax.tree.map(lambda x: jnp.roll(x, 3, axis=0), given)
    other = see(*turned, jnp.roll(jnp.asarray(EDGES), 3))
    np.testing.assert_array_equal(jnp.roll(other, -3, axis=0), got)


def test_what_lies_past_a_row_does_not_matter(see: Any) -> None:
    q, k, v = random()
    starts = jnp.asarray(EDGES)
    past = (jnp.arange(SLOTS)[None, :] > starts[:, None])[..., None, None]
    k2, v2 = (jnp.where(past, 1e30, x) for x in (k, v))
    np.testing.assert_array_equal(see(q, k2, v2, starts), see(q, k, v, starts))


def test_has_derivatives() -> None:
    given, starts = random(), jnp.asarray(EDGES)
    queries = Queries(slots=starts[:, None], segments=None, window=None)

    def loss(see: Any, *given: jax.Array) -> jax.Array:
        return jnp.sum(see(*given, queries) ** 2)

    every = (0, 1, 2)
    own = partial(loss, partial(attend_filled, one_query))
    got = jax.jit(jax.grad(own, every))(*given)
    want = jax.jit(jax.grad(partial(loss, one_query), every))(*given)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)


def test_runs_where_shard_map_checks_what_varies(see: Any) -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    given, rows = random(), jax.P("data")
    shared = jax.shard_map(attend, mesh=mesh, in_specs=rows, out_specs=rows)
    got = jax.jit(shared)(*given, jnp.asarray(EDGES))
    np.testing.assert_array_equal(got, see(*given, jnp.asarray(EDGES)))


def test_16_bits_are_not_widened_before_they_are_taken() -> None:
    q, k, v = short()
    program = jax.jit(attend).lower(q, k, v, jnp.asarray(EDGES)).compile()
    sizes = (
        f"[{len(EDGES)},{SLOTS},",
        f"[{len(EDGES) * SLOTS // BLOCK},{BLOCK * 3 * 8}]",
    )
    wide = [f"{kind}{size}" for kind in ("f32", "bf16") for size in sizes]
    assert not any(name in program.as_text() for name in wide)


def test_is_for_several_float32_rows_on_a_cpu() -> None:
    assert loops(random())
    assert not loops(random(), "cuda")
    assert not loops(random(), "tpu")
    assert not loops(random(dtype="bfloat16"))
    assert loops(short()) and not loops(short(), "cuda")
    assert loops(short("float16"))
    assert not loops(random(), starts=EDGES[:1])
    assert not loops(random(FEWEST - BLOCK))
    assert not loops(random(SLOTS - 1))
    q, k, _ = random()
    assert filled_takes(q, k, None)
    assert not filled_takes(q, k, jnp.ones((len(EDGES), SLOTS), jnp.int32))
