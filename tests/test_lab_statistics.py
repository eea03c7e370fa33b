"""The block bootstrap: its blocks one by one, and that its intervals hold the mean."""

import numpy as np
import pytest

from jrope.errors import JropeError
from jrope.lab.statistics import _blocks, block_bootstrap


def correlated(seed: int, count: int, memory: float) -> np.ndarray:
    """A process of mean 0 whose neighbours are alike."""
    random = np.random.default_rng(seed)
    values = np.zeros(count)
    values[0] = random.standard_normal() / np.sqrt(1 - memory**2)
    for i, noise in enumerate(random.standard_normal(count - 1), 1):
        values[i] = memory * values[i - 1] + noise
    return values


def coverage(block: int | None) -> float:
    held = 0
    for seed in range(200):
        values = correlated(seed, 1500, 0.7)
        found = block_bootstrap(values, block=block, resamples=400, seed=seed)
        held += found.low <= 0 <= found.high
    return held / 200


def test_intervals_hold_the_mean_of_a_correlated_text() -> None:
    assert 0.88 <= coverage(None) <= 0.99


def test_single_tokens_would_make_them_too_narrow() -> None:
    assert coverage(1) < 0.75


def test_blocks_do_not_cross_the_end_of_a_run() -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal(100)
    runs = np.repeat([5, 2, 5, 9], [30, 1, 40, 29])
    want: list[list[float]] = []
    for i, value in enumerate(values):
        if i and runs[i] == runs[i - 1] and len(want[-1]) < 8:
            want[-1].append(value)
        else:
            want.append([value])
    sums, counts = _blocks(values, runs, 8)
    np.testing.assert_allclose(sums, [sum(block) for block in want])
    assert counts.tolist() == [len(block) for block in want]


def test_equal_seeds_are_equal_and_the_mean_is_plain() -> None:
    values = correlated(1, 999, 0.5)
    first, again = block_bootstrap(values), block_bootstrap(values)
    assert first == again
    assert first.mean == pytest.approx(values.mean(), abs=1e-15)
    assert first.low < first.mean < first.high
    assert first.count == 999
    assert block_bootstrap(values, seed=1) != first


def test_methods_compared_on_one_text_share_their_blocks() -> None:
    """A method that is worse by a constant has an interval shifted by it."""
    values = correlated(2, 500, 0.5)
    one, other = block_bootstrap(values), block_bootstrap(values + 3)
    assert other.low - one.low == pytest.approx(3)
    assert other.high - one.high == pytest.approx(3)


@pytest.mark.parametrize("count", [1, 2, 7, 129])
def test_few_values(count: int) -> None:
    found = block_bootstrap(np.arange(count))
    assert found.low <= found.mean <= found.high


def test_no_values_are_an_error() -> None:
    with pytest.raises(JropeError, match="got no values, want at least one"):
        block_bootstrap(np.zeros(0))
