"""Which rows enter together, in which shapes."""

from typing import Any

import numpy as np
import pytest
from batch_helpers import work

from jrope.batch.packing import Shapes, Waiting
from jrope.batch.work import Work


def test_shapes_are_few_and_hold_as_many_tokens() -> None:
    shapes = Shapes.of(slots=64, capacity=3072)
    assert shapes.piece == 2048
    assert [*shapes.first] == [64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048]
    assert [*shapes.first.values()] == [8, 8, 8, 8, 8, 5, 4, 2, 2, 1, 1]
    assert Shapes.of(slots=5, capacity=80, piece=16).first == {16: 1}
    assert Shapes.of(slots=64, capacity=40).first == {16: 2, 24: 1, 32: 1, 40: 1}


@pytest.mark.parametrize("size", [1, 15, 16, 17, 32, 33, 47, 100])
def test_all_pieces_but_the_first_are_whole(size: int) -> None:
    shapes, prompt = Shapes.of(slots=8, capacity=128, piece=16), np.arange(size)
    first, *more = shapes.pieces(prompt)
    assert 1 <= len(first) <= 16 and all(len(piece) == 16 for piece in more)
    np.testing.assert_array_equal(np.concatenate([first, *more]), prompt)
    assert shapes.width(prompt) >= len(first)
    assert all(w < len(first) or w >= shapes.width(prompt) for w in shapes.first)


def waiting(sizes: list[int], slots: int = 16) -> Waiting:
    shapes = Shapes(piece=64, first={16: 4, 32: 2, 64: 1})
    found = Waiting([work(i, n, 1) for i, n in enumerate(sizes)], shapes, slots)
    found.read()
    return found


def keys(group: tuple[int, list[Work]] | None) -> Any:
    return group and (group[0], [row.key for row in group[1]])


def test_rows_enter_in_full_groups_and_in_order() -> None:
    rows = waiting([10, 20, 60, 10, 10, 30, 10, 10])
    assert keys(rows.take(16)) == (16, [0, 3, 4, 6])
    assert keys(rows.take(16)) == (32, [1, 5])
    assert keys(rows.take(16)) == (64, [2])
    assert keys(rows.take(16)) == (16, [7])  # the last may be few
    assert rows.take(16) is None and len(rows) == 0


def test_a_group_that_does_not_fit_waits_for_room() -> None:
    rows = waiting([10, 10, 10, 10, 20, 20])
    assert rows.wanted() == 4 and rows.take(3) is None
    assert keys(rows.take(4)) == (16, [0, 1, 2, 3])
    assert rows.wanted() == 2
    assert keys(rows.take(2)) == (32, [4, 5])
    assert rows.wanted() is None


def test_groups_of_devices_have_as_many_rows() -> None:
    shapes = Shapes.of(slots=64, capacity=40, groups=4)
    assert shapes.first == {16: 8, 24: 4, 32: 4, 40: 4} and shapes.groups == 4
    assert shapes.behind[1] == 0 < Shapes.of(slots=64, capacity=40).behind[1]
    assert Shapes.of(slots=8, capacity=40, groups=8).first[16] == 8
    rows = waiting([10] * 11, slots=8)
    assert keys(rows.take(2, 1)) is None
    assert keys(rows.take(4, 0)) == (16, [0, 1])  # each has two of the shape's four
    assert keys(rows.take(3, 1)) == (16, [2, 3, 4])
    assert keys(rows.take(2, 2)) == (16, [5, 6, 7, 8])


def test_rows_that_may_become_longest_enter_first() -> None:
    """Alone if need be: whoever waited for company would be the last to finish."""
    sizes = [(10, 5), (10, 50), (20, 7), (10, 6), (60, 70), (10, 50), (10, 4)]
    shapes = Shapes(piece=64, first={16: 4, 32: 2, 64: 1})
    rows = Waiting([work(i, *size) for i, size in enumerate(sizes)], shapes, 16)
    rows.read()
    assert keys(rows.take(16)) == (64, [4])
    assert keys(rows.take(16)) == (16, [1, 5, 3, 0])
    assert keys(rows.take(16)) == (32, [2])
    assert keys(rows.take(16)) == (16, [6])


def test_the_rest_keeps_its_order_and_its_unread_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("jrope.batch.packing.WINDOW", 4)
    rows = waiting([60, 20, 10, 10] * 5, slots=2)
    assert len(rows) == 8
    rows.take(1)
    assert [row.key for row in rows.rest()] == [*range(1, 20)]


def test_the_window_is_bounded_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jrope.batch.packing.WINDOW_TOKENS", 100)
    assert len(waiting([60, 30, 20, 20, 20])) == 3
