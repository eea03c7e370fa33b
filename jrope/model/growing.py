"""Attention whose frequencies follow each sequence's own length as it grows.

The query at position t sees every key, its own too, rotated for length t + 1:

    softmax(q_t R_t(f(t + 1)) . k_s R_s(f(t + 1)) / sqrt(H)) v_s  over  s <= t

which depends on the tokens up to t and on nothing else: not on how the text was cut
into passes, nor on other rows.  So keys are cached as they are, and a decode step
rotates them for the row's current length.  A full pass does the same for each query
past the trained length; up to it one table serves all, and longrope has only two.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jrope.model.attention import attend
from jrope.model.int8_cache import Keys, linear_in_head
from jrope.numerics import vary_alike
from jrope.rope import LongRope, Rope, rotate, table
from jrope.sharding import stripes
from jrope.sharding.axes import ONE, Axes


def slot_table(
    rope: Rope,
    capacity: int,
    length: jax.Array | int | None = None,
    axes: Axes = ONE,
) -> tuple[jax.Array, jax.Array]:
    """cos and sin that turn the key of every slot.

    Args:
      rope: the embedding.
      capacity: S.
      length: what they are for, [B]; None: the trained length, hence every shorter one.
      axes: where a mesh splits the slots: only of this device's, whose number is S.

    Returns:
      float32 [B, S, R], or [1, S, R] for a single length.
    """
    slots = stripes.slots(capacity, axes)[None, :]
    trained = rope.trained_length or 0
    if length is None or isinstance(length, int):
        return table(rope, slots, length=trained if length is None else length)
    rows = jnp.broadcast_to(slots, (length.shape[0], capacity))
    rows, length = vary_alike(rows, length)
    # The branches keep XLA from taking cos and sin anew in every layer, for each head.
    return jax.lax.cond(
        jnp.any(length > trained),
        lambda: table(rope, rows, length=length),
        lambda: table(rope, rows, length=trained),
    )


def attend_growing(
    q: jax.Array,
    k: Keys,
    v: Keys,
    starts: jax.Array | None = None,
    *,
    cos: jax.Array,
    sin: jax.Array,
    rope: Rope,
    window: int | None = None,
    scale: float | None = None,
    cap: float | None = None,
    at: jax.Array | None = None,
) -> jax.Array:
    """`attend` for q and k as projected; a query past the trained length costs O(S).

    Args:
      q: [B, T, N, H], not rotated.
      k, v: [B, S, K, H], not rotated either, and of a cache maybe 8-bit integers.
      starts: int32 [B], as in `attend`.
      cos, sin: of the slots, [B, S, R]; for a single query that has a start those of
        its own length, else those of the trained length.
      rope: the embedding.
      window, scale, cap: as in `attend`.
      at: int32 [B, T], the slot of every query, instead of `starts`.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    count, slots, trained = q.shape[1], k.shape[1], rope.trained_length or 0
    own = {"rope": rope, "how": partial(attend, window=window, scale=scale, cap=cap)}
    see = partial(_see, tables=(cos[:, :slots], sin[:, :slots]), **own)
    late = partial(_late, **own)
    single = count == 1 and starts is not None
    if starts is not None:
        at = starts[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
    if at is not None and (single or slots <= trained):
        return see(q, k, v, at)
    if at is None:
        first = jax.tree.map(lambda x: x[:, :trained], (q, k, v))
        y = see(*first, None)
        if count <= trained:
            return y
        at = jnp.arange(trained, count, dtype=jnp.int32)[None, :]
        at = jnp.broadcast_to(at, (q.shape[0], count - trained))
        return jnp.concatenate([y, late(q[:, trained:], k, v, at)], axis=1)
    past = at >= trained
    return jax.lax.cond(
        jnp.any(past),
        lambda: jnp.where(
            past[:, :, None, None],
            late(q, k, v, at),
            see(q, k, v, at),
        ),
        lambda: see(q, k, v, at),
    )


def _see(
    q: jax.Array,
    k: Keys,
    v: Keys,
    at: jax.Array | None,
    tables: tuple[jax.Array, jax.Array],
    *,
    rope: Rope,
    how: Callable[..., jax.Array],
) -> jax.Array:
    """One table for all queries, and for the keys that they see."""
    turn = partial(rotate, layout=rope.layout, precision=rope.precision)
    cos, sin = (x[:, : k.shape[1]] for x in tables)
    k = linear_in_head(partial(turn, cos=cos, sin=sin), k, q.dtype)
    if at is None:
        return how(turn(q, *(x[:, : q.shape[1]] for x in tables)), k, v)
    rows = (jnp.broadcast_to(x, (q.shape[0], *x.shape[1:])) for x in tables)
    of = partial(jnp.take_along_axis, indices=at[..., None], axis=1, mode="clip")
    q = turn(q, *map(of, rows))
    if q.shape[1] == 1:
        return how(q, k, v, at[:, 0])
    return how(q, k, v, slots=at)


def _late(
    q: jax.Array,
    k: Keys,
    v: Keys,
    at: jax.Array,
    *,
    rope: Rope,
    how: Callable[..., jax.Array],
) -> jax.Array:
    """Queries past the trained length: one after the other, each with its own table."""
    slots, see = k.shape[1], partial(_see, rope=rope, how=how)
    if isinstance(rope.scaling, LongRope):  # the second table and the last
        tables = slot_table(rope, slots, rope.scaling.original_length + 1)
        return see(q, k, v, at, tables)

    @jax.checkpoint  # else the backward pass would keep the keys of every query
    def one(carry: None, query: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        x, at = query
        tables = slot_table(rope, slots, at + 1)
        return carry, see(x[:, None], k, v, at[:, None], tables)[:, 0]

    queries = jnp.moveaxis(q, 1, 0), at.T
    return jnp.moveaxis(jax.lax.scan(one, None, queries)[1], 0, 1)
