"""Every published way of stretching rotary embeddings, one small class each.

A method answers one question: how fast does each of the R rotary pairs turn, and by
how much are cos and sin scaled?

    method(rotary_dim, theta, length) -> (inv_freq[R], attention_scaling)

A method that depends on the length takes one, or an array of them, a row each, and
returns rows: inv_freq [..., R], and attention_scaling [...] where it depends on it too.

The arithmetic follows PyTorch's operations in transformers' order and is carried out
in the `dtype` asked for: float32 gives the frequencies that transformers computes,
float64 the truth to 1e-15.  It runs on the host, where XLA cannot rewrite a power; only
a traced length is computed with on the device, in float64 (see `rope.table`).

Sources: linear interpolation, Chen et al. 2023 (arXiv:2306.15595); NTK-aware and
dynamic NTK, bloc97 and emozilla 2023; YaRN, Peng et al. 2023 (arXiv:2309.00071); Llama
3.1, Meta 2024; LongRoPE, Ding et al. 2024 (arXiv:2402.13753); proportional, Gemma 4.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, final

import jax.numpy as jnp
import numpy as np

from jrope.errors import check, check_positive, is_positive
from jrope.numerics import Float, round_to, with_rank
from jrope.rope.frequencies import (
    Length,
    base_frequencies,
    check_factor,
    check_length,
    ntk_theta,
    wavelength_powers,
)


class Method(Protocol):
    """What every scaling method is: fields, and one call."""

    needs_length: ClassVar[bool]

    def __call__(
        self, rotary_dim: int, theta: float, length: Length, dtype: Float = np.float32
    ) -> tuple[Any, Any]:
        """Return inv_freq [R] in `dtype`, operations in HF's order, and the scaling."""
        ...


@final
@dataclass(frozen=True, kw_only=True)
class Linear:
    """Position interpolation: f / factor.  Chen et al. 2023, eq. 4."""

    factor: float
    needs_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_factor(self)

    def __call__(
        self, rotary_dim: int, theta: float, length: Length, dtype: Float = np.float32
    ) -> tuple[np.ndarray, float]:
        return base_frequencies(rotary_dim, theta, dtype) / dtype(self.factor), 1.0


@final
@dataclass(frozen=True, kw_only=True)
class NTKAware:
    """One stretched base: theta' = theta factor^(d/(d-2)), d = rotary_dim.  bloc97."""

    factor: float
    needs_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_factor(self)

    def __call__(
        self, rotary_dim: int, theta: float, length: Length, dtype: Float = np.float32
    ) -> tuple[np.ndarray, float]:
        stretched = ntk_theta(theta, self.factor, rotary_dim)
        return base_frequencies(rotary_dim, stretched, dtype), 1.0


@final
@dataclass(frozen=True, kw_only=True)
class DynamicNTK:
    """NTK-aware whose base grows with the length n once n > M, the trained length.

    theta' = theta (factor n / M - (factor - 1))^(d/(d-2)); plain RoPE for n <= M.
    """

    factor: float
    original_length: int
    needs_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_factor(self)
        check_length(self)

    def __call__(
        self, rotary_dim: int, theta: float, length: Length, dtype: Float = np.float32
    ) -> tuple[Any, float]:
        check(rotary_dim > 2, "rotary_dim", rotary_dim, "more than 2 for NTK scaling")
        n = self.original_length if length is None else length
        xp = np if isinstance(n, int | np.ndarray | np.integer) else jnp
        wide = np.float64  # every product below is exact or correctly rounded to dtype
        grown = xp.maximum(n, self.original_length).astype(dtype)[..., None]
        product = (dtype(self.factor) * grown).astype(wide)
        ratio = round_to(product / wide(self.original_length), dtype).astype(dtype)
        growth = (ratio - dtype(self.factor - 1)).astype(wide)
        stretch = xp.power(growth, wide(rotary_dim / (rotary_dim - 2))).astype(dtype)
        stretched = (dtype(theta) * stretch).astype(wide)
        base = xp.where(grown > self.original_length, stretched, wide(theta))
        exponent = (
            np.arange(0, rotary_dim, 2).astype(dtype) / dtype(rotary_dim)
        ).astype(wide)
        powers = round_to(xp.power(base, with_rank(exponent, base.ndim)), dtype)
        return round_to(wide(1) / powers, dtype).astype(dtype), 1.0


@final
@dataclass(frozen=True, kw_only=True)
class Yarn:
    """NTK by parts: fast pairs kept, slow pairs interpolated, a ramp between.

    edge(b) = d ln(O / (2 pi b)) / (2 ln theta);  ramp from edge(beta_fast) to
    edge(beta_slow);  f' = f (1 - ramp) + f / factor ramp;  cos and sin scaled by
    `attention_factor`, else m(mscale) / m(mscale_all_dim) when both are given and not
    zero, else m(1), with m(k) = 0.1 k ln(factor) + 1.  Peng et al. 2023, sec. 3.
    """

    factor: float
    original_length: int
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    needs_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_factor(self)
        check_positive(self, "beta_fast", "beta_slow")
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            if getattr(self, name) is not None:
                check_positive(self, name)
        check_length(self)
        check(isinstance(self.truncate, bool), "truncate", self.truncate, "a boolean")
        wanted = f"more than beta_slow ({self.beta_slow})"
        check(self.beta_fast > self.beta_slow, "beta_fast", self.beta_fast, wanted)

    @property
    def attention_scaling(self) -> float:
        """The factor on cos and sin, hence its square on the attention scores."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self._m(self.mscale) / self._m(self.mscale_all_dim)
        return self._m(1.0)

    def _m(self, k: float) -> float:
        return 1.0 if self.factor <= 1 else 0.1 * k * math.log(self.factor) + 1.0

    def __call__(
        self, rotary_dim: int, theta: float, length: Length, dtype: Float = np.float32
    ) -> tuple[np.ndarray, float]:
        keep = _kept(self, rotary_dim, theta, self.truncate, dtype)
        powers = wavelength_powers(rotary_dim, theta, dtype)
        interpolated = dtype(1) / (dtype(self.factor) * powers)
        inv_freq = interpolated * (dtype(1) - keep) + dtype(1) / powers * keep
        return inv_freq, self.attention_scaling


@final
@dataclass(frozen=True, kw_only=True)
class DynamicYarn:
    """YaRN whose scale follows the length n: s = max(factor, n / O), O trained on.

    f' = f (1 - ramp) + f / s ramp with YaRN's ramp; cos and sin scaled by 0.1 ln s + 1.
    `factor` is the scale that a model was tuned with; 1, not tuned, is plain RoPE for
    n <= O.  Peng et al. 2023, sec. 3.3, and the authors' code.
    """

    original_length: int
    factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    needs_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_factor(self)
        check_positive(self, "beta_fast", "beta_slow")
        check_length(self)
        wanted = f"more than beta_slow ({self.beta_slow})"
        check(self.beta_fast > self.beta_slow, "beta_fast", self.beta_fast, wanted)

    def __call__(
        self, rotary_dim: int, theta: float, length: Length, dtype: Float = np.float32
    ) -> tuple[Any, Any]:
        n = self.original_length if length is None else length
        xp = np if isinstance(n, int | np.ndarray | np.integer) else jnp
        wide = np.float64  # as in DynamicNTK: each result is rounded to dtype
        rounded = partial(round_to, dtype=dtype)
        scale = xp.asarray(n).astype(wide) / wide(self.original_length)
        scale = xp.maximum(scale, wide(self.factor))
        keep = _kept(self, rotary_dim, theta, True, dtype)
        powers = wavelength_powers(rotary_dim, theta, dtype)
        plain, keep, move, powers = (
            with_rank(x.astype(wide), scale.ndim + 1)
            for x in (dtype(1) / powers, keep, dtype(1) - keep, powers)
        )
        slow = rounded(wide(1) / rounded(rounded(scale)[..., None] * powers))
        mixed = rounded(slow * move) + rounded(plain * keep)
        inv_freq = xp.where(scale[..., None] > 1, mixed, plain).astype(dtype)
        sharpening = wide(0.1) * xp.log(scale) + wide(1)
        return inv_freq, float(sharpening) if isinstance(n, int) else sharpening


@final
@dataclass(frozen=True, kw_only=True)
class Llama3:
    """YaRN's idea, the ramp measured in turns per original context O.

    u = O f / 2 pi; w = clip((u - low) / (high - low), 0, 1); f' = f w + f/factor (1-w)
    """

    factor: float
    original_length: int
    low_freq_factor: float
    high_freq_factor: float
    needs_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_factor(self)
        check_positive(self, "low_freq_factor", "high_freq_factor")
        check_length(self)
        wanted = f"more than low_freq_factor ({self.low_freq_factor})"
        high = self.high_freq_factor
        check(high > self.low_freq_factor, "high_freq_factor", high, wanted)

    def __call__(
        self, rotary_dim: int, theta: float, length: Length, dtype: Float = np.float32
    ) -> tuple[np.ndarray, float]:
        low, high = self.low_freq_factor, self.high_freq_factor
        inv_freq = base_frequencies(rotary_dim, theta, dtype)
        wavelength = dtype(2 * math.pi) / inv_freq
        slow = wavelength > dtype(self.original_length / low)
        fast = wavelength < dtype(self.original_length / high)
        turns = dtype(self.original_length) / wavelength
        w = (turns - dtype(low)) / dtype(high - low)
        between = (dtype(1) - w) * inv_freq / dtype(self.factor) + w * inv_freq
        stretched = np.where(slow, inv_freq / dtype(self.factor), between)
        return np.where(fast, inv_freq, stretched), 1.0


@final
@dataclass(frozen=True, kw_only=True)
class LongRope:
    """Searched divisors per pair, one set up to the original length O, one past it.

    f' = f / short_factor if n <= O else f / long_factor;  cos and sin scaled by
    `attention_factor`, else sqrt(1 + ln factor / ln O).  Ding et al. 2024.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_length: int
    factor: float | None = None
    attention_factor: float | None = None
    needs_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            given = getattr(self, name)
            check(isinstance(given, list | tuple), name, given, "a list of numbers")
            values = tuple(given)
            for i, value in enumerate(values):
                check(is_positive(value), f"{name}[{i}]", value, "a number > 0")
            object.__setattr__(self, name, values)
        check_length(self)
        length = self.original_length
        check(length > 1, "original_length", length, "more than 1 for longrope")
        wanted = "given when attention_factor is not (it is max length / original)"
        given = self.factor is not None or self.attention_factor is not None
        check(given, "factor", self.factor, wanted)
        for name in ("factor", "attention_factor"):
            if getattr(self, name) is not None:
                check_positive(self, name)

    @property
    def attention_scaling(self) -> float:
        """The factor on cos and sin, hence its square on the attention scores."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.factor is None or self.factor <= 1:
            return 1.0
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))

    def __call__(
        self, rotary_dim: int, theta: float, length: Length, dtype: Float = np.float32
    ) -> tuple[Any, float]:
        for name in ("short_factor", "long_factor"):
            got, want = len(getattr(self, name)), rotary_dim // 2
            wanted = f"{want} numbers (rotary_dim / 2)"
            check(got == want, name, f"{got} numbers", wanted)
        powers = wavelength_powers(rotary_dim, theta, dtype)
        # HF holds the divisors as float32; the truth takes the numbers as written.
        short = dtype(1) / (np.asarray(self.short_factor, dtype) * powers)
        long = dtype(1) / (np.asarray(self.long_factor, dtype) * powers)
        n = self.original_length if length is None else length
        if isinstance(n, int):
            inv_freq = long if n > self.original_length else short
        else:
            xp = np if isinstance(n, np.ndarray | np.integer) else jnp
            past = n[..., None] > self.original_length
            inv_freq = xp.where(past, *(with_rank(f, past.ndim) for f in (long, short)))
        return inv_freq, self.attention_scaling


@final
@dataclass(frozen=True, kw_only=True)
class Proportional:
    """The first `partial_rotary_factor` of the pairs turn, the rest stand still.

    f' = f / factor for pairs below int(partial d / 2), else 0; exponents divide by the
    whole d, unlike partial rotary, where they divide by the rotated part.  Gemma 4.
    """

    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    needs_length: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(self, "partial_rotary_factor", "factor")
        part = self.partial_rotary_factor
        check(part <= 1, "partial_rotary_factor", part, "at most 1")

    def __call__(
        self, rotary_dim: int, theta: float, length: Length, dtype: Float = np.float32
    ) -> tuple[np.ndarray, float]:
        turning = int(self.partial_rotary_factor * rotary_dim // 2)
        inv_freq = base_frequencies(rotary_dim, theta, dtype)
        inv_freq[turning:] = 0
        return inv_freq / dtype(self.factor), 1.0


ROPE_TYPES: dict[str, type[Any]] = {
    "linear": Linear,
    "ntk": NTKAware,
    "dynamic": DynamicNTK,
    "yarn": Yarn,
    "dynamic-yarn": DynamicYarn,
    "llama3": Llama3,
    "longrope": LongRope,
    "proportional": Proportional,
}


def _kept(
    method: Any, rotary_dim: int, theta: float, truncate: bool, dtype: Float
) -> np.ndarray:
    """1 - YaRN's ramp, the share of the plain frequency that each pair keeps: [R]."""

    def edge(turns: float) -> float:
        wavelengths = math.log(method.original_length / (turns * 2 * math.pi))
        return rotary_dim * wavelengths / (2 * math.log(theta))

    low, high = edge(method.beta_fast), edge(method.beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    high = high + 0.001 if low == high else high
    pair = np.arange(rotary_dim // 2).astype(dtype)
    ramp = np.clip((pair - dtype(low)) / dtype(high - low), dtype(0), dtype(1))
    return dtype(1) - ramp
