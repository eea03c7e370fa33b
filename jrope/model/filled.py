"""A decode step of several rows on a CPU, which reads the filled slots only.

All rows' blocks of slots that their queries see stand in one list, so that long rows
do not make the short ones longer.  A block gives softmax sums of its own; since those
of a row are put together in the order of its slots, its answer does not depend on the
other rows.

Floats of 16 bits have to be held as `Bits`: XLA's CPU backend would make float32 of all
slots before it takes some of them (jax 0.10).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jrope.model.bits import Bits, to_bits
from jrope.model.int8_cache import Keys
from jrope.model.queries import LOWEST, Queries, einsum, own_heads, spread, steps

BLOCK = 64  # slots, or a half or a quarter where a row has no whole number of blocks
AT_ONCE = 512  # slots: their keys stay in a CPU's cache
FEWEST = 128  # slots of a row, below which all of them are read at once

Sums: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""Of blocks, float32: values weighted by exponentials, [..., N, H], the largest score
and the sum of exponentials relative to it, both [..., N, 1]."""


def filled_takes(q: jax.Array, k: Keys, segments: jax.Array | None) -> bool:
    """Whether `attend_filled` is for queries [B, 1, N, H] and keys [B, S, K, H]."""
    integers = isinstance(k, Bits) and k.dtype == q.dtype
    wide = isinstance(k, jax.Array) and q.dtype == k.dtype == jnp.float32
    slots, several = k.shape[1], len(q) > 1 and segments is None
    whole = slots >= FEWEST and slots % (BLOCK // 4) == 0
    return (wide or integers) and several and whole


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend_filled(
    plain: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array | Bits,
    v: jax.Array | Bits,
    queries: Queries,
    segments: None = None,
) -> jax.Array:
    """As `attention.one_query`; blocks that no query sees cost nothing.

    Args:
      plain: the same over all slots, for derivatives: a loop has none in reverse.
      q: [B, 1, N, H], rotated.
      k, v: [B, S, K, H].
      queries: where the rows stand.
      segments: none.

    Returns:
      [B, 1, N, H].
    """
    batch, _, heads, head_dim = q.shape
    block = math.gcd(k.shape[1], BLOCK)
    kv_heads, per_row = k.shape[2], k.shape[1] // block
    k, v = (x.integers if isinstance(x, Bits) else x for x in (k, v))
    own_q = q if q.dtype == k.dtype else to_bits(q).integers
    k, v = (x.reshape(batch * per_row, -1) for x in (k, v))  # a block a row
    seen = _seen_blocks(queries, per_row, block)
    count = jnp.sum(seen, dtype=jnp.int32)
    size = min(AT_ONCE // block, batch * per_row)
    (listed,) = jnp.nonzero(seen.reshape(-1), size=seen.size, fill_value=seen.size)
    listed = listed.astype(jnp.int32)  # row by row, then blocks that are none
    listed = jnp.pad(listed, (0, -len(listed) % size), constant_values=len(k))

    floats = partial(jax.lax.bitcast_convert_type, new_dtype=q.dtype)  # or as they are

    def cut(x: jax.Array, blocks: jax.Array) -> jax.Array:
        return floats(x.at[blocks].get(mode="clip").reshape(size, block, -1))

    def see(carry: tuple[jax.Array, Sums]) -> tuple[jax.Array, Sums]:
        i, sums = carry
        blocks = jax.lax.dynamic_slice_in_dim(listed, i * size, size)
        rows = jnp.minimum(blocks // per_row, batch - 1)
        at = queries.slots[rows] - (blocks % per_row * block)[:, None]
        own = replace(queries, slots=at)
        rows_q = floats(spread(own_q[rows], kv_heads))
        products = einsum("BNX,BSX->BNS", rows_q, cut(k, blocks))
        hidden = own.hidden(steps(block), None)
        scores = jnp.where(hidden, LOWEST, own.scores(q, products))
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.where(hidden, 0, jnp.exp(scores - top))
        y = einsum("BNS,BSX->BNX", weights.astype(q.dtype), cut(v, blocks))
        y = own_heads(y, kv_heads)
        new = y, top, jnp.sum(weights, axis=-1, keepdims=True)
        put = partial(jax.tree.map, lambda x, own: x.at[blocks].set(own, mode="drop"))
        return i + 1, put(sums, new)

    # Any number of this layer's: XLA would copy zeros, which it has once for all, and
    # where `jax.shard_map` checks it, they must vary as all that takes their place.
    every = q[0, 0, 0, 0], k[0, 0], v[0, 0], queries.slots[0, 0]
    number = sum(x.astype(jnp.float32) for x in every)
    shapes = ((batch * per_row, heads, width) for width in (head_dim, 1, 1))
    y, top, total = (jnp.broadcast_to(number, shape) for shape in shapes)
    start = jnp.zeros((), jnp.int32), (y, top, total)
    _, sums = jax.lax.while_loop(lambda carry: carry[0] * size < count, see, start)
    return _joined(sums, seen).astype(q.dtype).reshape(q.shape)


@attend_filled.defjvp
def _(
    plain: Callable[..., jax.Array], given: Sequence[Any], tangents: Sequence[Any]
) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(lambda *x: plain(*x, given[3]), given[:3], tangents[:3])


def _seen_blocks(queries: Queries, per_row: int, block: int) -> jax.Array:
    """Which blocks their rows' queries see some slots of: bool [B, blocks of a row]."""
    at, first = queries.slots, steps(per_row)[None, :] * block
    seen = first <= at
    if queries.window is not None:
        seen &= first + (block - 1) > at - queries.window
    return seen


def _joined(sums: Sums, seen: jax.Array) -> jax.Array:
    """Attention [B, N, H] of blocks' sums, of which some are seen, [B, blocks]."""
    y, top, total = (
        jnp.where(seen[..., None, None], x.reshape(*seen.shape, *x.shape[1:]), none)
        for x, none in zip(sums, (0, LOWEST, 0), strict=True)
    )
    shrink = jnp.exp(top - jnp.max(top, axis=1, keepdims=True))
    return jnp.sum(y * shrink, axis=1) / jnp.sum(total * shrink, axis=1)
