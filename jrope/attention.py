"""Grouped-query causal attention: one door, the implementation chosen by shape.

    softmax(q k^T / sqrt(H) + mask) v,   query head n reads key/value head n // (N / K)

Query t of a row stands in slot start + t and sees the slots up to its own.  Scores and
softmax are float32; a long prompt never builds a T x S matrix for all heads.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

QUERY_BLOCK = 512
KEY_BLOCK = 1024
CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, starts: jax.Array | None = None
) -> jax.Array:
    """Causal attention of T new tokens over S slots.

    Args:
      q: [B, T, N, H], rotated.
      k, v: [B, S, K, H]; slots past a row's last query may hold anything finite.
      starts: int32 [B], the slot of each row's first query; None: 0 for all, T = S.

    Returns:
      [B, T, N, H] in q's dtype.
    """
    if _cudnn_takes(q) and (starts is None or q.shape[1] == 1):
        return _cudnn(q, k, v, starts)
    if (q.shape[1] <= QUERY_BLOCK and k.shape[1] <= 4 * KEY_BLOCK) or q.shape[1] == 1:
        return _whole(q, k, v, _slots(q, starts))
    return _blockwise(q, k, v, _slots(q, starts))


def matmul_precision(dtype: jnp.dtype) -> jax.lax.Precision:
    """float32 means float32 on every device: no TF32, no bfloat16 passes."""
    wide = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT


def _cudnn_takes(q: jax.Array) -> bool:
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
    steps = jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
    if starts is None:
        return jnp.broadcast_to(steps, q.shape[:2])
    return starts[:, None] + steps


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [B, T, K, G, H], k [B, S, K, H] -> float32 [B, K, G, T, S], scaled."""
    dot = partial(jnp.einsum, precision=matmul_precision(q.dtype))
    scores = dot("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    return scores * np.float32(1 / math.sqrt(q.shape[-1]))


def _weigh(weights: jax.Array, v: jax.Array) -> jax.Array:
    """weights float32 [B, K, G, T, S], v [B, S, K, H] -> float32 [B, T, K, G, H]."""
    dot = partial(jnp.einsum, precision=matmul_precision(v.dtype))
    weights = weights.astype(v.dtype)
    return dot("BKGTS,BSKH->BTKGH", weights, v, preferred_element_type=jnp.float32)


def _hidden(slots: jax.Array, first_key: int | jax.Array, keys: int) -> jax.Array:
    """Which keys a query may not see: bool [B, 1, 1, T, S]."""
    key_slots = first_key + jnp.arange(keys, dtype=jnp.int32)
    return (key_slots[None, None, :] > slots[:, :, None])[:, None, None]


def _split_groups(q: jax.Array, k: jax.Array) -> jax.Array:
    batch, tokens, heads, head_dim = q.shape
    return q.reshape(batch, tokens, k.shape[2], heads // k.shape[2], head_dim)


def _whole(q: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> jax.Array:
    """All T x S scores at once: short prompts, decode steps."""
    scores = _scores(_split_groups(q, k), k)
    scores = jnp.where(_hidden(slots, 0, k.shape[1]), -jnp.inf, scores)
    weights = jax.nn.softmax(scores, axis=-1)
    return _weigh(weights, v).astype(q.dtype).reshape(q.shape)


def _blockwise(q: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array) -> jax.Array:
    """Online softmax over blocks of keys, block after block of queries.

    Milakov and Gimelshein 2018 (arXiv:1805.02867); Rabe and Staats 2021
    (arXiv:2112.05682).  Blocks that lie in every query's future are skipped, and the
    backward pass computes a query block's scores anew.
    """
    batch, tokens, heads, head_dim = q.shape
    block = min(QUERY_BLOCK, tokens)
    pad = -tokens % block
    q = jnp.pad(_split_groups(q, k), ((0, 0), (0, pad), (0, 0), (0, 0), (0, 0)))
    slots = jnp.pad(slots, ((0, 0), (0, pad)), mode="edge")
    k, v = (_pad_keys(x) for x in (k, v))

    @jax.checkpoint
    def one_block(
        carry: None, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[None, jax.Array]:
        queries, query_slots = inputs
        return carry, _attend_block(queries, k, v, query_slots)

    blocks = (_blocks(q, block), _blocks(slots, block))
    _, out = jax.lax.scan(one_block, None, blocks)
    out = jnp.moveaxis(out, 0, 1).reshape(batch, tokens + pad, heads, head_dim)
    return out[:, :tokens]


def _pad_keys(x: jax.Array) -> jax.Array:
    """Slots up to a multiple of the key block; zeros, which no query sees."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % KEY_BLOCK), (0, 0), (0, 0)))


def _blocks(x: jax.Array, block: int) -> jax.Array:
    """[B, T, ...] -> [T / block, B, block, ...]."""
    x = x.reshape(x.shape[0], x.shape[1] // block, block, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _attend_block(
    q: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array
) -> jax.Array:
    """q [B, block, K, G, H] over all keys -> [B, block, K, G, H] in q's dtype."""
    last = jnp.max(slots)
    batch, block, kv_heads, group, head_dim = q.shape
    zeros = partial(jnp.zeros, dtype=jnp.float32)
    rows = (batch, kv_heads, group, block)
    start = (
        jnp.full(rows, -jnp.inf, jnp.float32),  # running maximum
        zeros(rows),  # running sum of exponentials
        zeros((batch, block, kv_heads, group, head_dim)),  # running weighted values
    )

    def see(
        carry: tuple[jax.Array, jax.Array, jax.Array], first: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        top, total, acc = carry
        keys, values = (
            jax.lax.dynamic_slice_in_dim(x, first, KEY_BLOCK, axis=1) for x in (k, v)
        )
        hidden = _hidden(slots, first, KEY_BLOCK)
        scores = jnp.where(hidden, -jnp.inf, _scores(q, keys))
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        # Block 0 holds a visible key for every query, so new_top is never -inf.
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(scores - new_top[..., None])
        total = total * shrink + jnp.sum(weights, axis=-1)
        acc = acc * _to_btkg(shrink)[..., None] + _weigh(weights, values)
        return new_top, total, acc

    def step(
        carry: tuple[jax.Array, jax.Array, jax.Array], first: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
        return jax.lax.cond(first <= last, see, lambda c, _: c, carry, first), None

    firsts = jnp.arange(0, k.shape[1], KEY_BLOCK, dtype=jnp.int32)
    (_, total, acc), _ = jax.lax.scan(step, start, firsts)
    return (acc / _to_btkg(total)[..., None]).astype(q.dtype)


def _to_btkg(x: jax.Array) -> jax.Array:
    """[B, K, G, T] -> [B, T, K, G]."""
    return jnp.moveaxis(x, 3, 1)
