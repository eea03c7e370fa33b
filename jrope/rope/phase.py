"""cos and sin of position times frequency: as PyTorch computes them, or true.

"parity" multiplies in float32; "accurate" keeps the phase as integers modulo one turn.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.numerics import round_to, with_rank


def per_pair(values: Any, ndim: int) -> jax.Array:
    """[R], or a row per sequence [..., R], to the rank of positions [..., T, 1]."""
    return with_rank(values if values.ndim == 1 else values[..., None, :], ndim)


@partial(jax.jit, static_argnames=("condense", "scaling"))
def cos_sin_of_product(
    positions: jax.Array, inv_freq: Any, condense: float, scaling: float
) -> tuple[jax.Array, jax.Array]:
    """Angle = float32(position) / condense * inv_freq, in this order, all float32."""
    p = _divide(positions.astype(jnp.float32), condense)[..., None]
    angle = p * per_pair(inv_freq, p.ndim)
    return jnp.cos(angle) * np.float32(scaling), jnp.sin(angle) * np.float32(scaling)


def _divide(p: jax.Array, condense: float) -> jax.Array:
    """p / condense, correctly rounded to float32 on every device.

    XLA multiplies by a constant's reciprocal, and GPUs divide approximately; a float64
    quotient is right to 2**-52, too near for the second rounding to fall wrong.
    """
    if condense == 1:
        return p
    with jax.enable_x64(True):
        quotient = p.astype(jnp.float64) / np.float64(np.float32(condense))
        return round_to(quotient, np.float32).astype(jnp.float32)


def phase_words(inv_freq: Any, condense: float) -> tuple[Any, Any]:
    """Turns per position modulo 1 in units of 2**-48: high 32 and low 16 bits."""
    xp = np if isinstance(inv_freq, np.ndarray) else jnp
    turns = inv_freq / np.float64(2 * np.pi * condense)
    units = xp.floor((turns - xp.floor(turns)) * np.float64(2.0**48) + np.float64(0.5))
    high = xp.floor(units / np.float64(2.0**16))
    low = units - high * np.float64(2.0**16)
    high = xp.where(high == 2.0**32, np.float64(0), high)  # rounded up to a whole turn
    return high.astype(np.uint32), low.astype(np.uint32)


@partial(jax.jit, static_argnames=("scaling",))
def cos_sin_of_phase(
    positions: jax.Array, high: Any, low: Any, scaling: float
) -> tuple[jax.Array, jax.Array]:
    """Multiply position by turns in wrapping uint32, then cos and sin of the remainder.

    phase = (p * (high 2**16 + low)) >> 16 modulo 2**32, the angle in 2**-32 turns,
    short by less than p 2**-48 + 1 units; split into a quarter turn and |rest| <= pi/4.
    """
    p = jnp.abs(positions).astype(jnp.uint32)[..., None]
    high, low = per_pair(high, p.ndim), per_pair(low, p.ndim)
    phase = p * high + (p >> 16) * low + (((p & 0xFFFF) * low) >> 16)
    quarter = (phase + np.uint32(1 << 29)) >> 30
    rest = (phase - (quarter << 30)).astype(jnp.int32).astype(jnp.float32)
    rest = rest * np.float32(2 * np.pi / 2**32)
    c, s = jnp.cos(rest), jnp.sin(rest)
    cos = jnp.where(quarter % 2 == 0, c, s)
    sin = jnp.where(quarter % 2 == 0, s, c)
    cos = jnp.where((quarter == 1) | (quarter == 2), -cos, cos)
    sin = jnp.where((quarter >= 2) ^ (positions < 0)[..., None], -sin, sin)
    return cos * np.float32(scaling), sin * np.float32(scaling)
