"""4-bit weights, eight to a word, and products with them.

A row of W [out, in] is cut into groups of min(in, 128) elements with a scale s each:

    W[o, i] = s[o, group of i] (n[o, i] - 8),  n in 0..15

Word k of a group holds its elements k, k + m, ..., k + 7 m for m words a group, the
first in its lowest bits: elements of one place in neighbouring words are neighbours,
and nothing is interleaved where words are taken apart.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.errors import JropeError

GROUP = 128
IN_WORD = 8  # elements of a word
_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)


def group_of(name: str, width: int) -> int:
    """How many of a row's `width` elements share a scale.

    Raises:
      JropeError: they make no whole groups, or one of no whole words.
    """
    group = min(width, GROUP)
    if width % group or group % IN_WORD:
        wanted = f"a multiple of {GROUP}, or of {IN_WORD} below it"
        raise JropeError(
            f"{name}: int4 weights have groups of {GROUP} inputs, got {width}, want "
            f"{wanted}; take int8"
        )
    return group


def pack(levels: jax.Array) -> jax.Array:
    """Integers -8..7 of groups [out, groups, n] as words [out, groups n / 8]."""
    out, groups, group = levels.shape
    nibbles = (levels + 8).astype(jnp.uint32)
    parts = nibbles.reshape(out, groups, IN_WORD, group // IN_WORD)
    words = jnp.sum(parts << _SHIFTS[:, None], axis=2, dtype=jnp.uint32)
    return words.reshape(out, -1)


def widen(held: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
    """The weights [..., in] of words [..., in / 8] and scales [..., groups].

    Or of int8 [..., in] and scales [...].
    """
    if held.dtype == jnp.int8:
        return (held.astype(jnp.float32) * scale[..., None]).astype(dtype)
    *rest, groups = scale.shape
    parts = held.reshape(*rest, groups, 1, -1)
    levels = ((parts >> _SHIFTS[:, None]) & 15).astype(jnp.int32) - 8
    wide = levels.astype(jnp.float32) * scale.astype(jnp.float32)[..., None, None]
    return wide.astype(dtype).reshape(*rest, -1)


def row_sums(words: jax.Array, scale: jax.Array, row: jax.Array) -> jax.Array:
    """The weights times row [in], in one pass over the words: float32 [out].

    The bits of a nibble n become the first four of a float's fraction, 16 + n in two
    operations instead of a conversion; the 24 too much are taken off for all at once.
    """
    out, groups = scale.shape
    parts = words.reshape(out, groups, -1)
    x = row.astype(jnp.float32).reshape(groups, IN_WORD, -1)
    sums = sum(_raised(parts, place) * x[:, place] for place in range(IN_WORD))
    sums = sums - 24 * jnp.sum(x, axis=1)
    return jnp.sum(sums * scale.astype(jnp.float32)[..., None], axis=(1, 2))


def _raised(words: jax.Array, place: int) -> jax.Array:
    """16 + n of the nibbles n in one place of the words, float32."""
    move = 19 - 4 * place
    moved = words << move if move >= 0 else words >> -move
    bits = moved & np.uint32(0x00780000) | np.uint32(0x41800000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
