"""16-bit floats that a cache holds as integers."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_helpers import by_key, engine_of, work
from generate_helpers import model

import jrope.batch.slots
from jrope.batch.slots import empty
from jrope.model.bits import Bits, to_bits
from jrope.model.cache import KVCache, as_cached, in_bits, write
from jrope.model.int8_cache import linear_in_head, parts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_float_comes_back(dtype: str) -> None:
    every = np.arange(2**16, dtype=np.uint16)
    x = jax.lax.bitcast_convert_type(jnp.asarray(every).reshape(2, -1, 4, 8), dtype)
    bits = jax.jit(to_bits)(x)
    assert (bits.shape, bits.dtype) == (x.shape, x.dtype)
    np.testing.assert_array_equal(bits.integers, every.reshape(x.shape))
    (back, none), want = parts(bits), np.asarray(x).view(np.uint16)
    assert none is None and back.dtype == x.dtype
    np.testing.assert_array_equal(np.asarray(back).view(np.uint16), want)


def test_new_tokens_are_held_as_the_slots_are() -> None:
    normal = np.random.default_rng(0).standard_normal
    slots, new = (jnp.asarray(normal((4, n, 2, 3)), jnp.bfloat16) for n in (5, 1))
    starts = np.array([0, 4, 5, 2], np.int32)  # the third is past the end
    held, _ = as_cached((new, new), (to_bits(slots), to_bits(slots)))
    got = jax.jit(write)(to_bits(slots), held, starts)
    assert isinstance(got, Bits)
    want = np.asarray(slots).copy()
    for row, start in enumerate([0, 4, None, 2]):
        if start is not None:
            want[row, start] = np.asarray(new)[row, 0]
    np.testing.assert_array_equal(np.asarray(got.floats), want)
    doubled = linear_in_head(lambda x: 2 * x, got, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(doubled), 2 * want)


def test_a_token_is_written_in_place() -> None:
    slots = to_bits(jnp.zeros((2, 512, 2, 8), jnp.bfloat16))
    new, starts = to_bits(jnp.ones((2, 1, 2, 8), jnp.bfloat16)), jnp.zeros(2, jnp.int32)
    compiled = jax.jit(write, donate_argnums=0).lower(slots, new, starts).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == slots.integers.nbytes
    assert memory.temp_size_in_bytes < slots.integers.nbytes / 8


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_slots_of_an_engine_on_a_cpu(dtype: str) -> None:
    how: Any = {"dtype": jnp.bfloat16 if dtype == "int8" else jnp.dtype(dtype)}
    how |= {"cache_dtype": "int8"} if dtype == "int8" else {}
    cache = empty.eval_shape(config=model()[2], count=2, capacity=16, **how).cache
    short = dtype == "bfloat16"
    assert all(isinstance(x, Bits) == short for x in cache.keys + cache.values)
    assert cache.cache_dtype == ("int8" if dtype == "int8" else None)


def test_answers_are_those_over_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces of a prompt, and rows that follow others, to the bit."""
    _, params, config = model()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    rows = [replace(work(i, 3 + 13 * i, 6), logprobs=2) for i in range(5)]
    how: Any = {"slots": 2, "capacity": 64, "chunk": 3}
    got = by_key(engine_of(params, config, **how).run(rows))

    def as_it_is(cache: KVCache) -> KVCache:
        return cache

    monkeypatch.setattr(jrope.batch.slots, "in_bits", as_it_is)
    empty.clear_cache()
    want = by_key(engine_of(params, config, **how).run(rows))
    empty.clear_cache()
    for key, row in want.items():
        np.testing.assert_array_equal(got[key].tokens, row.tokens)
        np.testing.assert_array_equal(got[key].logprobs, row.logprobs)


def test_a_cache_in_bits_is_the_same_tree() -> None:
    cache = KVCache.empty(model()[2], 2, 8, jnp.bfloat16)
    held = in_bits(cache)
    assert held.capacity == cache.capacity
    shapes = [x.shape for x in jax.tree.leaves(held.keys)]
    assert shapes == [x.shape for x in cache.keys]
