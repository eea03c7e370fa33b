"""The key/value cache: a frozen pytree, an argument and a result.

Slot s of a row holds the key and value of that row's token at position s, so rows of
different lengths are exact without masks: a query sees the slots up to its own, and
what lies beyond is overwritten before it is ever seen.  A layer with a window has no
more slots than that, which go round: see `rolling`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jrope.model.bits import Bits, to_bits
from jrope.model.config import LlamaConfig
from jrope.model.int8_cache import CacheDtype, Keys, Scaled, empty_int8, to_int8
from jrope.numerics import cpu_barrier

Slots: TypeAlias = tuple[Keys, Keys]
"""A layer's keys and values [B, S, K, H]."""


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of L layers, and where each row stands.

    Args:
      keys, values: L arrays [B, S, K, H]; keys are rotated, unless lengths grow.  A
        layer with a window W has min(S, W) slots instead of S.  Where a mesh splits the
        slots they stand in stripes, see `sharding.stripes`.  Instead of an array there
        may be 8-bit integers with their scales, see `int8_cache`.
      lengths: int32 [B], filled slots.
      rope_lengths: int32 [B], read by the methods whose frequencies depend on the
        length: the planned total that the keys were rotated for; with "hf" lengths what
        transformers remembers; with growing lengths nothing reads it.
    """

    keys: tuple[Keys, ...]
    values: tuple[Keys, ...]
    lengths: jax.Array
    rope_lengths: jax.Array

    @property
    def capacity(self) -> int:
        """S, the slots of a row; W where every layer has a window of W < S."""
        return max(k.shape[1] for k in self.keys)

    @property
    def cache_dtype(self) -> CacheDtype | None:
        """ "int8" where keys and values are integers, else None."""
        return "int8" if isinstance(self.keys[0], Scaled) else None

    @classmethod
    def empty(
        cls,
        config: LlamaConfig,
        batch: int,
        capacity: int,
        dtype: DTypeLike,
        rope_lengths: ArrayLike | None = None,
    ) -> "KVCache":
        """A cache with nothing in it; of dtype "int8" with scales, see `int8_cache`.

        `rope_lengths` defaults to the capacity, with "hf" lengths to the trained one.
        """
        if rope_lengths is None:
            remembers = config.rope.lengths == "hf"
            trained = config.rope.trained_length or 0
            rope_lengths = trained if remembers else capacity
        heads = (config.num_key_value_heads, config.head_dim)
        slots = layer_slots(config, capacity)
        eight = jnp.dtype(dtype) == jnp.int8
        zeros = empty_int8 if eight else partial(jnp.zeros, dtype=dtype)
        return cls(
            keys=tuple(zeros((batch, n, *heads)) for n in slots),
            values=tuple(zeros((batch, n, *heads)) for n in slots),
            lengths=jnp.zeros(batch, jnp.int32),
            rope_lengths=per_row(rope_lengths, batch),
        )


def layer_slots(config: LlamaConfig, capacity: int) -> list[int]:
    """The slots of every layer for a text of `capacity` tokens."""
    windows = config.windows or (None,) * config.num_hidden_layers
    return [capacity if w is None else min(w, capacity) for w in windows]


def all_roll(config: LlamaConfig, keys: Sequence[Keys]) -> bool:
    """Whether every layer has as many slots as its window, so that none overflows."""
    windows = config.windows or (None,)
    return all(k.shape[1] == w for k, w in zip(keys, windows, strict=False))


def per_row(value: ArrayLike, batch: int) -> jax.Array:
    """A scalar or [B] integers as int32 [B]."""
    return jnp.broadcast_to(jnp.asarray(value, jnp.int32), (batch,))


def as_cached(
    new: Slots, slots: Slots | None, cache_dtype: CacheDtype | None = None
) -> Slots:
    """New keys and values as the slots hold them; as `cache_dtype` without slots."""
    if slots is not None:
        return held(new[0], slots[0]), held(new[1], slots[1])
    return jax.tree.map(to_int8, new) if cache_dtype == "int8" else new


def held(new: Keys, slots: Keys) -> Keys:
    """New keys, or values, as the slots hold them."""
    if isinstance(new, jax.Array) and isinstance(slots, Scaled):
        return to_int8(new)
    if isinstance(new, jax.Array) and isinstance(slots, Bits):
        return to_bits(new)
    return new


def in_bits(cache: KVCache) -> KVCache:
    """A cache of 16-bit floats as a CPU takes and puts some of them best."""
    keys, values = (
        tuple(to_bits(x) for x in xs if isinstance(x, jax.Array))
        for xs in (cache.keys, cache.values)
    )
    return replace(cache, keys=keys, values=values)


def grow(new: Keys, capacity: int) -> Keys:
    """The first T slots [B, T, K, H] with room behind them: [B, capacity, K, H]."""
    room = ((0, 0), (0, capacity - new.shape[1]), (0, 0), (0, 0))
    return jax.tree.map(lambda x: jnp.pad(x, room), new)


def write(slots: Keys, new: Keys, starts: jax.Array) -> Keys:
    """Put `new` [B, T, K, H] into `slots` [B, S, K, H] from each row's start on.

    What would fall past the end is dropped, but one token of one row overwrites the
    last slot (`forward` makes a row that overflows NaN).  Donated, this is in place.
    """
    return jax.tree.map(partial(_write, starts=starts), slots, new)


def _write(slots: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    if new.shape[1] == 1 < new.shape[0] and slots.dtype == jnp.bfloat16:
        ways: dict[str, Any] = {"cpu": _select, "default": _put}
        return jax.lax.platform_dependent(slots, new, starts, **ways)
    return _put(slots, new, starts)


def _select(slots: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    """`_put` of one bfloat16 token a row, as XLA's CPU backend does it best.

    It scatters these into a float32 copy of all slots, which it then rounds (jax 0.10):
    six times as long as going over the slots, which is in place.
    """
    own = jnp.arange(slots.shape[1], dtype=jnp.int32)[None, :] == starts[:, None]
    return jnp.where(own[:, :, None, None], new, slots)


def _put(slots: jax.Array, new: jax.Array, starts: jax.Array) -> jax.Array:
    batch, tokens = new.shape[:2]
    if batch == tokens == 1:  # one row: a plain update, which XLA fuses
        slots = jax.lax.dynamic_update_slice_in_dim(slots, new, starts[0], axis=1)
        (slots,) = cpu_barrier(slots)  # else written, hence copied, once a reader
        return slots
    where = starts[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None, :]
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    return slots.at[rows, where].set(new, mode="drop")
