"""4-bit weights, eight to a word, and products with them.

A row of W [out, in] is cut into groups with a scale s each, of 128 elements; of 64 or
32 where 128 does not divide a row; a row below 128 is one group:

    W[o, i] = s[o, group of i] (n[o, i] - 8),  n in 0..15

or with a zero z for each group, s (n - 8 - z): checkpoints have those, and groups of
any number of whole words.

Word k of a group holds its elements k, k + m, ..., k + 7 m for m words a group, the
first in its lowest bits: elements of one place in neighbouring words are neighbours,
and nothing is interleaved where words are taken apart.
"""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jrope.errors import JropeError
from jrope.numerics import with_rank

GROUP, LEAST = 128, 32
IN_WORD = 8  # elements of a word
Array = TypeVar("Array", jax.Array, np.ndarray)
_SHIFTS = np.arange(0, 32, 4, dtype=np.uint32)


def group_of(name: str, width: int) -> int:
    """How many of a row's `width` elements share a scale.

    Raises:
      JropeError: they make no whole groups, or one of no whole words.
    """
    group = width if width < GROUP else math.gcd(width, GROUP)
    if group % IN_WORD or group < min(width, LEAST):
        wanted = f"a multiple of {LEAST}, or of {IN_WORD} below {GROUP}"
        raise JropeError(
            f"{name}: int4 weights have groups of {GROUP} or {LEAST} inputs, got "
            f"{width}, want {wanted}; take int8"
        )
    return group


def pack(levels: Array) -> Array:
    """Integers -8..7 of groups [out, groups, n] as words [out, groups n / 8]."""
    out, groups, group = levels.shape
    parts = levels.reshape(out, groups, IN_WORD, group // IN_WORD) + 8
    words: Any = sum(
        parts[:, :, place].astype(np.uint32) << shift
        for place, shift in enumerate(_SHIFTS)
    )
    return words.reshape(out, -1)


def widen(
    held: jax.Array, scale: jax.Array, dtype: Any, zero: jax.Array | None = None
) -> jax.Array:
    """The weights [..., in] of words [..., in / 8], scales and zeros [..., groups].

    Or of int8 [..., in] and scales [...].
    """
    if held.dtype == jnp.int8:
        return (held.astype(jnp.float32) * scale[..., None]).astype(dtype)
    *rest, groups = scale.shape
    parts = held.reshape(*rest, groups, 1, -1)
    levels = _levels(parts, with_rank(_SHIFTS[:, None], parts.ndim))
    if zero is not None:
        levels = levels - zero.astype(jnp.int32)[..., None, None]
    wide = levels.astype(jnp.float32) * scale.astype(jnp.float32)[..., None, None]
    return wide.astype(dtype).reshape(*rest, -1)


def row_sums(words: jax.Array, scale: jax.Array, row: jax.Array) -> jax.Array:
    """The weights times row [in], in one pass over the words: float32 [out].

    XLA makes one kernel of it on a GPU, which reads a word once for its 8 products.
    """
    out, groups = scale.shape
    parts = words.reshape(out, groups, -1)
    x = row.astype(jnp.float32).reshape(groups, IN_WORD, -1)
    sums = sum(
        _levels(parts, shift).astype(jnp.float32) * x[None, :, place]
        for place, shift in enumerate(_SHIFTS)
    )
    return jnp.sum(sums * scale.astype(jnp.float32)[..., None], axis=(1, 2))


def _levels(words: jax.Array, shifts: Any) -> jax.Array:
    """Integers -8..7 in one place of the words, or in several."""
    return ((words >> shifts) & 15).astype(jnp.int32) - 8
