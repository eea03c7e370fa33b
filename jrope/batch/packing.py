"""Which rows enter together, in which shapes: all of it on the host.

The pieces of a prompt, and the shapes they are computed in, follow from its own length
alone, so that a row's answer does not depend on who else is there.
"""

import heapq
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import final

import numpy as np

from jrope.batch.work import Work
from jrope.generation.request import bucket

WIDEST = 2048  # tokens of a row in a piece, and of all rows of a program
NARROWEST = 32  # parts of the widest
SHARE = 8  # of the slots: so many that one program fills at most
WINDOW = 16  # rows waiting, in terms of the slots
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
        rows = {w: min(max(piece // w, 1), most) for w in reversed(widths)}
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

    Only so many are read from `work` at a time.  Those that may become longest go
    first: the end, when nobody waits any more, is as long as the last rows are.

    Args:
      work: all rows.
      shapes: of the prompts.
      slots: of the engine.
    """

    def __init__(self, work: Iterable[Work], shapes: Shapes, slots: int) -> None:
        self.shapes, self.room = shapes, WINDOW * slots
        self._work = enumerate(work)
        self._rows: dict[int, list[tuple[int, int, Work]]] = {}  # heaps
        self._rows |= {width: [] for width in shapes.first}
        self._tokens = 0

    def __len__(self) -> int:
        return sum(map(len, self._rows.values()))

    def read(self) -> None:
        """Read rows up to the window's size."""
        while len(self) < self.room and self._tokens < WINDOW_TOKENS:
            number, row = next(self._work, (0, None))
            if row is None:
                return
            entry = -row.max_new_tokens, number, row
            heapq.heappush(self._rows[self.shapes.width(row.prompt)], entry)
            self._tokens += len(row.prompt)

    def take(self, free: int) -> tuple[int, list[Work]] | None:
        """A width and rows that enter together into the free slots, if they should."""
        width, count = self._next()
        if not 0 < count <= free:
            return None
        rows = [heapq.heappop(self._rows[width])[-1] for _ in range(count)]
        self._tokens -= sum(len(row.prompt) for row in rows)
        return width, rows

    def wanted(self) -> int | None:
        """Free slots with which `take` would give rows; None: nobody waits."""
        return self._next()[1] or None

    def rest(self) -> Iterator[Work]:
        """Every row that was not taken."""
        read = sorted(entry[1:] for rows in self._rows.values() for entry in rows)
        return (row for _, row in itertools.chain(read, self._work))

    def _next(self) -> tuple[int, int]:
        """A width, and how many rows of it enter next.

        The group whose first row may become longest, full or not: who waits for company
        may be the last to finish.
        """
        some = [width for width, rows in self._rows.items() if rows]
        width = min(some, key=lambda w: self._rows[w][0][:2], default=self.shapes.piece)
        return width, min(len(self._rows[width]), self.shapes.first[width])
