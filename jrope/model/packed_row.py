"""A token times 4-bit weights on NVIDIA GPUs, by a kernel of our own.

Each nibble costs three instructions: a nibble n, q places up and below the exponent of
2^23, is the float 2^23 + 16^q n, of which 2^23 + 8 16^q is taken off exactly; its input
was divided by 16^q before, which is exact, too.  A float holds five places; the other
three are those of the word 20 bits further.  A program keeps its inputs in registers
for all of its rows, of which the next are loaded while these are used.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.model.decode_parts import call_triton
from jrope.model.packed import IN_WORD

ROWS, WARPS = 8, 4  # outputs of a program at a time
GROUPS = 32  # of a program, at most
PROGRAMS = 512  # about so many keep a GPU busy
PLACES = 5  # nibbles of a word that fit into a mantissa
ONE = 2**23  # the float whose last bit is 1
EXPONENT = 0x4B000000  # its bits


def times_row(
    words: jax.Array, scale: jax.Array, row: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """The weights times row [in]: float32 [out].

    Args:
      words: uint32 [out, in / 8], see `packed`.
      scale: [out, groups].
      row: bfloat16 or float16.
      interpret: compute it without a GPU.
    """
    out, groups = scale.shape
    at_once = _groups_at_once(groups)
    parts = -(-groups // at_once)
    steps = max(round(out * parts / (ROWS * PROGRAMS)), 1)
    programs = -(-out // (ROWS * steps))
    like = jax.typeof(row).update(dtype=jnp.dtype(jnp.float32))
    [y] = call_triton(
        partial(_rows, at_once=at_once, programs=programs, interpret=interpret),
        (words.reshape(out, groups, -1), scale, row.reshape(groups, IN_WORD, -1)),
        grid=(programs, parts),
        out_shape=[like.update(shape=(parts, out))],
        warps=WARPS,
        stages=2,
        interpret=interpret,
        name="row_times_packed",
    )
    return jnp.sum(y, axis=0) if parts > 1 else y[0]


def _groups_at_once(groups: int) -> int:
    """A power of two: one that divides them, if it is not far below the most."""
    most = min(GROUPS, 1 << (groups - 1).bit_length())
    even = math.gcd(groups, GROUPS)
    return even if 2 * even >= most else most


def _rows(
    words: Any,
    scale: Any,
    x: Any,
    out: Any,
    *,
    at_once: int,
    programs: int,
    interpret: bool,
) -> None:
    """Words [out, groups, m], scale [out, groups], x [groups, 8, m]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    count, groups, width = words.shape
    first, part = pl.program_id(0), pl.program_id(1)
    row, inner = (jnp.arange(n, dtype=jnp.int32) for n in (ROWS, width))
    group = part * at_once + jnp.arange(at_once, dtype=jnp.int32)
    steps = count // ROWS // programs
    if steps * programs * ROWS != count:
        steps = (count // ROWS - first + programs - 1) // programs

    def load(ref: Any, place: tuple[Any, ...], own: jax.Array) -> jax.Array:
        if groups % at_once == 0:
            return triton.load(ref.at[place])
        return triton.load(ref.at[place], mask=own < groups, other=0)

    def rows(step: Any) -> jax.Array:
        return (step * programs + first) * ROWS + row

    def held(step: Any) -> tuple[jax.Array, jax.Array]:
        own, wide = rows(step)[:, None], group[None, :, None]
        place = own[..., None], wide, inner[None, None, :]
        return load(words, place, wide), load(scale, (own, wide[..., 0]), wide[..., 0])

    def see(step: Any, now: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        coming = held(jnp.minimum(step + 1, steps - 1))
        sums = jnp.zeros(now[0].shape, jnp.float32)
        for place, part_of_row in enumerate(inputs):
            sums = _add(sums, now[0], place, part_of_row[None], interpret)
        y = jnp.sum(jnp.sum(sums, axis=2) * now[1].astype(jnp.float32), axis=1)
        triton.store(out.at[part, rows(step)], y)
        return coming

    own = group[:, None]
    loaded = [load(x, (own, p, inner[None, :]), own) for p in range(IN_WORD)]
    inputs = [
        part_of_row.astype(jnp.float32) * np.float32(16.0 ** -(place % PLACES))
        for place, part_of_row in enumerate(loaded)
    ]
    jax.lax.fori_loop(0, steps, see, held(0))


def _add(
    sums: jax.Array, words: jax.Array, place: int, x: jax.Array, interpret: bool
) -> jax.Array:
    """Sums and the levels of one place of the words times x, rounded once."""
    from jax.experimental.pallas import triton

    words = words if place < PLACES else words >> np.uint32(4 * PLACES)
    unit = 16 ** (place % PLACES)
    mask, floor = np.uint32(15 * unit), np.float32(-ONE - 8 * unit)
    if interpret:
        bits = words & mask | np.uint32(EXPONENT)
        return sums + (jax.lax.bitcast_convert_type(bits, jnp.float32) + floor) * x
    # The same as operations takes a fifth longer (an H100, jax 0.11.2).
    [sums] = triton.elementwise_inline_asm(
        f"""{{
        .reg .b32 bits;
        .reg .f32 level;
        lop3.b32 bits, $1, {mask}, {EXPONENT}, 0xEA;
        mov.b32 level, bits;
        add.f32 level, level, 0f{floor.view(np.uint32):08X};
        fma.rn.f32 $0, level, $2, $3;
        }}""",
        args=[words, jnp.broadcast_to(x, words.shape), sums],
        constraints="=f,r,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(words.shape, jnp.float32)],
    )
    return sums
