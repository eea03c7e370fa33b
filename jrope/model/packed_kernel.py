"""A few tokens times 4-bit weights on NVIDIA GPUs, by a kernel of our own.

Products and sums are left to tensor cores, whose tiles have 16 rows.  Nibbles become
floats of 16 bits without a conversion, two at once: in the bits of a mantissa below the
exponent of 16 a nibble n is 16 + n, of which 24 is taken off exactly.  Scales come
after the sum over their group.  (A single token has a kernel for itself, `packed_row`.)
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.model.decode_parts import TILE, call_triton, triton_takes
from jrope.model.packed import GROUP, IN_WORD, LEAST
from jrope.model.packed_row import times_row

OUTPUTS, A_WARP = 64, 32  # of a program, and of its warps
PROGRAMS = 512  # about so many keep a GPU busy


@dataclass(frozen=True)
class Tiles:
    """How a product is cut.

    Args:
      outs: outputs of a program.
      split: parts of a sum, each by a program, which are added up after.
    """

    outs: int
    split: int

    @classmethod
    def of(cls, out: int, groups: int) -> "Tiles":
        """Enough programs, in few steps."""
        outs = math.gcd(out, OUTPUTS)
        split = max(min(PROGRAMS * outs // out, groups // 4), 1)
        return cls(outs, 1 << (split.bit_length() - 1))


def kernel_takes(x: jax.Array, words: jax.Array, scale: jax.Array) -> bool:
    """Whether x [..., in] is a few tokens for this kernel, and here."""
    few = 0 < x.size <= TILE * x.shape[-1]
    group = x.shape[-1] // scale.shape[1]
    whole = group in (LEAST, 2 * LEAST, GROUP) and words.shape[0] % TILE == 0
    return few and whole and triton_takes(x)


def times_packed(
    x: jax.Array,
    words: jax.Array,
    scale: jax.Array,
    *,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x [..., in] of up to 16 tokens times 4-bit weights: float32 [..., out].

    Args:
      x: bfloat16 or float16.
      words: uint32 [out, in / 8], see `packed`.
      scale: [out, groups].
      tiles: how the product is cut.
      interpret: compute it without a GPU.
    """
    out, groups = scale.shape
    count = x.size // x.shape[-1]
    if count == 1 and tiles is None:
        y = times_row(words, scale, x.reshape(-1), interpret=interpret)
        return y.reshape(*x.shape[:-1], out)
    tiles = tiles or Tiles.of(out, groups)
    like = jax.typeof(x).update(dtype=jnp.dtype(jnp.float32))
    [y] = call_triton(
        partial(_rows, tiles=tiles),
        (x.reshape(count, groups, -1), words.reshape(out, groups, -1), scale),
        grid=(out // tiles.outs, tiles.split),
        out_shape=[like.update(shape=(tiles.split, count, out))],
        warps=max(tiles.outs // A_WARP, 1),
        stages=4,
        interpret=interpret,
        name="rows_times_packed",
    )
    y = jnp.sum(y, axis=0) if tiles.split > 1 else y
    return y.reshape(*x.shape[:-1], out)


def _rows(x: Any, words: Any, scale: Any, out: Any, *, tiles: Tiles) -> None:
    """Tokens; x [T, groups, 8 m], words [out, groups, m], scale [out, groups]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    count, groups, width = x.shape
    own = pl.program_id(0) * tiles.outs + jnp.arange(tiles.outs, dtype=jnp.int32)
    sizes = TILE, width // IN_WORD, width
    row, inner, lanes = (jnp.arange(n, dtype=jnp.int32) for n in sizes)
    there = (row < count)[:, None]

    def see(group: Any, sums: jax.Array) -> jax.Array:
        held = triton.load(words.at[own[None, :], group, inner[:, None]])
        factor = triton.load(scale.at[own, group]).astype(jnp.float32)
        place = row[:, None], group, lanes[None, :]
        part = triton.load(x.at[place], mask=there, other=0)
        return sums + triton.dot(part, _levels(held, x.dtype)) * factor[None, :]

    sums = jnp.zeros((TILE, tiles.outs), jnp.float32)
    sums = jax.lax.fori_loop(*_share(groups, tiles.split), see, sums)
    place = pl.program_id(1), row[:, None], own[None, :]
    triton.store(out.at[place], sums, mask=there)


def _share(groups: int, split: int) -> tuple[Any, Any]:
    """The groups of this program's part of a sum."""
    from jax.experimental import pallas as pl

    if split == 1:
        return 0, groups
    each = -(-groups // split)
    begin = pl.program_id(1) * each
    return begin, jnp.minimum(begin + each, groups)


def _levels(words: jax.Array, dtype: Any) -> jax.Array:
    """Integers -8..7 [8 m, outs] of words [m, outs], in a dtype of 16 bits."""
    outs = words.shape[1]
    spare = jnp.finfo(dtype).nmant - 4
    both = np.uint32(0x10001)  # halves of a word: a nibble, and the fourth after it
    floor = np.asarray(16, dtype).view(np.uint16) * both

    def pair(place: int) -> jax.Array:
        bits = _shifted(words, 4 * place - spare) & (15 << spare) * both | floor
        halves = [half.astype(jnp.uint16) for half in (bits, bits >> np.uint32(16))]
        halves = [jax.lax.bitcast_convert_type(half, dtype) for half in halves]
        return jnp.stack(halves, axis=-1)

    pairs = [jnp.stack([pair(place), pair(place + 1)], axis=-1) for place in (0, 2)]
    found = jnp.stack(pairs, axis=-1)  # [m, outs, 4s, 1s, 2s] of a nibble's place
    return found.transpose(2, 4, 3, 0, 1).reshape(-1, outs) - jnp.asarray(24, dtype)


def _shifted(words: jax.Array, by: int) -> jax.Array:
    """Words whose bit `by` is their bit 0 from now on."""
    return words >> np.uint32(by) if by >= 0 else words << np.uint32(-by)
