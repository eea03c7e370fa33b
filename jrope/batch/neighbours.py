"""What the prompts of a file share with those before them, so that it is computed once.

It follows from the file alone, never from who is beside a row or has its answer:
prompts that are computed in other pieces round otherwise.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from itertools import chain, islice
from typing import TypeAlias, final

import numpy as np

from jrope.batch.prefix import frequencies
from jrope.batch.rows import BatchSettings, Row, read_row
from jrope.batch.source import Line
from jrope.errors import RowError

LAST = 16  # prompts of the input that one is compared with
AGREE = 2  # so many of them have what it takes from another slot

_Prompt: TypeAlias = tuple[np.ndarray, bytes]  # ids, and what turns their keys


@final
class Neighbours:
    """Prompts of a file, and what they share with those just before them.

    Args:
      settings: that rows are read with.
    """

    def __init__(self, settings: BatchSettings) -> None:
        self._settings = settings
        self._rows = deque[Callable[[], list[_Prompt]]](maxlen=LAST)

    def passed(self, line: Line) -> None:
        """Note a row that is answered; it is read if one behind it asks."""
        self._rows.append(cache(partial(self._read, line)))

    def shared(self, row: Row) -> list[int]:
        """For each of a row's prompts, how many tokens it may take from another slot.

        They are the first tokens of two earlier prompts, too, or those of all `n`
        answers, whichever saves more.
        """
        own, n = self._prompts(row), row.request.n
        found = list[int]()
        for i, prompt in enumerate(own):
            before = chain(own[:i][::-1], self._before())
            shared, whole = _agreed(prompt, islice(before, LAST)), len(prompt[0]) - 1
            found.append(shared if n * shared >= (n - 1) * whole else whole)
        self._rows.append(lambda: own)
        return found

    def _before(self) -> Iterator[_Prompt]:
        """The prompts of earlier rows, the nearest first."""
        return chain.from_iterable(rows()[::-1] for rows in reversed(self._rows))

    def _read(self, line: Line) -> list[_Prompt]:
        try:
            return self._prompts(read_row(line, self._settings))
        except RowError:  # it had its answer before something else changed
            return []

    def _prompts(self, row: Row) -> list[_Prompt]:
        rope = self._settings.config.rope
        if row.form == "embeddings":
            return []
        return [
            (np.array(ids, np.int32), frequencies(rope, len(ids) + limit))
            for ids, limit in zip(row.prompts, row.limits, strict=True)
        ]


def _agreed(prompt: _Prompt, others: Iterable[_Prompt]) -> int:
    """The most tokens that a prompt and `AGREE` others begin with, not its last one."""
    common = sorted((_common(prompt, other) for other in others), reverse=True)
    return 0 if len(common) < AGREE else min(common[AGREE - 1], len(prompt[0]) - 1)


def _common(a: _Prompt, b: _Prompt) -> int:
    if a[1] != b[1]:
        return 0
    size = min(len(a[0]), len(b[0]))
    differ = np.flatnonzero(a[0][:size] != b[0][:size])
    return int(differ[0]) if differ.size else size
