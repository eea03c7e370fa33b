"""The cache of a layer with a window of W: W slots a row, position p in slot p mod W.

A new token overwrites the one that it sees no more, so that a decode step reads W slots
however long the text is.  Several new tokens at once look at the old slots and at
themselves, both put in the order of their positions, and then leave the last W behind.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jrope.model.cache import Slots, per_row, write
from jrope.model.int8_cache import Keys

See = Callable[..., jax.Array]


def keep_last(new: Keys, window: int, counts: jax.Array | None) -> Keys:
    """The slots after a row's first tokens.

    Args:
      new: [B, T, K, H], tokens from position 0 on.
      window: W.
      counts: int32 [B], valid tokens of each row; None: T.

    Returns:
      [B, W, K, H].
    """
    filled = per_row(new.shape[1] if counts is None else counts, new.shape[0])
    return _take(new, position_of_slots(filled, window))


def extend(
    see: See,
    q: jax.Array,
    new: Slots,
    slots: Slots,
    starts: jax.Array,
    counts: jax.Array | None,
) -> tuple[jax.Array, Slots]:
    """Attention of new tokens to W old slots and themselves, and the slots after them.

    Of W filled slots no new token sees the oldest, which may hold anything.

    Args:
      see: `attention.attend` with this layer's window.
      q: [B, T, N, H].
      new: keys and values [B, T, K, H].
      slots: keys and values [B, W, K, H].
      starts: int32 [B], tokens so far.
      counts: int32 [B], valid new ones; None: T.
    """
    window, count = slots[0].shape[1], q.shape[1]
    if count == 1 and counts is None:
        at = starts % window
        k, v = (write(old, x, at) for old, x in zip(slots, new, strict=True))
        return see(q, k, v, jnp.minimum(starts, window - 1)), (k, v)
    old = jnp.minimum(starts, window - 1)  # slots that are seen
    first = starts - old  # the position of the oldest
    index = jnp.arange(window + count, dtype=jnp.int32)[None, :]
    held, own = (first[:, None] + index) % window, window + index - old[:, None]
    order = jnp.where(index < old[:, None], held, own)
    k, v = (
        _take(jax.tree.map(_join, *pair), order)
        for pair in zip(slots, new, strict=True)
    )
    filled = starts + (count if counts is None else counts)
    kept = position_of_slots(filled, window) - first[:, None]
    return see(q, k, v, old), (_take(k, kept), _take(v, kept))


def position_of_slots(filled: jax.Array, window: int) -> jax.Array:
    """The position in each slot of a row with so many tokens, below 0 if none: [B, W].

    The largest p < filled with p mod W = slot.
    """
    slot = jnp.arange(window, dtype=jnp.int32)[None, :]
    last = filled[:, None] - 1
    return last - (last - slot) % window


def _join(old: jax.Array, new: jax.Array) -> jax.Array:
    return jnp.concatenate([old, new], axis=1)


def _take(x: Keys, index: jax.Array) -> Keys:
    """Slots [B, S, K, H] by index [B, n]; past either end, the slot at that end."""
    index = jnp.clip(index, 0, x.shape[1] - 1)[:, :, None, None]
    return jax.tree.map(lambda x: jnp.take_along_axis(x, index, axis=1), x)
