"""Which rows enter together, in which shapes."""

from typing import Any

import numpy as np
import pytest
from batch_helpers import work
from bench_helpers import tiny

from jrope.batch.packing import Shapes, Waiting
from jrope.batch.work import Work
from jrope.bench.batching import workload


def test_shapes_are_few_and_hold_as_many_tokens() -> None:
    """For lengths up to n, of so many rows, three quarters of n for each."""
    shapes = Shapes.of(slots=128, capacity=3072)
    assert shapes.piece == 2048 and shapes.rows == 16
    assert shapes.first == {64: 768, 2048: 2048}
    few = Shapes.of(slots=16, capacity=3072)
    assert few.first == {64: 96, 128: 192, 256: 384, 512: 768, 2048: 2048}
    assert Shapes.of(slots=5, capacity=80, piece=16).first == {16: 16}
    one = Shapes.of(slots=8, capacity=80)
    assert one.first == {32: 32, 48: 48, 80: 80} and one.rows == 1
    assert Shapes.of(slots=64, capacity=40).first == {40: 48}
    assert Shapes.of(slots=1024, capacity=3072).rows == 32


@pytest.mark.parametrize("piece", [1, 33, 50, 2048])
@pytest.mark.parametrize("slots", [1, 16, 24, 40])
def test_a_line_has_no_last_rows_of_its_own(slots: int, piece: int) -> None:
    """Whose products round in another way: at 50 bfloat16 tokens, those of the last."""
    first = Shapes.of(slots=slots, capacity=112, piece=piece).first
    assert all(size % 16 == 0 and size >= n for n, size in first.items())


@pytest.mark.parametrize("size", [1, 15, 16, 17, 32, 33, 47, 100])
def test_all_pieces_but_the_first_are_whole(size: int) -> None:
    shapes, prompt = Shapes.of(slots=8, capacity=128, piece=16), np.arange(size)
    first, *more = shapes.pieces(prompt)
    assert 1 <= len(first) <= 16 and all(len(piece) == 16 for piece in more)
    np.testing.assert_array_equal(np.concatenate([first, *more]), prompt)
    assert shapes.begins(prompt) == len(first) <= shapes.longest(prompt)
    longest = shapes.longest(prompt)
    assert all(n < len(first) or n >= longest for n in shapes.first)


def waiting(sizes: list[Any], slots: int = 16, groups: int = 1) -> Waiting:
    """Prompts of these lengths, and new tokens if they are given: else 1."""
    shapes = Shapes(piece=64, first={16: 32, 64: 64}, rows=4, groups=groups)
    lengths = [size if isinstance(size, tuple) else (size, 1) for size in sizes]
    found = Waiting([work(i, *n) for i, n in enumerate(lengths)], shapes, slots)
    found.read()
    return found


def keys(parts: list[list[Work]] | None) -> Any:
    return parts and [[row.key for row in part] for part in parts]


def test_rows_enter_until_their_tokens_are_enough() -> None:
    rows = waiting([10, 20, 60, 10, 10, 30, 12, 10, 14])
    assert keys(rows.take(16)) == [[0, 3, 4]]  # 12 more tokens are too many for 32
    assert keys(rows.take(16)) == [[1, 5]]  # of another program
    assert keys(rows.take(16)) == [[2]]
    assert keys(rows.take(16)) == [[6, 7]]
    assert keys(rows.take(16)) == [[8]]  # the last may be few
    assert rows.take(16) is None and rows.wanted() is None and len(rows) == 0


def test_who_does_not_fit_is_passed_over() -> None:
    rows = waiting([40, 30, 50, 20, 24])
    assert keys(rows.take(16)) == [[0, 3]]
    assert keys(rows.take(16)) == [[1, 4]]
    assert keys(rows.take(16)) == [[2]]
    far = waiting([40] * 17 + [20])
    assert keys(far.take(16)) == [[0]]  # not looked for among all that wait
    assert keys(far.take(16)) == [[1]]
    assert keys(far.take(16)) == [[2, 17]]


def test_rows_are_few_however_short() -> None:
    rows = waiting([1] * 6)
    assert rows.wanted() == 4
    assert keys(rows.take(16)) == [[0, 1, 2, 3]] and keys(rows.take(16)) == [[4, 5]]


def test_rows_wait_for_room() -> None:
    rows = waiting([10, 10, 10, 10, 20, 20])
    assert rows.wanted() == 3 and rows.take(2) is None
    assert keys(rows.take(3)) == [[0, 1, 2]]
    assert rows.wanted() == 1 and keys(rows.take(1)) == [[3]]
    assert rows.wanted() == 2 and rows.take(1) is None
    assert keys(rows.take(2)) == [[4, 5]]
    assert rows.wanted() is None


def test_groups_of_devices_have_rows_of_their_own() -> None:
    shapes = Shapes.of(slots=64, capacity=40, groups=4)
    assert shapes.first == {40: 48} and shapes.groups == 4 and shapes.rows == 2
    assert shapes.behind[1] == 0 < Shapes.of(slots=64, capacity=40).behind[1]
    rows = waiting([10] * 13, groups=2)
    assert rows.wanted() == 6
    assert keys(rows.take(2, 3)) is None
    assert keys(rows.take(6, 0)) == [[0, 1, 2], []]
    assert keys(rows.take(5, 3)) == [[3, 4, 6], [5, 7, 8]]  # the emptiest takes first
    assert keys(rows.take(2, 2)) == [[9, 11], [10, 12]]
    mixed = waiting([60, 50, 40, 14 + 3, 20], groups=2)
    assert keys(mixed.take(4, 4)) == [[0], [1]]
    assert keys(mixed.take(4, 4)) == [[2], [3, 4]]


def test_rows_that_may_become_longest_enter_first() -> None:
    """Alone if need be: whoever waited for company would be the last to finish."""
    rows = waiting([(10, 5), (10, 50), (20, 7), (9, 6), (60, 70), (10, 50), (10, 4)])
    assert keys(rows.take(16)) == [[4]]
    assert keys(rows.take(16)) == [[1, 5, 3]]
    assert keys(rows.take(16)) == [[2]]
    assert keys(rows.take(16)) == [[0, 6]]


def test_a_run_fills_what_is_computed() -> None:
    rows, shapes = workload(tiny(), 512), Shapes.of(slots=128, capacity=3072)
    found, taken, computed = Waiting(rows, shapes, 128), list[Work](), 0
    found.read()
    while parts := found.take(128):
        taken += parts[0]
        computed += shapes.first[shapes.longest(parts[0][0].prompt)]
        found.read()
    assert len(taken) == len(rows)
    assert 0.97 * computed < sum(len(row.prompt) for row in taken) < computed


def test_the_rest_keeps_its_order_and_its_unread_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jrope.batch.packing.WINDOW", 4)
    rows = waiting([60, 20, 10, 10] * 5, slots=2)
    assert len(rows) == 8
    rows.take(2)
    assert [row.key for row in rows.rest()] == [*range(1, 20)]


def test_the_window_is_bounded_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jrope.batch.packing.WINDOW_TOKENS", 100)
    assert len(waiting([60, 30, 20, 20, 20])) == 3
