"""Sequences in stripes: slot s of the cache, and its token, stand on device s mod n.

The n devices of `Axes.context` share a prompt so.  A query sees of every device's keys
as many as its own place in its stripe says, give or take one: causal work is the same
for all of them whenever they exchange keys, which halves of a triangle, or its first
and last slices together, are not; and what decoding adds goes to all in turn.

Source: Brandon et al. 2023 (arXiv:2311.09431).
"""

import jax
import jax.numpy as jnp

from jrope.sharding.axes import Axes


def count(axes: Axes) -> int:
    """n, the devices that share a sequence."""
    return jax.lax.axis_size(axes.context) if axes.context else 1


def index(axes: Axes) -> jax.Array:
    """Which of them this one is."""
    return jax.lax.axis_index(axes.context)


def share(length: int, axes: Axes) -> int:
    """Slots a device, for at least so many in all."""
    return -(-length // count(axes))


def padded(length: int, axes: Axes) -> int:
    """At least so many slots, the same number on every device."""
    return share(length, axes) * count(axes)


def slots(size: int, axes: Axes, device: jax.Array | None = None) -> jax.Array:
    """The slots that a device holds, this one if None: int32 [size]."""
    steps = jnp.arange(size, dtype=jnp.int32)
    if not axes.context:
        return steps
    return steps * count(axes) + (index(axes) if device is None else device)


def first(starts: jax.Array, axes: Axes) -> jax.Array:
    """This device's slots before each row's start: int32 [B]."""
    return (starts - index(axes) + count(axes) - 1) // count(axes)


def own(starts: jax.Array, length: int, axes: Axes) -> jax.Array:
    """Which of the tokens after each row's start this device computes.

    Returns:
      int32 [B, ceil(length / n)]; from `length` on there is no such token.
    """
    steps = jnp.arange(share(length, axes), dtype=jnp.int32) * count(axes)
    return ((index(axes) - starts) % count(axes))[:, None] + steps[None, :]


def take(x: jax.Array, at: jax.Array) -> jax.Array:
    """The tokens `at` of x [B, T, ...]; 0 where there are none."""
    at = at.reshape(*at.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, at, axis=1, mode="fill", fill_value=0)


def whole(
    x: jax.Array, axes: Axes, starts: jax.Array | None = None, length: int | None = None
) -> jax.Array:
    """Every device's x [B, T / n, ...] in the order of the tokens: [B, length, ...]."""
    every = jax.lax.all_gather(x, axes.context, axis=2)
    every = every.reshape(x.shape[0], -1, *x.shape[2:])
    if starts is not None:
        steps, n = jnp.arange(every.shape[1], dtype=jnp.int32)[None, :], count(axes)
        at = steps // n * n + (starts[:, None] + steps) % n
        at = at.reshape(*at.shape, *[1] * (x.ndim - 2))
        every = jnp.take_along_axis(every, at, axis=1)
    return every[:, :length]


def pick(x: jax.Array, token: jax.Array, starts: jax.Array, axes: Axes) -> jax.Array:
    """Each row's token, which one device has: x [B, T / n, D], int32 [B] -> [B, D]."""
    n = count(axes)
    row = jnp.take_along_axis(x, (token // n)[:, None, None], axis=1)[:, 0]
    mine = (starts + token) % n == index(axes)
    return jax.lax.psum(jnp.where(mine[:, None], row, 0), axes.context)
