"""A decode step's attention on NVIDIA GPUs by kernels of our own, see `decode_parts`.

`rotate_append_attend` does all between two projections: it turns the new token's query
and key, writes key and value where they belong, and attends.  Over a cache of 8-bit
integers, which cuDNN does not read, `attend_int8` attends.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.model.decode_parts import HEADS, LOWEST, Share, run_shares
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
    """A new token of each row beside those before it.

    Args:
      q, k, v: [B, 1, N or K, H], not rotated.
      slots: keys and values [B, S, K, H], donated.
      starts: int32 [B], filled slots; a token past the last slot is not written.
      cos, sin: float32 [B, 1, H / 2], of pairs in halves.
      precision: of the rotation.
      scale: of the scores; None: 1 / sqrt(H).
      interpret: compute it without a GPU.

    Returns:
      [B, 1, N, H] in q's dtype, and the slots with the new token in them.
    """
    batch, _, _, head_dim = q.shape
    # Of neighbours in the one product that `fuse` made, this is that and no copy.
    new = jnp.concatenate([x.reshape(batch, 1, -1) for x in (q, k, v)], axis=2)
    new = new.reshape(batch, -1, head_dim)
    y, (keys, values) = run_shares(
        partial(_step, precision=precision),
        q,
        (starts, new, cos[:, 0], sin[:, 0], *slots),
        slots[0],
        scale,
        aliases={4: 0, 5: 1},
        interpret=interpret,
        name="rotate_append_attend",
    )
    return y, (keys, values)


def _step(
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
    scale: np.float32,
    precision: Precision,
) -> None:
    """One share; the first begins with the new token, and writes it."""
    from jax.experimental import pallas as pl

    share = Share.of(starts, keys, group)
    row, kv_head, lanes = share.row, share.kv_head, share.lanes
    half = keys.shape[3] // 2
    lower, pair = lanes < half, lanes % half
    other = jnp.where(lower, lanes + half, lanes - half)
    c, s = cos[row, pair], jnp.where(lower, sin[row, pair], -sin[row, pair])
    query = share.queries(new, lanes), share.queries(new, other)
    query = _turn(*query, c[None, :], s[None, :], precision)
    kv_heads = pl.num_programs(0)
    at = group * kv_heads + kv_head
    key = _turn(new[row, at, lanes], new[row, at, other], c, s, precision)
    value = new[row, at + kv_heads, lanes]

    wide = key.astype(jnp.float32)[None, :]
    score = jnp.sum(query.astype(jnp.float32) * wide, axis=1)
    first = jnp.broadcast_to(share.number == 0, (HEADS,))
    top = jnp.where(first, score * scale, LOWEST)
    total = jnp.where(first, np.float32(1), np.float32(0))
    acc = total[:, None] * value.astype(jnp.float32)[None, :]
    sums = share.walk(query, (keys, values), (), scale, (top, total, acc))
    share.put(out, sums)

    start = starts[row]

    @pl.when((share.number == 0) & (start < keys.shape[1]))
    def _() -> None:
        keys[row, start, kv_head, lanes] = key
        values[row, start, kv_head, lanes] = value


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
    given = lengths, q[:, 0], *numbers, *scales
    how: Any = {"interpret": interpret, "name": "attend_int8"}
    return run_shares(_read, q, given, numbers[0], scale, **how)[0]


def _read(
    lengths: Any,
    q: Any,
    keys: Any,
    values: Any,
    key_scales: Any,
    value_scales: Any,
    *out: Any,
    group: int,
    scale: np.float32,
) -> None:
    """One share of 8-bit slots."""
    share = Share.of(lengths, keys, group)
    zeros = jnp.zeros((HEADS,), jnp.float32)
    acc = jnp.zeros((HEADS, keys.shape[3]), jnp.float32)
    how = (keys, values), (key_scales, value_scales), scale
    query = share.queries(q, share.lanes)
    share.put(out, share.walk(query, *how, (zeros + LOWEST, zeros, acc)))
