"""Frequencies that differ from this PyTorch's in their last bits, and how far they may.

The last bit of PyTorch's float32 power depends on the processor's vector width (AVX2,
AVX-512); jrope's is correctly rounded.  1 ulp of a frequency moves the angle at
position 131071 by up to 7.8e-3.  So such differences are told by name, and the models
are compared with the same frequencies on both sides.
"""

from dataclasses import dataclass
from typing import final

import numpy as np

from jrope.rope import Llama3, Rope

SHOWN = 3  # of the differences, in a line


@final
@dataclass(frozen=True, kw_only=True)
class Difference:
    """A frequency that is not this PyTorch's to the bit.

    Args:
      length: what it is for, where frequencies depend on the length; else None.
      pair: its index, 0 turns fastest.
      jrope, torch: the float32 numbers.
      ulps: how many float32 they are apart.
    """

    length: int | None
    pair: int
    jrope: float
    torch: float
    ulps: int


@final
@dataclass(frozen=True, kw_only=True)
class Frequencies:
    """The comparison of all frequencies.

    Args:
      count: how many were compared: R, for every length where they depend on it.
      limit: ulps that may lie between two; see `limit`.
      differences: those that are not equal.
    """

    count: int
    limit: int
    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        """Whether the last bits of PyTorch's power explain all differences."""
        return all(d.ulps <= self.limit for d in self.differences)

    def line(self) -> str:
        """All in one line; empty where every bit is equal."""
        if not (apart := self.differences):
            return ""
        most = max(d.ulps for d in apart)
        worst = sorted(apart, key=lambda d: -d.ulps)[:SHOWN]
        names = ", ".join(
            f"pair {d.pair}{'' if d.length is None else f' for length {d.length}'} "
            f"{d.jrope:.9g} against {d.torch:.9g}"
            for d in worst
        )
        left = f" and {len(apart) - SHOWN} more" if len(apart) > SHOWN else ""
        used = "jrope's on both sides"
        if not self.ok:
            used = "each side its own"
        return (
            f"frequencies: {len(apart)} of {self.count} up to {most} ulp from this "
            f"PyTorch's, allowed {self.limit} ({names}{left}); compared with {used}"
        )


def compare_frequencies(
    rope: Rope, ours: np.ndarray, theirs: np.ndarray, lengths: np.ndarray
) -> Frequencies:
    """Compare rows [B, R] of float32, of the lengths [B]; equal lengths count once."""
    rows = np.unique(lengths, return_index=True)[1] if rope.needs_length else [0]
    ours, theirs, lengths = ours[rows], theirs[rows], lengths[rows]
    apart = np.abs(ours.view(np.int32).astype(np.int64) - theirs.view(np.int32))
    return Frequencies(
        count=ours.size,
        limit=limit(rope),
        differences=tuple(
            Difference(
                length=int(lengths[row]) if rope.needs_length else None,
                pair=int(pair),
                jrope=float(ours[row, pair]),
                torch=float(theirs[row, pair]),
                ulps=int(apart[row, pair]),
            )
            for row, pair in zip(*apart.nonzero(), strict=True)
        ),
    )


def limit(rope: Rope) -> int:
    """How many ulps a power that is 1 ulp away puts between frequencies, at most.

    Its reciprocal is up to 2 away, and what follows rounds twice more: 4.  The ramp of
    llama3, w = (u - low) / (high - low) with u = O f / 2 pi, is multiplied by f, and
    where it begins the result is f / factor: the same difference of f counts
    factor low / (high - low) times there.
    """
    if not isinstance(rope.scaling, Llama3):
        return 4
    low, high = rope.scaling.low_freq_factor, rope.scaling.high_freq_factor
    return int(4 * (1 + rope.scaling.factor * low / (high - low)))
