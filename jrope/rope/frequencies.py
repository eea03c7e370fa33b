"""What every scaling method builds on: plain frequencies, checks of fields."""

from typing import Any, TypeAlias

import jax
import numpy as np

from jrope.errors import check, is_number, is_positive
from jrope.numerics import Float

Length: TypeAlias = int | jax.Array | np.ndarray | None


def wavelength_powers(rotary_dim: int, theta: Any, dtype: Float) -> np.ndarray:
    """theta ** (2 r / rotary_dim) for r in 0..R-1: [R], reciprocals of the frequencies.

    The exponent and the result are rounded to `dtype`, the power is float64: for
    float32 this gives PyTorch's bits.
    """
    exponent = np.arange(0, rotary_dim, 2).astype(dtype) / dtype(rotary_dim)
    return np.power(np.float64(theta), exponent.astype(np.float64)).astype(dtype)


def base_frequencies(
    rotary_dim: int, theta: float, dtype: Float = np.float32
) -> np.ndarray:
    """theta ** (-2 r / rotary_dim), the frequencies in radians per position: [R].

    >>> base_frequencies(4, 10000.0).tolist()
    [1.0, 0.009999999776482582]
    """
    return dtype(1) / wavelength_powers(rotary_dim, theta, dtype)


def ntk_theta(theta: float, factor: float, rotary_dim: int) -> float:
    """theta * factor ** (d / (d - 2)): the base that stretches the last pair `factor`x.

    Raises:
      JropeError: rotary_dim is 2, where the exponent does not exist.
    """
    check(rotary_dim > 2, "rotary_dim", rotary_dim, "more than 2 for NTK scaling")
    return theta * factor ** (rotary_dim / (rotary_dim - 2))


def check_length(method: object) -> None:
    """Raise a JropeError unless `original_length` is a positive integer."""
    value = getattr(method, "original_length")  # noqa: B009
    good = is_positive(value) and isinstance(value, int)
    check(good, "original_length", value, "a positive integer")


def check_factor(method: object) -> None:
    """Raise a JropeError unless `factor` is a number of at least 1.

    Below 1 it would shrink the context; transformers warns of it, and goes on.
    """
    value = getattr(method, "factor")  # noqa: B009
    good = is_number(value) and value >= 1
    check(good, "factor", value, "a number, at least 1")
