"""Queries: where they stand, what they see, and how products become scores."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jrope.numerics import matmul_precision

LOWEST = np.finfo(np.float32).min  # scores of hidden keys: their weight is exactly 0


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("slots", "segments"),
    meta_fields=("window", "scale", "cap"),
)
@dataclass(frozen=True, kw_only=True)
class Queries:
    """Where queries stand, what they see, and how they score it.

    Args:
      slots: int32 [B, T], or [1, T] where those of all rows are alike.
      segments: int32 [B, T], or None.
      window: as in `attention.attend`, as scale and cap are.
    """

    slots: jax.Array
    segments: jax.Array | None
    window: int | None
    scale: float | None = None
    cap: float | None = None

    def scores(self, q: jax.Array, products: jax.Array) -> jax.Array:
        """Of products of queries [..., H] and keys, float32."""
        scores, scale = self.unscaled(q, products)
        return scores if self.cap is not None else scores * scale

    def unscaled(
        self, q: jax.Array, products: jax.Array
    ) -> tuple[jax.Array, np.float32]:
        """Scores but for a positive factor, and the factor."""
        scale = scale_of(q) if self.scale is None else np.float32(self.scale)
        if self.cap is None:
            return products, scale
        scores = jnp.tanh(products * scale / np.float32(self.cap))
        return scores * np.float32(self.cap), np.float32(1)

    def hidden(self, keys: jax.Array, key_segments: jax.Array | None) -> jax.Array:
        """Which keys, in slots [S] and segments [B, S], they may not see: [B, T, S]."""
        slots, keys = self.slots[:, :, None], keys[None, None, :]
        hidden = keys > slots
        if self.window is not None:
            hidden |= keys <= slots - self.window
        if self.segments is not None and key_segments is not None:
            hidden |= self.segments[:, :, None] != key_segments[:, None, :]
        return hidden


def steps(count: int) -> jax.Array:
    """0, 1, 2, ...: int32 [count]."""
    return jnp.arange(count, dtype=jnp.int32)


def scale_of(q: jax.Array) -> np.float32:
    """What scores are multiplied by, unless a model says otherwise."""
    return np.float32(1 / math.sqrt(q.shape[-1]))


def einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Summed in float32, at the precision of a's dtype, which 8-bit integers b take."""
    b = b.astype(a.dtype) if b.dtype == jnp.int8 else b
    precision = matmul_precision(a.dtype)
    return jnp.einsum(
        equation, a, b, precision=precision, preferred_element_type=jnp.float32
    )


def spread(q: jax.Array, kv_heads: int) -> jax.Array:
    """Queries [B, 1, N, H] as a matrix [B, N, K x H], 0 outside their own key head."""
    batch, _, heads, _ = q.shape
    own = _own(heads, kv_heads)
    return jnp.where(own, jnp.moveaxis(q, 1, 2), 0).reshape(batch, heads, -1)


def own_heads(y: jax.Array, kv_heads: int) -> jax.Array:
    """Of y [B, N, K x H], what belongs to each query's own key head: [B, N, H]."""
    batch, heads, _ = y.shape
    y = jnp.where(_own(heads, kv_heads), y.reshape(batch, heads, kv_heads, -1), 0)
    return jnp.sum(y, axis=2)


def _own(heads: int, kv_heads: int) -> np.ndarray:
    own = np.repeat(np.eye(kv_heads, dtype=bool), heads // kv_heads, axis=0)
    return own[None, :, :, None]  # [1, N, K, 1]
