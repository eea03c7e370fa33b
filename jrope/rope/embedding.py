"""`Rope`, the whole description of a rotary embedding, and positions to cos and sin."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from jrope.errors import JropeError, check, is_positive
from jrope.numerics import Float
from jrope.rope.frequencies import Length, base_frequencies
from jrope.rope.methods import ROPE_TYPES, DynamicYarn, Method
from jrope.rope.phase import (
    cos_sin_of_phase,
    cos_sin_of_product,
    per_pair,
    phase_words,
)

Layout: TypeAlias = Literal["half", "interleaved"]
Precision: TypeAlias = Literal["parity", "accurate"]
Lengths: TypeAlias = Literal["planned", "growing", "hf"]


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
      precision: "parity" (PyTorch's float32) or "accurate" (the truth).
      lengths: "planned", "growing" or "hf", for the methods that depend on the length;
        see the package.
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
        check(good, "theta", self.theta, "a number > 1 and < 1e30")
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
    rope: Rope, positions: ArrayLike, *, length: Length = None
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
            tables = cos_sin_of_product(positions, inv_freq, rope.condense, fixed)
        else:
            high, low = phase_words(inv_freq, rope.condense)
            tables = cos_sin_of_phase(positions, high, low, fixed)
        if isinstance(scaling, float):
            return tables
        rows = per_pair(scaling.astype(np.float32)[..., None], positions.ndim + 1)
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
