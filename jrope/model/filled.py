"""A decode step of several rows on a CPU, which reads the filled slots only.

All rows' blocks of slots that their queries see stand in one list, so that long rows
do not make the short ones longer.  A block gives softmax sums of its own; since those
of a row are put together in the order of its slots, its answer does not depend on the
other rows.

Not for 16-bit floats: XLA's CPU backend would make float32 of all slots before it takes
some of them (jax 0.10).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.model.int8_cache import Keys
from jrope.model.queries import LOWEST, Queries, einsum, own_heads, spread, steps
from jrope.numerics import vary_alike

BLOCK = 32  # slots
BLOCKS = 32  # at a time: their keys stay in a CPU's cache
FEWEST = 128  # slots of a row, below which all of them are read at once


def filled_takes(q: jax.Array, k: Keys, segments: jax.Array | None) -> bool:
    """Whether `attend_filled` is for queries [B, 1, N, H] and keys [B, S, K, H]."""
    if not isinstance(k, jax.Array) or segments is not None:
        return False
    slots = k.shape[1]
    wide = q.dtype == k.dtype == jnp.float32
    return wide and len(q) > 1 and slots >= FEWEST and slots % BLOCK == 0


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend_filled(
    plain: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
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
    kv_heads, per_row = k.shape[2], k.shape[1] // BLOCK
    k, v = (x.reshape(batch * per_row, -1) for x in (k, v))  # a block a row
    listed, count = _seen_blocks(queries, per_row)
    size = min(BLOCKS, batch * per_row)
    listed = jnp.pad(listed, (0, -len(listed) % size), constant_values=len(k))

    def cut(x: jax.Array, blocks: jax.Array) -> jax.Array:
        return x.at[blocks].get(mode="clip").reshape(size, BLOCK, -1)

    def see(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        i, sums = carry
        blocks = jax.lax.dynamic_slice_in_dim(listed, i * size, size)
        rows = jnp.minimum(blocks // per_row, batch - 1)
        at = queries.slots[rows] - (blocks % per_row * BLOCK)[:, None]
        own = replace(queries, slots=at)
        products = einsum("BNX,BSX->BNS", spread(q[rows], kv_heads), cut(k, blocks))
        hidden = own.hidden(steps(BLOCK), None)
        scores = jnp.where(hidden, LOWEST, own.scores(q, products))
        top = jnp.max(scores, axis=-1, keepdims=True)
        weights = jnp.where(hidden, 0, jnp.exp(scores - top))
        y = own_heads(einsum("BNS,BSX->BNX", weights, cut(v, blocks)), kv_heads)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        new = jnp.concatenate([y, total, top], axis=-1)
        return i + 1, sums.at[blocks].set(new, mode="drop")

    none = np.zeros((head_dim + 2,), np.float32)
    none[-1] = LOWEST
    none = vary_alike(jnp.asarray(none), q, k, v, queries.slots)[0]
    sums = jnp.broadcast_to(none, (batch * per_row, heads, head_dim + 2))
    start = jnp.zeros((), jnp.int32), sums
    _, sums = jax.lax.while_loop(lambda carry: carry[0] * size < count, see, start)
    return _joined(sums.reshape(batch, per_row, heads, -1)).reshape(q.shape)


@attend_filled.defjvp
def _(
    plain: Callable[..., jax.Array], given: Sequence[Any], tangents: Sequence[Any]
) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(lambda *x: plain(*x, given[3]), given[:3], tangents[:3])


def _seen_blocks(queries: Queries, per_row: int) -> tuple[jax.Array, jax.Array]:
    """The blocks that their rows' queries see, row by row, and how many these are.

    The list goes on with blocks that are none.
    """
    at, first = queries.slots, steps(per_row)[None, :] * BLOCK
    seen = first <= at  # [B, blocks of a row]
    if queries.window is not None:
        seen &= first + (BLOCK - 1) > at - queries.window
    (listed,) = jnp.nonzero(seen.reshape(-1), size=seen.size, fill_value=seen.size)
    return listed.astype(jnp.int32), jnp.sum(seen, dtype=jnp.int32)


def _joined(sums: jax.Array) -> jax.Array:
    """Attention [B, N, H] of what each block gave, [B, blocks, N, H + 2]."""
    y, total, top = sums[..., :-2], sums[..., -2:-1], sums[..., -1:]
    shrink = jnp.exp(top - jnp.max(top, axis=1, keepdims=True))
    return jnp.sum(y * shrink, axis=1) / jnp.sum(total * shrink, axis=1)
