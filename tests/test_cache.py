"""The cache: what is written where, what is dropped, and that it is a pytree."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jrope.model.cache import KVCache, grow, per_row, write
from jrope.model.config import LlamaConfig
from jrope.rope import Rope

CONFIG = LlamaConfig(
    vocab_size=11,
    hidden_size=16,
    intermediate_size=8,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    max_position_embeddings=32,
    rms_norm_eps=1e-5,
    hidden_act="silu",
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
    initializer_range=0.02,
    rope=Rope(theta=10000.0, rotary_dim=6),
    bos_token_id=None,
    eos_token_id=(),
    pad_token_id=None,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_empty(dtype: str) -> None:
    cache = KVCache.empty(CONFIG, 5, 7, dtype)
    assert len(cache.keys) == len(cache.values) == 3 and cache.capacity == 7
    for slots in (*cache.keys, *cache.values):
        assert slots.shape == (5, 7, 2, 6) and slots.dtype == dtype
        assert not np.asarray(slots, np.float32).any()
    assert cache.lengths.tolist() == [0] * 5 and cache.lengths.dtype == jnp.int32
    assert cache.rope_lengths.tolist() == [7] * 5


def test_planned_lengths_are_kept() -> None:
    one = KVCache.empty(CONFIG, 2, 7, "float32", rope_lengths=100)
    each = KVCache.empty(CONFIG, 2, 7, "float32", rope_lengths=np.array([30, 40]))
    assert one.rope_lengths.tolist() == [100, 100]
    assert each.rope_lengths.tolist() == [30, 40]
    assert each.rope_lengths.dtype == jnp.int32


def test_is_a_pytree() -> None:
    cache = KVCache.empty(CONFIG, 2, 4, "float32")
    leaves, form = jax.tree.flatten(cache)
    assert len(leaves) == 2 * 3 + 2
    again = jax.tree.unflatten(form, leaves)
    assert isinstance(again, KVCache) and again.keys[0] is cache.keys[0]
    names = [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(cache)]
    assert names[0] == ".keys[0]" and names[-2:] == [".lengths", ".rope_lengths"]


def test_goes_through_jit_and_a_loop() -> None:
    def step(_: Any, cache: KVCache) -> KVCache:
        keys = tuple(k + 1 for k in cache.keys)
        return KVCache(keys, cache.values, cache.lengths + 1, cache.rope_lengths)

    @jax.jit
    def loop(cache: KVCache) -> KVCache:
        return jax.lax.fori_loop(0, 3, step, cache)

    cache = loop(KVCache.empty(CONFIG, 2, 4, "float32"))
    assert cache.lengths.tolist() == [3, 3] and float(cache.keys[2].min()) == 3


@pytest.mark.parametrize("value", [3, np.int64(3), jnp.int32(3), [3, 3], np.array([3])])
def test_per_row(value: Any) -> None:
    rows = per_row(value, 2)
    assert rows.tolist() == [3, 3] and rows.dtype == jnp.int32


def test_grow_puts_room_behind() -> None:
    new = jnp.arange(12, dtype=jnp.float32).reshape(2, 3, 1, 2)
    slots = grow(new, 5)
    assert slots.shape == (2, 5, 1, 2)
    np.testing.assert_array_equal(slots[:, :3], new)
    assert not slots[:, 3:].any()


def written(slots: np.ndarray, new: np.ndarray, starts: Any) -> np.ndarray:
    """What `write` means, slot by slot."""
    out = slots.copy()
    for row, start in enumerate(starts):
        for t in range(new.shape[1]):
            if start + t < out.shape[1]:
                out[row, start + t] = new[row, t]
    return out


@given(
    batch=st.integers(1, 3),
    room=st.integers(1, 6),
    count=st.integers(1, 6),
    data=st.data(),
)
def test_write(batch: int, room: int, count: int, data: st.DataObject) -> None:
    # One token of one row, the decode step, is written without a check: `forward`
    # makes a row that overflows NaN from then on.
    last = room - 1 if batch == count == 1 else room + 2
    starts = data.draw(st.lists(st.integers(0, last), min_size=batch, max_size=batch))
    slots = np.arange(batch * room * 2, dtype=np.float32).reshape(batch, room, 1, 2)
    new = -1 - np.arange(batch * count * 2, dtype=np.float32)
    new = new.reshape(batch, count, 1, 2)
    got = jax.jit(write)(slots, new, np.array(starts, np.int32))
    np.testing.assert_array_equal(got, written(slots, new, starts))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cpu_writes_16_bit_tokens_as_they_are(dtype: str) -> None:
    starts = np.array([0, 4, 5, 2], np.int32)  # the third is past the end
    normal = np.random.default_rng(0).standard_normal
    slots, new = (jnp.asarray(normal((4, n, 2, 3)), dtype) for n in (5, 1))
    slots = slots.at[0, 1, 0].set(jnp.asarray([np.nan, -np.inf, 1e-6], dtype))
    got = jax.jit(write)(slots, new, starts)
    want = written(np.asarray(slots), np.asarray(new), starts)
    np.testing.assert_array_equal(got.astype(float), want.astype(float))


@pytest.mark.parametrize(("platform", "scatters"), [("cpu", False), ("cuda", True)])
def test_a_cpu_scatters_no_16_bit_tokens(platform: str, scatters: bool) -> None:
    slots, new = (jnp.zeros((2, n, 2, 8), jnp.bfloat16) for n in (512, 1))
    traced = jax.jit(write).trace(slots, new, jnp.zeros(2, jnp.int32))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("scatter" in text) == scatters


def test_write_is_in_place_when_donated() -> None:
    slots = jnp.zeros((2, 512, 2, 8), jnp.float32)
    new, starts = jnp.ones((2, 1, 2, 8), jnp.float32), jnp.array([3, 9], jnp.int32)
    compiled = jax.jit(write, donate_argnums=0).lower(slots, new, starts).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == slots.nbytes
    assert memory.temp_size_in_bytes < slots.nbytes / 8
