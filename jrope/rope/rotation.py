"""The rotation of queries and keys, and the two orders that channel pairs come in."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jrope.errors import check
from jrope.numerics import rounded
from jrope.rope.embedding import Layout, Precision

AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)


def rotate(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    layout: Layout = "half",
    precision: Precision = "parity",
) -> jax.Array:
    """Turn each pair: (a, b) -> (a cos - b sin, b cos + a sin).

    Channels past 2 R pass through.  "parity" casts cos and sin to x's dtype and rounds
    each product and sum to it, as transformers does; "accurate" computes in float32 and
    casts once, as Meta's code does.  In float32 the two are the same.

    Args:
      x: [..., T, heads, H].
      cos, sin: float32 [..., T, R].
      layout: which channels make a pair; see `Rope`.
      precision: how the result is rounded.

    Returns:
      x rotated, same shape and dtype.
    """
    pairs = cos.shape[-1]
    cos, sin = cos[..., None, :], sin[..., None, :]
    wide = x[..., : 2 * pairs].astype(jnp.float32)
    if layout == "half":
        a, b = wide[..., :pairs], wide[..., pairs:]
    else:
        a, b = wide[..., 0::2], wide[..., 1::2]
    short = partial(rounded, dtype=x.dtype) if precision == "parity" else None
    pair = turned(a, b, cos, sin, short)
    if layout == "half":
        y = jnp.concatenate(pair, axis=-1)
    else:
        y = jnp.stack(pair, axis=-1).reshape(wide.shape)
    y = y.astype(x.dtype)
    whole = 2 * pairs == x.shape[-1]
    return y if whole else jnp.concatenate([y, x[..., 2 * pairs :]], axis=-1)


def turned(
    a: jax.Array,
    b: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    short: Callable[[jax.Array], jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
    """The two channels of pairs turned, float32; `short` rounds what sums are of."""
    if short is None:
        return a * cos - b * sin, b * cos + a * sin
    cos, sin = short(cos), short(sin)
    return short(a * cos) - short(b * sin), short(b * cos) + short(a * sin)


def interleaved_to_half(
    x: AnyArray, heads: int = 1, *, axis: int = 0, rotary_dim: int | None = None
) -> AnyArray:
    """Reorder channels so that pairs (2r, 2r + 1) become pairs (r, r + R).

    For q_proj and k_proj (k: `heads` is num_key_value_heads), weights [heads * H, D] or
    biases [heads * H]; never v_proj or o_proj.  For activations [..., H]: axis=-1.

    Args:
      x: array whose `axis` holds heads * H channels.
      heads: heads along that axis.
      axis: the channel axis.
      rotary_dim: channels per head that are rotated; the rest stay.  None: all.

    >>> interleaved_to_half(np.arange(8), heads=2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return _permute(x, heads, axis, rotary_dim, inverse=False)


def half_to_interleaved(
    x: AnyArray, heads: int = 1, *, axis: int = 0, rotary_dim: int | None = None
) -> AnyArray:
    """Undo `interleaved_to_half`; same arguments."""
    return _permute(x, heads, axis, rotary_dim, inverse=True)


def _permute(
    x: AnyArray, heads: int, axis: int, rotary_dim: int | None, inverse: bool
) -> AnyArray:
    size = x.shape[axis]
    wanted = f"heads ({heads}) times an even head_dim of at least rotary_dim"
    head_dim, rest = divmod(size, heads)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    good = rest == 0 and rotary_dim % 2 == 0 and 0 < rotary_dim <= head_dim
    check(good, f"axis {axis}", f"{size} channels", wanted)
    order = np.arange(head_dim)
    order[:rotary_dim] = order[:rotary_dim].reshape(-1, 2).T.reshape(-1)
    order = np.argsort(order) if inverse else order
    order = (np.arange(heads)[:, None] * head_dim + order[None, :]).reshape(-1)
    return x.take(order, axis=axis)
