"""Rotary position embeddings: positions to cos and sin, and the rotation.

`Rope` is the whole description of a rotary embedding, `table` turns positions into cos
and sin, `rotate` applies them.  The methods that stretch the context are in `scaling`.
Nothing here knows a model.

Two knobs, never mixed: `condense` divides positions (LongChat, SuperHOT, FastChat),
`scaling` changes frequencies (everything else).

Two precisions, because they exclude each other at long positions (9e-3 apart at 128k):

- "parity": what transformers computes, within 1 ulp: float32 frequencies, a float32
  product with the position, cos and sin cast to the activations' dtype before rotating.
- "accurate": float64 frequencies as 48-bit fractions of a turn; the phase is integer
  arithmetic modulo one turn, exact at any position; the rotation is float32, cast once.

Three rules for the length that dynamic NTK, dynamic YaRN and longrope depend on:

- "planned": the sequence's planned total, fixed for a run: one table, rotated keys are
  cached, decoding equals a full pass.
- "growing": the query at position t sees every key rotated for length t + 1, whether
  decoded or in a full pass; keys are cached as they are and rotated in each step.
- "hf": transformers' own: the largest position of the whole batch + 1, with a memory,
  and cached keys keep the rotation of the step that wrote them.  History counts there.

Source: RoPE, Su et al. 2021 (arXiv:2104.09864), eq. 34.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, TypeVar, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jrope.errors import JropeError, check, is_positive
from jrope.frequencies import Length, base_frequencies
from jrope.numerics import Float, round_to, rounded, with_rank
from jrope.scaling import (
    ROPE_TYPES,
    DynamicNTK,
    DynamicYarn,
    Linear,
    Llama3,
    LongRope,
    Method,
    NTKAware,
    Proportional,
    Yarn,
)

__all__ = [
    "ROPE_TYPES",
    "DynamicNTK",
    "DynamicYarn",
    "Linear",
    "Llama3",
    "LongRope",
    "NTKAware",
    "Proportional",
    "Rope",
    "Yarn",
    "base_frequencies",
    "half_to_interleaved",
    "interleaved_to_half",
    "rotate",
    "table",
]

Layout: TypeAlias = Literal["half", "interleaved"]
Precision: TypeAlias = Literal["parity", "accurate"]
Lengths: TypeAlias = Literal["planned", "growing", "hf"]
AnyArray = TypeVar("AnyArray", jax.Array, np.ndarray)


@final
@dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary embedding, whole: hashable, hence a static argument of jit.

    Args:
      theta: base of the frequencies, more than 1.
      rotary_dim: channels that are rotated, even; the first ones of each head.
      scaling: one of the methods above, or None for plain RoPE.
      condense: positions are divided by it (FastChat's ratio).
      layout: "half" pairs channel r with r + R (Hugging Face), "interleaved" pairs 2r
        with 2r + 1 (Meta, GPT-J).
      precision: "parity" (PyTorch's float32) or "accurate" (the truth); see the module.
      lengths: "planned", "growing" or "hf", for the methods that depend on the length;
        see the module.
    """

    theta: float
    rotary_dim: int
    scaling: Method | None = None
    condense: float = 1.0
    layout: Layout = "half"
    precision: Precision = "parity"
    lengths: Lengths = "planned"

    def __post_init__(self) -> None:
        good = is_positive(self.theta) and self.theta > 1
        check(good, "theta", self.theta, "a finite number > 1")
        good = isinstance(self.rotary_dim, int) and self.rotary_dim > 0
        good = good and self.rotary_dim % 2 == 0
        check(good, "rotary_dim", self.rotary_dim, "a positive even integer")
        good = self.scaling is None or type(self.scaling) in ROPE_TYPES.values()
        wanted = f"None or one of {', '.join(t.__name__ for t in ROPE_TYPES.values())}"
        check(good, "scaling", self.scaling, wanted)
        check(is_positive(self.condense), "condense", self.condense, "a number > 0")
        layouts = ("half", "interleaved")
        check(self.layout in layouts, "layout", self.layout, f"one of {layouts}")
        modes = ("parity", "accurate")
        good = self.precision in modes
        check(good, "precision", self.precision, f"one of {modes}")
        self._check_lengths()
        self.frequencies(None)  # lengths of lists, exponents: found out here, not later

    def _check_lengths(self) -> None:
        rules, method = ("planned", "growing", "hf"), type(self.scaling).__name__
        check(self.lengths in rules, "lengths", self.lengths, f"one of {rules}")
        good = self.needs_length or self.lengths == "planned"
        method = "plain RoPE" if self.scaling is None else method
        wanted = f"'planned': {method} does not depend on the length"
        check(good, "lengths", self.lengths, wanted)
        good = self.lengths != "hf" or not isinstance(self.scaling, DynamicYarn)
        wanted = f"'planned' or 'growing': transformers has no {method}"
        check(good, "lengths", self.lengths, wanted)

    @property
    def needs_length(self) -> bool:
        """Whether the frequencies depend on the sequence length."""
        return self.scaling is not None and self.scaling.needs_length

    @property
    def trained_length(self) -> int | None:
        """The length up to which the method was trained, where the method knows it."""
        return getattr(self.scaling, "original_length", None)

    def frequencies(self, length: Length, dtype: Float = np.float32) -> tuple[Any, Any]:
        """Radians per position [..., R] in `dtype`, and the scaling of cos and sin.

        The scaling is a float, or [...] for many lengths where it depends on them.
        """
        if self.scaling is None:
            return base_frequencies(self.rotary_dim, self.theta, dtype), 1.0
        return self.scaling(self.rotary_dim, self.theta, length, dtype)


def table(
    rope: Rope, positions: Any, *, length: Length = None
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's rotation.

    cos(p / condense * f) * A and sin(p / condense * f) * A, f and A from the method.

    Args:
      rope: the embedding; decides everything.
      positions: integers [...], traced or not.
      length: the length that the frequencies are for: an integer, or one per row,
        integers that broadcast against positions without its last axis.  Read by
        dynamic NTK, dynamic YaRN and longrope only.  Which one it is, is the caller's
        matter: queries and keys that meet have to be rotated for the same one.

    Returns:
      cos, sin: float32 [..., R].

    Raises:
      JropeError: positions are not integers, or `length` is needed and missing.

    >>> cos, sin = table(Rope(theta=10000.0, rotary_dim=4, condense=8), jnp.arange(3))
    >>> cos.shape
    (3, 2)
    """
    positions = _integers("positions", positions)
    if not (length is None or isinstance(length, int)):
        length = _integers("length", length)
    if rope.needs_length and length is None:
        length = _untold_length(rope, positions)
    positions = jnp.asarray(positions)
    # A traced length is the one thing not dealt with on the host.  In float64, XLA's
    # rewriting of powers and divisions stays far below float32's last bit.
    traced = rope.needs_length and isinstance(length, jax.Array)
    with jax.enable_x64(traced or bool(jax.config.read("jax_enable_x64"))):
        parity = rope.precision == "parity"
        dtype = np.float32 if parity else np.float64
        inv_freq, scaling = rope.frequencies(length, dtype)
        fixed = scaling if isinstance(scaling, float) else 1.0
        if parity:
            tables = _cos_sin_of_product(positions, inv_freq, rope.condense, fixed)
        else:
            high, low = _phase_words(inv_freq, rope.condense)
            tables = _cos_sin_of_phase(positions, high, low, fixed)
        if isinstance(scaling, float):
            return tables
        rows = _per_pair(scaling.astype(np.float32)[..., None], positions.ndim + 1)
        return tables[0] * rows, tables[1] * rows


def _integers(name: str, values: Any) -> Any:
    """A NumPy or JAX array of integers, or a JropeError (a boolean is not a number)."""
    if not isinstance(values, jax.Array):
        values = np.asarray(values)
    if not jnp.issubdtype(values.dtype, jnp.integer):
        hint = "; condense divides positions, not the caller"
        raise JropeError(f"{name}: got {values.dtype}, want integers{hint}")
    return values


def _untold_length(rope: Rope, positions: Any) -> int:
    trained = rope.trained_length or 0
    last = "traced" if isinstance(positions, Tracer) else np.max(positions, initial=-1)
    if isinstance(last, str) or last >= trained:
        raise JropeError(
            f"length: got None with positions up to {last}, but the frequencies of "
            f"{type(rope.scaling).__name__} depend on the length past {trained}; "
            "give the planned total length of each sequence (prompt + new tokens)"
        )
    return trained


def _per_pair(values: Any, ndim: int) -> jax.Array:
    """[R], or a row per sequence [..., R], to the rank of positions [..., T, 1]."""
    return with_rank(values if values.ndim == 1 else values[..., None, :], ndim)


@partial(jax.jit, static_argnames=("condense", "scaling"))
def _cos_sin_of_product(
    positions: jax.Array, inv_freq: Any, condense: float, scaling: float
) -> tuple[jax.Array, jax.Array]:
    """Angle = float32(position) / condense * inv_freq, in this order, all float32."""
    p = _divide(positions.astype(jnp.float32), condense)[..., None]
    angle = p * _per_pair(inv_freq, p.ndim)
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


def _phase_words(inv_freq: Any, condense: float) -> tuple[Any, Any]:
    """Turns per position modulo 1 in units of 2**-48: high 32 and low 16 bits."""
    xp = np if isinstance(inv_freq, np.ndarray) else jnp
    turns = inv_freq / np.float64(2 * np.pi * condense)
    units = xp.floor((turns - xp.floor(turns)) * np.float64(2.0**48) + np.float64(0.5))
    high = xp.floor(units / np.float64(2.0**16))
    low = units - high * np.float64(2.0**16)
    high = xp.where(high == 2.0**32, np.float64(0), high)  # rounded up to a whole turn
    return high.astype(np.uint32), low.astype(np.uint32)


@partial(jax.jit, static_argnames=("scaling",))
def _cos_sin_of_phase(
    positions: jax.Array, high: Any, low: Any, scaling: float
) -> tuple[jax.Array, jax.Array]:
    """Multiply position by turns in wrapping uint32, then cos and sin of the remainder.

    phase = (p * (high 2**16 + low)) >> 16 modulo 2**32, the angle in 2**-32 turns,
    short by less than p 2**-48 + 1 units; split into a quarter turn and |rest| <= pi/4.
    """
    p = jnp.abs(positions).astype(jnp.uint32)[..., None]
    high, low = _per_pair(high, p.ndim), _per_pair(low, p.ndim)
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
    if precision == "parity":
        short = partial(rounded, dtype=x.dtype)
        cos, sin = short(cos), short(sin)
        turned = (
            short(a * cos) - short(b * sin),
            short(b * cos) + short(a * sin),
        )
    else:
        turned = (a * cos - b * sin, b * cos + a * sin)
    if layout == "half":
        y = jnp.concatenate(turned, axis=-1)
    else:
        y = jnp.stack(turned, axis=-1).reshape(wide.shape)
    y = y.astype(x.dtype)
    whole = 2 * pairs == x.shape[-1]
    return y if whole else jnp.concatenate([y, x[..., 2 * pairs :]], axis=-1)


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
