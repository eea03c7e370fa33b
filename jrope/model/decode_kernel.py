"""A decode step's attention on NVIDIA GPUs by kernels of our own, see `decode_parts`.

`rotate_append_attend` does all between two projections: it turns queries and keys of a
new token or of a few, writes keys and values where they belong, and attends.  Over a
cache of 8-bit integers, which cuDNN does not read, `attend_int8` attends.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.model.decode_parts import LOWEST, Share, Sums, rows_of, run_shares
from jrope.rope.embedding import Precision
from jrope.rope.rotation import turned


def rotate_append_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: tuple[jax.Array, jax.Array],
    starts: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    precision: Precision,
    scale: float | None,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """New tokens of each row beside those before them, which they see, and each other.

    Args:
      q, k, v: [B, T, N or K, H], not rotated; T up to 16.
      slots: keys and values [B, S, K, H], donated.
      starts: int32 [B], filled slots; tokens past the last slot are not written.
      cos, sin: float32 [B, T, H / 2], of pairs in halves.
      precision: of the rotation.
      scale: of the scores; None: 1 / sqrt(H).
      interpret: compute it without a GPU.

    Returns:
      [B, T, N, H] in q's dtype, and the slots with the new tokens in them.
    """
    batch, tokens, _, head_dim = q.shape
    # Of neighbours in the one product that `fuse` made, this is that and no copy.
    new = jnp.concatenate([x.reshape(batch, tokens, -1) for x in (q, k, v)], axis=2)
    new = new.reshape(batch, tokens, -1, head_dim)
    y, (keys, values) = run_shares(
        partial(_step, precision=precision),
        q,
        (starts, new, cos, sin, *slots),
        slots[0],
        scale,
        aliases={4: 0, 5: 1},
        interpret=interpret,
        name="rotate_append_attend",
    )
    return y, (keys, values)


def _step(
    order: Any,
    starts: Any,
    new: Any,
    cos: Any,
    sin: Any,
    _keys: Any,
    _values: Any,
    keys: Any,
    values: Any,
    *out: Any,
    group: int,
    tokens: int,
    scale: np.float32,
    precision: Precision,
) -> None:
    """One share; the first begins with the new tokens, and writes them."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    share = Share.of(order, starts, keys, group, tokens)
    row, kv_head, lanes = share.row, share.kv_head, share.lanes
    at = jnp.arange(1 if tokens == 1 else rows_of(tokens), dtype=jnp.int32)
    kv_heads, is_new = pl.num_programs(0), at < tokens
    turn = partial(_turned, row=row, lanes=lanes, cos=cos, sin=sin, precision=precision)

    def load(head: Any, lanes: Any) -> jax.Array:
        place = new.at[row, at[:, None], head, lanes[None, :]]
        return triton.load(place, mask=is_new[:, None], other=0)

    query = turn(partial(share.queries, new), share.tokens, share.own)
    head = group * kv_heads + kv_head
    key, value = turn(partial(load, head), at, is_new), load(head + kv_heads, lanes)
    first = share.number == 0
    seen = (at[None, :] <= share.tokens[:, None]) & is_new[None, :] & first
    sums = _among(query, key, value, seen, scale)
    share.put(out, share.walk(query, (keys, values), (), scale, sums))

    @pl.when(first)
    def _() -> None:
        slot = starts[row] + at
        mask = (is_new & (slot < keys.shape[1]))[:, None]
        for slots, x in ((keys, key), (values, value)):
            place = slots.at[row, slot[:, None], kv_head, lanes[None, :]]
            triton.store(place, x, mask=mask)


def _turned(
    load: Callable[[Any], jax.Array],
    token: Any,
    own: Any,
    *,
    row: Any,
    lanes: Any,
    cos: Any,
    sin: Any,
    precision: Precision,
) -> jax.Array:
    """Heads of some tokens, rotated: what `load` gives of their channels."""
    from jax.experimental.pallas import triton

    half = lanes.shape[0] // 2
    lower = lanes < half
    place, mask = (row, token[:, None], (lanes % half)[None, :]), own[:, None]
    c, s = (triton.load(x.at[place], mask=mask, other=0) for x in (cos, sin))
    s = jnp.where(lower[None, :], s, -s)
    other = jnp.where(lower, lanes + half, lanes - half)
    return _turn(load(lanes), load(other), c, s, precision)


def _among(
    query: jax.Array, key: jax.Array, value: jax.Array, seen: Any, scale: np.float32
) -> Sums:
    """The sums of queries [R, H] over the new tokens [n, H] that they see [R, n]."""
    from jax.experimental.pallas import triton

    one = len(key) == 1  # by sums, which take less time than a tile
    if one:
        products = query.astype(jnp.float32) * key.astype(jnp.float32)
        scores = jnp.sum(products, axis=1)[:, None] * scale
    else:
        scores = triton.dot(query, key, trans_b=True) * scale
    top = jnp.max(jnp.where(seen, scores, LOWEST), axis=1)
    weights = jnp.where(seen, jnp.exp2(scores - top[:, None]), 0)
    if one:
        acc = weights * value.astype(jnp.float32)
    else:
        acc = triton.dot(weights.astype(value.dtype), value)
    return top, jnp.sum(weights, axis=1), acc


def _turn(
    x: jax.Array, other: jax.Array, cos: jax.Array, sin: jax.Array, precision: Precision
) -> jax.Array:
    """Channels rotated, beside the other ones of their pairs; sin has its sign."""

    def short(y: jax.Array) -> jax.Array:  # Triton keeps the casts
        return y.astype(x.dtype).astype(jnp.float32)

    wide = x.astype(jnp.float32), other.astype(jnp.float32)
    y, _ = turned(*wide, cos, sin, short if precision == "parity" else None)
    return y.astype(x.dtype)


def attend_int8(
    q: jax.Array,
    numbers: tuple[jax.Array, jax.Array],
    scales: tuple[jax.Array, jax.Array],
    lengths: jax.Array,
    *,
    scale: float | None,
    interpret: bool = False,
) -> jax.Array:
    """One query of each row over its filled slots.

    Args:
      q: [B, 1, N, H], rotated.
      numbers: keys and values int8 [B, S, K, H].
      scales: of these, [B, S, K, 1].
      lengths: int32 [B], filled slots, 1 or more.
      scale: of the scores; None: 1 / sqrt(H).
      interpret: compute it without a GPU.

    Returns:
      [B, 1, N, H] in q's dtype.
    """
    given = lengths, q, *numbers, *scales
    how: Any = {"interpret": interpret, "name": "attend_int8"}
    return run_shares(_read, q, given, numbers[0], scale, **how)[0]


def _read(
    order: Any,
    lengths: Any,
    q: Any,
    keys: Any,
    values: Any,
    key_scales: Any,
    value_scales: Any,
    *out: Any,
    group: int,
    tokens: int,
    scale: np.float32,
) -> None:
    """One share of 8-bit slots."""
    share = Share.of(order, lengths, keys, group, tokens)
    zeros = jnp.zeros((rows_of(group),), jnp.float32)
    acc = jnp.zeros((rows_of(group), keys.shape[3]), jnp.float32)
    how = (keys, values), (key_scales, value_scales), scale
    query = share.queries(q, share.lanes)
    share.put(out, share.walk(query, *how, (zeros + LOWEST, zeros, acc)))
