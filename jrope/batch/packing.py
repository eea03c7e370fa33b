"""Which rows enter together, in which shapes: all of it on the host.

The pieces of a prompt, and the shapes they are computed in, follow from its own length
alone, so that a row's answer does not depend on who else is there.
"""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from jrope.batch.work import Work
from jrope.generation.request import bucket

WIDEST = 512  # tokens of a row in a piece
NARROWEST = 8  # parts of the widest
AT_ONCE = 2  # widest pieces that are computed at a time, in tokens
SHARE = 8  # of the slots: so many that one program fills at most
WINDOW = 4  # rows waiting, in terms of the slots
WINDOW_TOKENS = 2**20  # of their prompts together


@final
@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The shapes that prompts are computed in.

    Args:
      piece: tokens of every piece but a prompt's first, one row at a time.
      first: width -> rows, of first pieces.
    """

    piece: int
    first: Mapping[int, int]

    @classmethod
    def of(cls, slots: int, capacity: int, piece: int = WIDEST) -> "Shapes":
        """Buckets up to the widest piece, each with rows for as many tokens."""
        piece = min(piece, capacity)
        widths = [piece]
        while (narrower := _below(widths[-1])) * NARROWEST >= piece:
            widths.append(narrower)
        most = max(slots // SHARE, 1)
        rows = {w: min(max(AT_ONCE * piece // w, 1), most) for w in reversed(widths)}
        return cls(piece=piece, first=rows)

    def pieces(self, prompt: np.ndarray) -> list[np.ndarray]:
        """A prompt in pieces, all but the first as wide as can be."""
        first = (len(prompt) - 1) % self.piece + 1
        ends = range(first, len(prompt) + 1, self.piece)
        return [prompt[max(end - self.piece, 0) : end] for end in ends]

    def width(self, prompt: np.ndarray) -> int:
        """The width that its first piece is padded to."""
        first = (len(prompt) - 1) % self.piece + 1
        return next(width for width in self.first if width >= first)


def _below(width: int) -> int:
    """The next smaller bucket, or 0."""
    return next((w for w in range(width - 1, 0, -1) if bucket(w) == w), 0)


@final
class Waiting:
    """The rows that no slot has taken yet, by the width of their first piece.

    Only so many are read from `work` at a time.

    Args:
      work: all rows.
      shapes: of the prompts.
      slots: of the engine.
    """

    def __init__(self, work: Iterable[Work], shapes: Shapes, slots: int) -> None:
        self.shapes, self.room = shapes, WINDOW * slots
        self._work = enumerate(work)
        self._rows: dict[int, deque[tuple[int, Work]]] = {}
        self._rows |= {width: deque() for width in shapes.first}
        self._tokens = 0

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def read(self) -> None:
        """Read rows up to the window's size."""
        while len(self) < self.room and self._tokens < WINDOW_TOKENS:
            number, row = next(self._work, (0, None))
            if row is None:
                return
            self._rows[self.shapes.width(row.prompt)].append((number, row))
            self._tokens += len(row.prompt)

    def take(self, free: int) -> tuple[int, list[Work]] | None:
        """A width and rows that enter together into the free slots, if they should."""
        width, count = self._next(free)
        if not 0 < count <= free:
            return None
        rows = [self._rows[width].popleft()[1] for _ in range(count)]
        self._tokens -= sum(len(row.prompt) for row in rows)
        return width, rows

    def wanted(self, free: int) -> int | None:
        """Free slots with which `take` would give rows; None: nobody waits."""
        return self._next(free)[1] or None

    def rest(self) -> Iterator[Work]:
        """Every row that was not taken."""
        read = sorted((row for rows in self._rows.values() for row in rows), key=_first)
        return (row for _, row in itertools.chain(read, self._work))

    def _next(self, free: int) -> tuple[int, int]:
        """A width, and how many rows of it enter next.

        Of full groups the one that waits longest and fits, or else the smallest; where
        none is full, which is at the end, the largest.
        """
        counts = {w: min(len(self._rows[w]), n) for w, n in self.shapes.first.items()}
        full = [w for w, n in self.shapes.first.items() if counts[w] == n]
        fits = [w for w in full if counts[w] <= free]
        if fits:
            width = min(fits, key=lambda w: _first(self._rows[w][0]))
        elif full:
            width = min(full, key=lambda w: counts[w])
        else:
            width = max(counts, key=lambda w: counts[w])
        return width, counts[width]


def _first(row: tuple[int, Work]) -> int:
    return row[0]
