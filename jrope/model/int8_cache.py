"""Keys and values as integers of 8 bits, with a scale for each token and head.

Of a token's key or value x [H] in a head they are, in float32, halves to even,

    s = max |x| / 127 in bfloat16,  n[h] = round(x[h] / s),

from -127 to 127; s n is x to within s / 2.  Since n goes by the scale as it is held,
bfloat16 loses next to nothing beside float32, for 8 + 16 / H bits an element.

Queries see the integers: a scale is a factor of all its head's products, so scores are
(q . n) s, and the sum of w (s n) over slots is that of (w s) n.  Attention that has
several new tokens and no cache sees these as they were computed; all others see what
the cache holds.

Source: absmax quantisation, a scale for each vector, Dettmers et al. 2022
(arXiv:2208.07339, section 2.1); of a cache, there in 4 bits, Sheng et al. 2023
(arXiv:2303.06865).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jrope.errors import JropeError
from jrope.model.bits import Bits
from jrope.numerics import absmax, rounded

CacheDtype: TypeAlias = Literal["int8"]
"""What `cache_dtype` may be besides None, which is what the model computes in."""

LIMIT = 127
HELD = jnp.bfloat16  # the dtype of scales


@final
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaled:
    """Slots whose numbers have a common factor in each head.

    Args:
      numbers: int8 [B, S, K, H].
      scales: bfloat16 [B, S, K, 1].
    """

    numbers: jax.Array
    scales: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the numbers."""
        return self.numbers.shape

    @property
    def dtype(self) -> Any:
        """That of the numbers."""
        return self.numbers.dtype

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return self.numbers.size


Keys: TypeAlias = jax.Array | Scaled | Bits
"""A layer's keys, or values: [B, S, K, H]."""


def to_int8(x: jax.Array) -> Scaled:
    """The last axis as integers; NaN, by its scale, where a number is not finite."""
    most = absmax(x).astype(jnp.float32)[..., None]
    scales = rounded(most * np.float32(1 / LIMIT), HELD)
    scales = jnp.where(most < LIMIT * jnp.finfo(jnp.float32).tiny, 0, scales)
    steps = jnp.where(scales == 0, 0, 1 / scales)
    numbers = jnp.round(x.astype(jnp.float32) * steps)
    return Scaled(numbers.astype(jnp.int8), scales.astype(HELD))


def empty_int8(shape: tuple[int, ...]) -> Scaled:
    """Zeros."""
    return Scaled(jnp.zeros(shape, jnp.int8), jnp.zeros((*shape[:-1], 1), HELD))


def head_bytes(head_dim: int, itemsize: int, cache_dtype: CacheDtype | None) -> int:
    """Bytes of a key in one head."""
    if cache_dtype is None:
        return head_dim * itemsize
    return head_dim + jnp.dtype(HELD).itemsize


def check_cache_dtype(cache_dtype: Any, given: bool = False) -> None:
    """Raise a JropeError for another dtype than a cache may have, or beside a cache."""
    if given and cache_dtype is not None:
        raise JropeError(
            "cache_dtype: the given cache already has one; give only one of them"
        )
    known = (None, *get_args(CacheDtype))
    if cache_dtype not in known:
        raise JropeError(
            f"cache_dtype: got {cache_dtype!r}, want 'int8' or None, which is the "
            "dtype that the model computes in"
        )


def parts(x: Keys) -> tuple[jax.Array, jax.Array | None]:
    """Numbers [B, S, K, H] and, where they have some, scales [B, S, K, 1]."""
    if isinstance(x, Bits):
        return x.floats, None
    return (x.numbers, x.scales) if isinstance(x, Scaled) else (x, None)


def by_head(x: jax.Array, scales: jax.Array | None) -> jax.Array:
    """x [B, K ..., S] times the scales [B, S, K, 1] of its heads and slots."""
    if scales is None:
        return x
    batch, slots, kv_heads, _ = scales.shape
    factors = jnp.moveaxis(scales, 1, -1).astype(x.dtype)  # [B, K, 1, S]
    return (x.reshape(batch, kv_heads, -1, slots) * factors).reshape(x.shape)


def linear_in_head(
    function: Callable[[jax.Array], jax.Array], x: Keys, dtype: Any
) -> Keys:
    """A linear function of each head's numbers, computed in `dtype`, of x."""
    if isinstance(x, Scaled):
        return Scaled(function(x.numbers.astype(dtype)), x.scales)
    return function(x.floats if isinstance(x, Bits) else x)
