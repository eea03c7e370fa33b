"""Grouped-query causal attention: one door, the implementation chosen by shape.

    softmax(q k^T / sqrt(H) + mask) v,   query head n reads key/value head n // (N / K)

Query t of a row stands in slot start + t and sees the slots up to its own, or the last
`window` of these, or those of its own segment.  Scores and softmax are float32; a long
prompt never builds a T x S matrix for all heads.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jrope.model import decode_kernel
from jrope.model.blockwise import blockwise, on_cpu
from jrope.model.decode_parts import kernel_takes, on_cuda
from jrope.model.filled import attend_filled, filled_takes
from jrope.model.int8_cache import Keys, Scaled, by_head, parts
from jrope.model.kernels import cudnn, cudnn_takes, flash, flash_takes
from jrope.model.queries import (
    LOWEST,
    Queries,
    einsum,
    own_heads,
    spread,
    steps,
)
from jrope.numerics import cpu_barrier
from jrope.sharding import stripes
from jrope.sharding.axes import ONE, Axes

WHOLE = 2**16  # scores a head, up to which they are computed at once


def attend(
    q: jax.Array,
    k: Keys,
    v: Keys,
    starts: jax.Array | None = None,
    *,
    window: int | None = None,
    segments: jax.Array | None = None,
    slots: jax.Array | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Causal attention of T new tokens over S slots.

    Args:
      q: [B, T, N, H], rotated.
      k, v: [B, S, K, H], arrays or 8-bit integers; slots past a row's last query may
        hold anything finite.
      starts: int32 [B], the slot of each row's first query; None: 0 for all, T = S.
      window: a query sees this many slots up to its own, as many as there are or more
        being all of them; None: all of them.
      segments: int32 [B, S], without `starts`: a query sees its own segment only.
      slots: int32 [B, T], the slot of every query, where they do not follow each other.
      scale: of the scores; None: 1 / sqrt(H).
      cap: scores become cap * tanh(score / cap); None: they stay.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    if window is not None and window >= k.shape[1]:
        window = None
    plain = segments is None and slots is None and cap is None
    how = {"scale": scale, "window": window}
    bare = plain and window is None and scale is None and starts is None
    if bare and flash_takes(q):
        return jax.lax.platform_dependent(q, k, v, tpu=flash, default=_causal)
    last = q.shape[1] == 1 and window is None
    if isinstance(k, Scaled) and isinstance(v, Scaled):
        if plain and last and k.numbers.dtype == jnp.int8 and starts is not None:
            return attend_int8(q, k, v, starts + 1, scale)
        return _xla(q, k, v, starts, window, segments, slots, scale, cap)
    plain &= isinstance(k, jax.Array) and (starts is None or last)
    if plain and cudnn_takes(q):
        ways = {"cuda": partial(cudnn, **how), "default": partial(_xla, **how)}
        return jax.lax.platform_dependent(q, k, v, starts, **ways)
    return _xla(q, k, v, starts, window, segments, slots, scale, cap)


def attend_int8(
    q: jax.Array, k: Scaled, v: Scaled, lengths: jax.Array, scale: float | None
) -> jax.Array:
    """A decode step over 8-bit slots, which cuDNN does not read.

    Args:
      q: [B, 1, N, H], rotated.
      k, v: integers [B, S, K, H] and their scales [B, S, K, 1].
      lengths: int32 [B], filled slots, the query's own among them.
      scale: of the scores; None: 1 / sqrt(H).
    """
    plain = partial(_xla, scale=scale)
    if not kernel_takes(q, k.shape[2], 1):
        return plain(q, k, v, lengths - 1)

    def kernel(q: jax.Array, k: Scaled, v: Scaled, starts: jax.Array) -> jax.Array:
        numbers, scales = (k.numbers, v.numbers), (k.scales, v.scales)
        return decode_kernel.attend_int8(q, numbers, scales, starts + 1, scale=scale)

    return on_cuda(kernel, plain)(q, k, v, lengths - 1)


def _xla(
    q: jax.Array,
    k: Keys,
    v: Keys,
    starts: jax.Array | None,
    window: int | None = None,
    segments: jax.Array | None = None,
    slots: jax.Array | None = None,
    scale: float | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Plain XLA, for every platform."""
    own = segments
    if slots is None:
        slots = _slots(q, starts)
    elif segments is not None:
        own = jnp.take_along_axis(segments, slots, axis=1, mode="clip")
    queries = Queries(slots=slots, segments=own, window=window, scale=scale, cap=cap)
    if q.shape[1] == 1:
        given = q, k, v, queries, segments
        how: dict[str, Any] = {"tpu": _one_query_on_tpu, "default": one_query}
        if filled_takes(q, k, segments):
            how["cpu"] = partial(attend_filled, one_query)
        return jax.lax.platform_dependent(*given, **how)
    short = q.shape[1] * k.shape[1] <= WHOLE
    given = q, k, v, queries, segments
    cpu = on_cpu(q, k.shape[1], short)
    how = {"cpu": cpu, "default": _whole if short else blockwise}
    return jax.lax.platform_dependent(*given, **how)


def _causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return _xla(q, k, v, None)


def _slots(q: jax.Array, starts: jax.Array | None) -> jax.Array:
    """The slot of every query: int32 [B, T], or [1, T] where rows are alike."""
    at = steps(q.shape[1])[None, :]
    return at if starts is None else starts[:, None] + at


def _whole(
    q: jax.Array,
    k: Keys,
    v: Keys,
    queries: Queries,
    segments: jax.Array | None,
) -> jax.Array:
    """All T x S scores at once: short prompts."""
    batch, tokens, _, head_dim = q.shape
    (k, k_scales), (v, v_scales) = parts(k), parts(v)
    grouped = q.reshape(batch, tokens, k.shape[2], -1, head_dim)
    products = einsum("BTKGH,BSKH->BKGTS", grouped, k)
    scores = queries.scores(q, by_head(products, k_scales))
    hidden = queries.hidden(steps(k.shape[1]), segments)
    scores = jnp.where(hidden[:, None, None], -jnp.inf, scores)
    weights = by_head(jax.nn.softmax(scores, axis=-1), v_scales)
    y = einsum("BKGTS,BSKH->BTKGH", weights.astype(q.dtype), v)
    return y.astype(q.dtype).reshape(q.shape)


def one_query(
    q: jax.Array,
    k: Keys,
    v: Keys,
    queries: Queries,
    segments: jax.Array | None = None,
    axes: Axes = ONE,
) -> jax.Array:
    """A decode step, which reads keys and values where they lie.

    The query heads stand in a matrix [N, K x H] that is zero outside their own key
    head: K times the arithmetic of `_whole`, which would transpose all slots first.

    Where a mesh splits the slots each device sees its own, and [B, N] and [B, N, H + 1]
    go between them, however many slots there are.
    """
    kv_heads = k.shape[2]
    (k, k_scales), (v, v_scales) = parts(k), parts(v)
    k, v = (x.reshape(*x.shape[:2], -1) for x in (k, v))
    k, v = cpu_barrier(k, v)  # else a single row's slots are held in two orders
    products = einsum("BNX,BSX->BNS", spread(q, kv_heads), k)
    scores = queries.scores(q, by_head(products, k_scales))
    hidden = queries.hidden(stripes.slots(k.shape[1], axes), segments)
    if axes.context:
        scores = jnp.where(hidden, LOWEST, scores)
        top = jax.lax.pmax(jnp.max(scores, axis=-1, keepdims=True), axes.context)
        weights = jnp.exp(scores - top)
    else:
        weights = jax.nn.softmax(jnp.where(hidden, -jnp.inf, scores), axis=-1)
    seen = by_head(weights, v_scales).astype(q.dtype)
    y = own_heads(einsum("BNS,BSX->BNX", seen, v), kv_heads)
    if axes.context:
        sums = y, jnp.sum(weights, axis=-1, keepdims=True)
        y = jax.lax.psum(jnp.concatenate(sums, axis=-1), axes.context)
        y = y[..., :-1] / y[..., -1:]
    return y.astype(q.dtype).reshape(q.shape)


def _one_query_on_tpu(
    q: jax.Array,
    k: Keys,
    v: Keys,
    queries: Queries,
    segments: jax.Array | None,
) -> jax.Array:
    """`one_query` as a TPU's tiles have it, of the last two axes, K and H.

    Slots and heads are one axis, [S x K, H], the same bytes in the same order; [S, K x
    H] would be a copy of them.  A query head's weights are zero outside its own key
    head: K times the softmax, for an eighth of the time that reading takes (N = 32).
    """
    batch, _, heads, head_dim = q.shape
    slots, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    (k, k_scales), (v, v_scales) = parts(k), parts(v)
    k, v = (x.reshape(batch, slots * kv_heads, head_dim) for x in (k, v))
    k_scales, v_scales = jax.tree.map(
        lambda x: x.reshape(batch, slots * kv_heads, 1, 1), (k_scales, v_scales)
    )
    # Of one head XLA would make sums, which want all slots in another order.
    rows = jnp.pad(q[:, 0], ((0, 0), (0, 7 if heads == 1 else 0), (0, 0)))
    products = einsum("BNH,BXH->BNX", rows, k)
    scores = queries.scores(q, by_head(products, k_scales))
    at, own = steps(slots * kv_heads), steps(rows.shape[1]) // group
    hidden = queries.hidden(at // kv_heads, None)
    if kv_heads > 1:
        hidden |= ((at % kv_heads)[None, :] != own[:, None])[None]
    scores = jnp.where(hidden, -jnp.inf, scores)
    weights = by_head(jax.nn.softmax(scores, axis=-1), v_scales)
    y = einsum("BNX,BXH->BNH", weights.astype(q.dtype), v)[:, :heads]
    return y.astype(q.dtype).reshape(q.shape)
