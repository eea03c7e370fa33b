"""How sure a mean over tokens is: a block bootstrap.

Neighbouring tokens are hard or easy together, so resampling single tokens makes
intervals too narrow.  Blocks of consecutive tokens are resampled instead (Carlstein
1986; Lahiri 2003, ch. 2), and never cross the end of a text.  The interval speaks of
the given texts continued, not of other texts.
"""

from dataclasses import dataclass
from typing import final

import numpy as np

from jrope.errors import JropeError

BLOCK = 64  # tokens
FEWEST_BLOCKS, SHORTEST_BLOCK = 16, 8
RESAMPLES = 2000
SEED = 0
_AT_ONCE = 2**22  # drawn blocks held at a time


@final
@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and its 95 % bootstrap interval.

    Args:
      mean: over all values.
      low, high: 2.5th and 97.5th percentile of the resampled means.
      count: values.
    """

    mean: float
    low: float
    high: float
    count: int


def block_bootstrap(
    values: np.ndarray,
    runs: np.ndarray | None = None,
    *,
    block: int | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval:
    """The mean of correlated values, with an interval from resampled blocks.

    Blocks are cut one after the other and drawn with replacement, as many as there are;
    a resampled mean is the sum of the drawn values over their number.  Equal seeds and
    equal shapes draw equal blocks, so methods compared on one text share their luck.

    Args:
      values: float [n], in the order of the text.
      runs: integers [n], equal for values that follow one another; None: all do.
      block: values in a block; None: 64, fewer (but at least 8) where that would leave
        less than 16 blocks.
      resamples: how many means are drawn.
      seed: of the draws.

    Raises:
      JropeError: no values.
    """
    values = np.asarray(values, np.float64)
    if values.size == 0:
        raise JropeError("bootstrap: got no values, want at least one")
    if block is None:
        block = int(np.clip(values.size // FEWEST_BLOCKS, SHORTEST_BLOCK, BLOCK))
    sums, counts = _blocks(values, runs, block)
    random = np.random.default_rng(seed)
    means: list[np.ndarray] = []
    step = max(1, _AT_ONCE // sums.size)
    for at in range(0, resamples, step):
        shape = (min(step, resamples - at), sums.size)
        drawn = random.integers(sums.size, size=shape)
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Interval(
        mean=float(values.mean()), low=float(low), high=float(high), count=values.size
    )


def _blocks(
    values: np.ndarray, runs: np.ndarray | None, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the values of every block."""
    steps = np.arange(values.size)
    new = np.zeros(values.size, bool)
    if runs is not None:
        new[1:] = runs[1:] != runs[:-1]
    new[0] = True
    begins = np.maximum.accumulate(np.where(new, steps, 0))
    starts = np.flatnonzero((steps - begins) % block == 0)
    counts = np.diff(np.append(starts, values.size))
    return np.add.reduceat(values, starts), counts.astype(np.float64)
