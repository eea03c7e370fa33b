"""What every scaling method builds on: plain frequencies, checks of fields."""

from typing import Any, TypeAlias

import jax
import numpy as np

from jrope.errors import JropeError

Float: TypeAlias = type[np.float32] | type[np.float64]
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


def round_to(x: Any, dtype: Float) -> Any:
    """float64 numbers rounded to `dtype`, still held in float64.

    Not by casts: for a GPU, XLA drops one there and back, and LLVM makes a quotient
    that is cast a float32 division, which is approximate.
    """
    if isinstance(x, np.ndarray | np.generic):
        return x.astype(dtype).astype(np.float64)
    return x if dtype is np.float64 else jax.lax.reduce_precision(x, 8, 23)


def ntk_theta(theta: float, factor: float, rotary_dim: int) -> float:
    """theta * factor ** (d / (d - 2)): the base that stretches the last pair `factor`x.

    Raises:
      JropeError: rotary_dim is 2, where the exponent does not exist.
    """
    check(rotary_dim > 2, "rotary_dim", rotary_dim, "more than 2 for NTK scaling")
    return theta * factor ** (rotary_dim / (rotary_dim - 2))


def check(good: bool, name: str, got: object, wanted: str) -> None:
    """Raise a JropeError that names the field, its value and what is allowed."""
    if not good:
        raise JropeError(f"{name}: got {got!r}, want {wanted}")


def is_positive(value: object) -> bool:
    """Whether value is a number above 0 that float32 can hold; booleans are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < 1e30  # NaN is not


def like_rows(values: np.ndarray, ndim: int) -> np.ndarray:
    """[R] -> [1, ..., R], to meet one frequency row per sequence."""
    return values.reshape((1,) * (ndim - 1) + values.shape)


def check_positive(method: object, *names: str) -> None:
    """Raise a JropeError unless each named field is a number above 0."""
    for name in names:
        value = getattr(method, name)
        check(is_positive(value), name, value, "a finite number > 0")


def check_length(method: object) -> None:
    """Raise a JropeError unless `original_length` is a positive integer."""
    value = getattr(method, "original_length")  # noqa: B009
    good = is_positive(value) and isinstance(value, int)
    check(good, "original_length", value, "a positive integer")
