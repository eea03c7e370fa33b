"""Logits whose vocabulary is split over devices: what is asked of them, not gathered.

With `ONE` each is the ordinary function.
"""

import jax
import jax.numpy as jnp

from jrope.sharding.axes import ONE, Axes

BLOCK = 64  # logits whose maximum a CPU finds at once


def argmax(x: jax.Array, axes: Axes = ONE) -> jax.Array:
    """The first index of each row's largest number: [B, V] -> int32 [B]."""
    best = jax.lax.platform_dependent(x, cpu=_argmax_on_cpu, default=_argmax)
    if not axes.tensor:
        return best
    value = jnp.take_along_axis(x, best[:, None], axis=-1)[:, 0]
    first = jax.lax.axis_index(axes.tensor) * x.shape[-1]
    bits = jax.lax.bitcast_convert_type(value, jnp.int32)
    every = jax.lax.all_gather(jnp.stack((bits, best + first)), axes.tensor)
    values = jax.lax.bitcast_convert_type(every[:, 0], jnp.float32)  # [shares, B]
    share = jnp.argmax(values, axis=0)[None, :]
    return jnp.take_along_axis(every[:, 1], share, axis=0)[0]


def _argmax(x: jax.Array) -> jax.Array:
    return jnp.argmax(x, axis=-1).astype(jnp.int32)


def _argmax_on_cpu(x: jax.Array) -> jax.Array:
    """The same in the first of the blocks whose maximum is the row's.

    XLA's CPU backend compares numbers with their indices one after the other, where a
    maximum is eight times as fast, but may lose a NaN (jax 0.10).
    """
    batch, size = x.shape
    x = jnp.pad(x, ((0, 0), (0, -size % BLOCK)), constant_values=-jnp.inf)
    blocks = x.reshape(batch, -1, BLOCK)
    wrong = jnp.sum(jnp.isnan(blocks), axis=-1, dtype=jnp.float32) > 0
    block = _argmax(jnp.where(wrong, jnp.nan, jnp.max(blocks, axis=-1)))
    own = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _argmax(own)


def categorical(key: jax.Array, logits: jax.Array, axes: Axes = ONE) -> jax.Array:
    """`jax.random.categorical` of every row: keys [B], [B, V] -> int32 [B].

    Each share adds its part of the noise that a single device would draw.
    """
    if not axes.tensor:
        return jax.vmap(jax.random.categorical)(key, logits).astype(jnp.int32)
    own, count = logits.shape[-1], axes.count()
    first = jax.lax.axis_index(axes.tensor) * own

    def noise(key: jax.Array) -> jax.Array:
        whole = jax.random.gumbel(key, (own * count,), logits.dtype)
        return jax.lax.dynamic_slice_in_dim(whole, first, own)

    return argmax(jax.vmap(noise)(key) + logits, axes)


def pick(x: jax.Array, ids: jax.Array, axes: Axes = ONE) -> jax.Array:
    """x[..., id]: [..., V], integers [...] -> [...]."""
    size = x.shape[-1]
    local = axes.local_ids(ids, size)
    own = jnp.take_along_axis(
        x, (jnp.minimum(local, size - 1) if axes.tensor else local)[..., None], axis=-1
    )[..., 0]
    return axes.total(jnp.where(local < size, own, 0)) if axes.tensor else own


def logsumexp(x: jax.Array, axes: Axes = ONE) -> jax.Array:
    """log sum exp over the vocabulary: [..., V] -> [...]."""
    own = jax.nn.logsumexp(x, axis=-1)
    if not axes.tensor:
        return own
    top = axes.largest(jax.lax.stop_gradient(own))
    top = jnp.where(jnp.isfinite(top), top, 0)
    return top + jnp.log(axes.total(jnp.exp(own - top)))


def log_softmax(x: jax.Array, axes: Axes = ONE) -> jax.Array:
    """Log of the softmax over the vocabulary: [..., V]."""
    if not axes.tensor:
        return jax.nn.log_softmax(x)
    return x - logsumexp(x, axes)[..., None]


def top_k(x: jax.Array, k: int, axes: Axes = ONE) -> tuple[jax.Array, jax.Array]:
    """Each row's k largest numbers, best first, and their indices: [B, V] -> [B, k].

    Of each share's k largest: what goes between devices does not grow with V.
    """
    best, ids = jax.lax.top_k(x, min(k, x.shape[-1]))
    if not axes.tensor:
        return best, ids
    first = jax.lax.axis_index(axes.tensor) * x.shape[-1]
    bits = jax.lax.bitcast_convert_type(best, jnp.int32)
    pairs = jnp.stack((bits, ids + first))
    pairs = jax.lax.all_gather(pairs, axes.tensor, axis=2, tiled=True)
    best, at = jax.lax.top_k(jax.lax.bitcast_convert_type(pairs[0], jnp.float32), k)
    return best, jnp.take_along_axis(pairs[1], at, axis=1)


def softmax(x: jax.Array, axes: Axes = ONE) -> jax.Array:
    """Softmax over the vocabulary: [..., V]."""
    if not axes.tensor:
        return jax.nn.softmax(x)
    return jnp.exp(x - logsumexp(x, axes)[..., None])
