"""Attention over several queries of a row: block by block, or as a single block.

A query block's heads stand as rows of one matrix under their key/value head: plain
matrix products on every backend.  Exponentials are relative to the largest product so
far, and that difference is scaled: of a product scaled first a compiler may subtract
the largest in one rounding, which leaves it above zero, and large scores overflow.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jrope.model.int8_cache import Keys, by_head, parts
from jrope.model.queries import LOWEST, Queries, einsum, steps
from jrope.numerics import vary_alike

BLOCK = 512  # queries, and keys: their scores are all that a long prompt holds
SCORES = 2**20  # of all rows and heads on a CPU at a time: they stay in its cache
SIZES = 64, 512  # between which a CPU's blocks are, as many as fit

SoftmaxSums: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]
"""Of queries [..., H], float32: the largest score so far, unscaled, the sum of
exponentials relative to it, both [...], and the values weighted by these, [..., H]."""

Way: TypeAlias = Callable[[jax.Array, Keys, Keys, Queries, jax.Array | None], jax.Array]
"""Attention of several queries: q, k and v, where they stand, segments of the keys."""


def on_cpu(q: jax.Array, slots: int, short: bool) -> Way:
    """How a CPU's cache and cores have it best.

    Args:
      q: [B, T, N, H].
      slots: S.
      short: whether all scores are computed at once elsewhere; so they are on a mesh of
        explicit axes, which loops do not take.
    """
    batch, tokens, heads, _ = q.shape
    fit = SCORES // max(batch * heads, 1)
    single = tokens * slots <= max(fit, SIZES[0] ** 2)
    if single or (short and jax.typeof(q).sharding.mesh.explicit_axes):
        return at_once
    # Several blocks, where that makes none too small: the last one is padded.
    size = _size(min(math.isqrt(fit), tokens // 4))
    sizes = size, _size(min(fit // min(size, tokens), slots // 4))
    return partial(blockwise, sizes=sizes, halves=True)


def _size(most: int) -> int:
    return 1 << (int(np.clip(most, *SIZES)).bit_length() - 1)


def at_once(
    q: jax.Array,
    k: Keys,
    v: Keys,
    queries: Queries,
    segments: jax.Array | None,
) -> jax.Array:
    """All T x S scores as one block, with keys and values as they lie: on a CPU.

    XLA's CPU backend computes products of 16-bit arrays that were transposed from
    float32 copies, and an einsum of two more axes transposes them (jax 0.10).
    """
    batch, tokens, heads, head_dim = q.shape
    (k, k_scales), (v, v_scales) = parts(k), parts(v)
    kv_heads = k.shape[2]
    rows = q.reshape(batch, tokens, kv_heads, -1, head_dim)
    rows = jnp.moveaxis(rows, 2, 1).reshape(batch, kv_heads, -1, head_dim)
    products = einsum("BKXH,BSKH->BKXS", rows, k)
    scores = queries.scores(q, by_head(products, k_scales))
    hidden = queries.hidden(steps(k.shape[1]), segments)
    hidden = jnp.repeat(hidden, heads // kv_heads, axis=1)
    scores = jnp.where(hidden[:, None], -jnp.inf, scores)
    weights = by_head(jax.nn.softmax(scores, axis=-1), v_scales)
    y = einsum("BKXS,BSKH->BKXH", weights.astype(q.dtype), v).astype(q.dtype)
    y = jnp.moveaxis(y.reshape(batch, kv_heads, tokens, -1, head_dim), 1, 2)
    return y.reshape(q.shape)


def blockwise(
    q: jax.Array,
    k: Keys,
    v: Keys,
    queries: Queries,
    segments: jax.Array | None,
    sizes: tuple[int, int] | None = None,
    halves: bool = False,
) -> jax.Array:
    """Online softmax over blocks of keys, block after block of queries.

    Milakov and Gimelshein 2018 (arXiv:1805.02867); Rabe and Staats 2021
    (arXiv:2112.05682).  Blocks that no query sees are skipped, and the backward pass
    computes a query block's scores anew.

    Args:
      q, k, v, queries, segments: as in `at_once`.
      sizes: queries and keys in a block; None: `BLOCK` of each.
      halves: whether a single row is shared among a CPU's cores, see `in_blocks`.
    """
    sizes = (BLOCK, BLOCK) if sizes is None else sizes
    keys = in_key_blocks(k, v, steps(k.shape[1]), segments, sizes[1])

    @jax.checkpoint
    def one_block(
        carry: None, block: tuple[jax.Array, Queries]
    ) -> tuple[None, jax.Array]:
        _, total, acc = see_block(*block, keys)
        return carry, (acc / total[..., None]).astype(q.dtype)

    blocks = in_blocks(q, queries, k.shape[2], sizes[0], halves)
    _, out = jax.lax.scan(one_block, None, blocks)
    return out_of_blocks(out, q)


def in_blocks(
    q: jax.Array, queries: Queries, kv_heads: int, block: int, halves: bool = False
) -> tuple[jax.Array, Queries]:
    """Queries [B, T, N, H] in blocks: [blocks, B, K, rows, H], and where rows stand.

    Args:
      q, queries: as in `attention.attend`.
      kv_heads: K.
      block: tokens in each, or all of them.
      halves: XLA's CPU backend shares the outermost axes among cores, of three heads
        two for the first of two cores.  So a block of a single row becomes two rows,
        [blocks, 2, K, rows / 2, H], where K is odd.
    """
    batch, tokens, heads, head_dim = q.shape
    block = min(block, tokens)
    q = pad(q, block)
    count = q.shape[1] // block
    split = 2 if halves and batch == 1 and kv_heads % 2 and block % 2 == 0 else 1
    shape = batch, count, split, block // split
    blocks = q.reshape(*shape, kv_heads, -1, head_dim).transpose(1, 0, 2, 4, 5, 3, 6)
    blocks = blocks.reshape(count, batch * split, kv_heads, -1, head_dim)

    def rows(x: jax.Array) -> jax.Array:  # [B or 1, T] -> [blocks, B or 1, G x block]
        x = pad(x, block, mode="edge").reshape(-1, *shape[1:])
        x = jnp.tile(jnp.moveaxis(x, 1, 0), (1, 1, 1, heads // kv_heads))
        return x.reshape(count, -1, x.shape[3])

    return blocks, jax.tree.map(rows, queries)


def out_of_blocks(out: jax.Array, q: jax.Array) -> jax.Array:
    """What was computed for the blocks of q [B, T, N, H], as q lies."""
    batch, tokens, heads, head_dim = q.shape
    count, rows, kv_heads, _, _ = out.shape
    shape = count, batch, rows // batch, kv_heads, heads // kv_heads, -1, head_dim
    out = out.reshape(shape).transpose(1, 0, 2, 5, 3, 4, 6)
    return out.reshape(batch, -1, heads, head_dim)[:, :tokens]


def pad(x: jax.Array, block: int, **how: Any) -> jax.Array:
    """Axis 1 up to a multiple of the block; by zeros, which no query sees."""
    widths = [(0, 0), (0, -x.shape[1] % block)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, widths, **how)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("k", "v", "slots", "segments", "scales"),
    meta_fields=("block",),
)
@dataclass(frozen=True)
class KeyBlocks:
    """Keys and values, padded to whole blocks.

    Args:
      k, v: [B, K, H, S] and [B, K, S, H].
      slots: int32 [S], ascending.
      segments: int32 [B, S], or None.
      scales: of 8-bit k and v, [B, S, K, 1] each; else (None, None).
      block: slots in each.
    """

    k: jax.Array
    v: jax.Array
    slots: jax.Array
    segments: jax.Array | None
    scales: tuple[jax.Array | None, jax.Array | None]
    block: int


def in_key_blocks(
    k: Keys, v: Keys, slots: jax.Array, segments: jax.Array | None, block: int
) -> KeyBlocks:
    """Keys and values [B, S, K, H] in those slots; what is padded nobody sees."""
    (k, k_scales), (v, v_scales) = parts(k), parts(v)
    scales = jax.tree.map(lambda x: pad(x, block), (k_scales, v_scales))
    k, v = (jnp.moveaxis(pad(x, block), 2, 1) for x in (k, v))  # [B, K, S, H]
    after = (0, -len(slots) % block)
    slots = jnp.pad(slots, after, constant_values=np.iinfo(np.int32).max)
    segments = None if segments is None else pad(segments, block)
    return KeyBlocks(jnp.swapaxes(k, 2, 3), v, slots, segments, scales, block)


def no_sums(q: jax.Array) -> SoftmaxSums:
    """Of a softmax that saw no key, for queries [..., H]."""
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    return jnp.full(q.shape[:-1], LOWEST), zeros(q.shape[:-1]), zeros(q.shape)


def see_block(
    q: jax.Array, queries: Queries, keys: KeyBlocks, sums: SoftmaxSums | None = None
) -> SoftmaxSums:
    """Queries of one block over all keys.

    Args:
      q: [B, K, rows, H], the block's queries of every head in the group.
      queries: where the rows stand, [B, rows].
      keys: of all blocks.
      sums: what the queries have seen already.
    """
    block = keys.block
    near, far = jnp.min(queries.slots), jnp.max(queries.slots)

    def seen(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Whether some query sees keys of the block, and whether each sees them all."""
        # Padding in the last block stands past every slot.
        begin, end = keys.slots[first], keys.slots[first + (block - 1)]
        some, every = begin <= far, end <= near
        if queries.window is not None:
            some &= end > near - queries.window
            every &= begin > far - queries.window
        return some, every if queries.segments is None else jnp.zeros_like(every)

    def see(carry: SoftmaxSums, first: jax.Array) -> SoftmaxSums:
        top, total, acc = carry
        part = partial(_block_of, first=first, size=block, rows=len(q))
        k, v = part(keys.k, axis=3), part(keys.v, axis=2)
        k_scales, v_scales = jax.tree.map(partial(part, axis=1), keys.scales)
        products = einsum("BKXH,BKHS->BKXS", q, k)
        scores, scale = queries.unscaled(q, by_head(products, k_scales))

        def masked(scores: jax.Array) -> jax.Array:
            slots = jax.lax.dynamic_slice_in_dim(keys.slots, first, block)
            segments = keys.segments
            segments = None if segments is None else part(segments, axis=1)
            hidden = queries.hidden(slots, segments)
            return jnp.where(hidden[:, None], LOWEST, scores)

        def where_needed(scores: jax.Array) -> jax.Array:
            return jax.lax.cond(seen(first)[1], lambda x: x, masked, scores)

        ways = {"cpu": where_needed, "default": masked}
        scores = jax.lax.platform_dependent(scores, **ways)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        # What a row sums up before its first visible key, `shrink` makes zero there.
        shrink = jnp.exp((top - new_top) * scale)
        weights = jnp.exp((scores - new_top[..., None]) * scale)
        total = total * shrink + jnp.sum(weights, axis=-1)
        weighted = by_head(weights, v_scales).astype(q.dtype)
        y = einsum("BKXS,BKSH->BKXH", weighted, v)
        acc = acc * shrink[..., None] + y
        return new_top, total, acc

    def step(carry: SoftmaxSums, first: jax.Array) -> tuple[SoftmaxSums, None]:
        return jax.lax.cond(seen(first)[0], see, lambda c, _: c, carry, first), None

    firsts = jnp.arange(0, keys.v.shape[2], block, dtype=jnp.int32)
    start = no_sums(q) if sums is None else sums
    top, total, acc, q, *_ = vary_alike(*start, q, *jax.tree.leaves((queries, keys)))
    return jax.lax.scan(step, (top, total, acc), firsts)[0]


def _block_of(
    x: jax.Array, first: jax.Array, size: int, rows: int, axis: int
) -> jax.Array:
    """The block's part of keys [B, ...], or of the one row that all rows see."""
    x = jax.lax.dynamic_slice_in_dim(x, first, size, axis)
    return x if len(x) == rows else jnp.broadcast_to(x, (rows, *x.shape[1:]))
