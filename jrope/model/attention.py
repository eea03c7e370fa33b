"""Grouped-query causal attention: one door, the implementation chosen by shape.

    softmax(q k^T / sqrt(H) + mask) v,   query head n reads key/value head n // (N / K)

Query t of a row stands in slot start + t and sees the slots up to its own, or the last
`window` of these, or those of its own segment.  Scores and softmax are float32; a long
prompt never builds a T x S matrix for all heads.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.numerics import cpu_barrier, matmul_precision

BLOCK = 512  # queries, and keys: the scores of a head's block stay in a CPU's cache
WHOLE = 2**16  # scores a head, up to which they are computed at once
LOWEST = np.finfo(np.float32).min  # scores of hidden keys: their weight is exactly 0
CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array | None = None,
    *,
    window: int | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Causal attention of T new tokens over S slots.

    Args:
      q: [B, T, N, H], rotated.
      k, v: [B, S, K, H]; slots past a row's last query may hold anything finite.
      starts: int32 [B], the slot of each row's first query; None: 0 for all, T = S.
      window: a query sees this many slots up to its own; None: all of them.
      segments: int32 [B, T], without `starts`: a query sees its own segment only.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    plain = window is None and segments is None
    if plain and _cudnn_takes(q) and (starts is None or q.shape[1] == 1):
        return jax.lax.platform_dependent(q, k, v, starts, cuda=_cudnn, default=_xla)
    return _xla(q, k, v, starts, window=window, segments=segments)


def _xla(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    starts: jax.Array | None,
    window: int | None = None,
    segments: jax.Array | None = None,
) -> jax.Array:
    """Plain XLA, for every platform."""
    queries = _Queries(slots=_slots(q, starts), segments=segments, window=window)
    if q.shape[1] == 1:
        return _one_query(q, k, v, queries)
    if q.shape[1] * k.shape[1] <= WHOLE:
        return _whole(q, k, v, queries)
    return _blockwise(q, k, v, queries)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("slots", "segments"),
    meta_fields=("window",),
)
@dataclass(frozen=True, kw_only=True)
class _Queries:
    """Where queries stand, int32 [B, T], and what that lets them see."""

    slots: jax.Array
    segments: jax.Array | None
    window: int | None

    def hidden(self, keys: jax.Array, key_segments: jax.Array | None) -> jax.Array:
        """Which keys, in slots [S] and segments [B, S], they may not see: [B, T, S]."""
        slots, keys = self.slots[:, :, None], keys[None, None, :]
        hidden = keys > slots
        if self.window is not None:
            hidden |= keys <= slots - self.window
        if self.segments is not None and key_segments is not None:
            hidden |= self.segments[:, :, None] != key_segments[:, None, :]
        return hidden


def _cudnn_takes(q: jax.Array) -> bool:
    """Whether cuDNN has such a kernel, and is here: without it, it cannot be traced."""
    head_dim = q.shape[-1]
    fits = head_dim % 8 == 0 and head_dim <= 128 and q.dtype in CUDNN_DTYPES
    return fits and jax.default_backend() == "gpu"


def _cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array | None
) -> jax.Array:
    """cuDNN's flash attention; in decode it reads only the filled slots."""
    attention = partial(jax.nn.dot_product_attention, implementation="cudnn")
    if starts is None:
        return attention(q, k, v, is_causal=True)
    return attention(q, k, v, key_value_seq_lengths=starts + 1)


def _slots(q: jax.Array, starts: jax.Array | None) -> jax.Array:
    """The slot of every query: int32 [B, T]."""
    steps = _steps(q.shape[1])[None, :]
    if starts is None:
        return jnp.broadcast_to(steps, q.shape[:2])
    return starts[:, None] + steps


def _steps(count: int) -> jax.Array:
    return jnp.arange(count, dtype=jnp.int32)


def _scale(q: jax.Array) -> np.float32:
    return np.float32(1 / math.sqrt(q.shape[-1]))


def _whole(q: jax.Array, k: jax.Array, v: jax.Array, queries: _Queries) -> jax.Array:
    """All T x S scores at once: short prompts."""
    batch, tokens, _, head_dim = q.shape
    grouped = q.reshape(batch, tokens, k.shape[2], -1, head_dim)
    scores = _einsum("BTKGH,BSKH->BKGTS", grouped, k) * _scale(q)
    hidden = queries.hidden(_steps(k.shape[1]), queries.segments)
    scores = jnp.where(hidden[:, None, None], -jnp.inf, scores)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = _einsum("BKGTS,BSKH->BTKGH", weights, v)
    return y.astype(q.dtype).reshape(q.shape)


def _one_query(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: _Queries
) -> jax.Array:
    """A decode step, which reads keys and values where they lie.

    The query heads stand in a matrix [N, K x H] that is zero outside their own key
    head: K times the arithmetic of `_whole`, which would transpose all slots first.
    """
    batch, _, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    own = np.repeat(np.eye(kv_heads, dtype=bool), heads // kv_heads, axis=0)
    own = own[None, :, :, None]  # [1, N, K, 1]
    spread = jnp.where(own, jnp.moveaxis(q, 1, 2), 0).reshape(batch, heads, -1)
    k, v = (x.reshape(*x.shape[:2], -1) for x in (k, v))
    k, v = cpu_barrier(k, v)  # else a single row's slots are held in two orders
    scores = _einsum("BNX,BSX->BNS", spread, k) * _scale(q)
    hidden = queries.hidden(_steps(k.shape[1]), queries.segments)
    scores = jnp.where(hidden, -jnp.inf, scores)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = _einsum("BNS,BSX->BNX", weights, v).reshape(batch, heads, kv_heads, head_dim)
    y = jnp.sum(jnp.where(own, y, 0), axis=2)
    return y.astype(q.dtype).reshape(q.shape)


def _blockwise(
    q: jax.Array, k: jax.Array, v: jax.Array, queries: _Queries
) -> jax.Array:
    """Online softmax over blocks of keys, block after block of queries.

    Milakov and Gimelshein 2018 (arXiv:1805.02867); Rabe and Staats 2021
    (arXiv:2112.05682).  Blocks that no query sees are skipped, and the backward pass
    computes a query block's scores anew.  Key/value heads come first and their query
    heads are rows of one matrix: plain matrix products on every backend.
    """
    batch, tokens, heads, head_dim = q.shape
    kv_heads, block = k.shape[2], min(BLOCK, tokens)
    q, key_segments = _pad(q, block), queries.segments
    k, v = (jnp.moveaxis(_pad(x, BLOCK), 2, 1) for x in (k, v))  # [B, K, S, H]
    k = jnp.swapaxes(k, 2, 3)
    if key_segments is not None:
        key_segments = _pad(key_segments, BLOCK)
    # [B, blocks x block, K x G, H] -> [blocks, B, K, G x block, H]
    count = q.shape[1] // block
    blocks = q.reshape(batch, count, block, kv_heads, -1, head_dim)
    blocks = blocks.transpose(1, 0, 3, 4, 2, 5)
    blocks = blocks.reshape(count, batch, kv_heads, -1, head_dim)

    def rows(x: jax.Array) -> jax.Array:  # [B, T] -> [blocks, B, G x block]
        x = _pad(x, block, mode="edge").reshape(batch, count, block)
        return jnp.moveaxis(jnp.tile(x, (1, 1, heads // kv_heads)), 1, 0)

    @jax.checkpoint
    def one_block(
        carry: None, inputs: tuple[jax.Array, _Queries]
    ) -> tuple[None, jax.Array]:
        return carry, _attend_block(inputs[0], k, v, inputs[1], key_segments)

    _, out = jax.lax.scan(one_block, None, (blocks, jax.tree.map(rows, queries)))
    out = out.reshape(count, batch, kv_heads, -1, block, head_dim)
    return out.transpose(1, 0, 4, 2, 3, 5).reshape(q.shape)[:, :tokens]


def _pad(x: jax.Array, block: int, **how: Any) -> jax.Array:
    """Axis 1 up to a multiple of the block; by zeros, which no query sees."""
    widths = [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, **how)


def _attend_block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    queries: _Queries,
    key_segments: jax.Array | None,
) -> jax.Array:
    """Queries of one block over all keys.

    Args:
      q: [B, K, rows, H], the block's queries of every head in the group.
      k, v: [B, K, H, S] and [B, K, S, H].
      queries: where the rows stand, [B, rows].
      key_segments: int32 [B, S], or None.

    Returns:
      [B, K, rows, H] in q's dtype.
    """
    last, first_seen = jnp.max(queries.slots), 0
    if queries.window is not None:
        first_seen = jnp.min(queries.slots) - (queries.window - 1)
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    start = (
        jnp.full(q.shape[:3], LOWEST),  # running maximum
        zeros(q.shape[:3]),  # running sum of exponentials
        zeros(q.shape),  # running weighted values
    )

    def see(
        carry: tuple[jax.Array, jax.Array, jax.Array], first: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, acc = carry
        part = partial(jax.lax.dynamic_slice_in_dim, start_index=first)
        keys = part(k, slice_size=BLOCK, axis=3)
        values = part(v, slice_size=BLOCK, axis=2)
        segments = key_segments
        if segments is not None:
            segments = part(segments, slice_size=BLOCK, axis=1)
        scores = _einsum("BKXH,BKHS->BKXS", q, keys) * _scale(q)
        hidden = queries.hidden(first + _steps(BLOCK), segments)
        scores = jnp.where(hidden[:, None], LOWEST, scores)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        # What a row sums up before its first visible key, `shrink` makes zero there.
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[..., None])
        total = total * shrink + jnp.sum(weights, axis=-1)
        y = _einsum("BKXS,BKSH->BKXH", weights.astype(v.dtype), values)
        acc = acc * shrink[..., None] + y
        return new_top, total, acc

    def step(
        carry: tuple[jax.Array, jax.Array, jax.Array], first: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        seen = (first <= last) & (first + BLOCK > first_seen)
        return jax.lax.cond(seen, see, lambda c, _: c, carry, first), None

    firsts = jnp.arange(0, v.shape[2], BLOCK, dtype=jnp.int32)
    (_, total, acc), _ = jax.lax.scan(step, start, firsts)
    return (acc / total[..., None]).astype(q.dtype)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Summed in float32, at the precision of the inputs' dtype."""
    precision = matmul_precision(a.dtype)
    return jnp.einsum(
        equation, a, b, precision=precision, preferred_element_type=jnp.float32
    )
