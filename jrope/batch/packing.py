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

from jrope.batch.prefix import Prefix
from jrope.batch.work import Work
from jrope.generation.request import bucket
from jrope.rope import Rope

WIDEST = 2048  # tokens of a row in a piece, and of all rows of a program
NARROWEST = 32  # parts of the widest
BEHIND = 16  # parts of the widest, of a piece behind a prefix
TOGETHER = 4  # parts of it, of all rows of such a program: enough to keep a GPU busy
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
      behind: (width, rows) of pieces behind a prefix; rows 0: none is shared.
      rope: what turns the keys.
      groups: of slots, and of devices that have these; each has its share of the rows.
    """

    piece: int
    first: Mapping[int, int]
    behind: tuple[int, int] = 1, 0
    rope: Rope | None = None
    groups: int = 1

    @classmethod
    def of(
        cls,
        slots: int,
        capacity: int,
        piece: int = WIDEST,
        rope: Rope | None = None,
        groups: int | None = None,
    ) -> "Shapes":
        """Buckets up to the widest piece, each with rows for as many tokens a group.

        On a mesh, of so many groups, no prefix is shared.
        """
        piece = min(piece, capacity)
        widths = [piece]
        while (narrower := _below(widths[-1])) * NARROWEST >= piece:
            widths.append(narrower)
        count = groups or 1
        most = max(slots // count // SHARE, 1)
        rows = {w: count * min(max(piece // w, 1), most) for w in reversed(widths)}
        width = next(w for w in rows if w * BEHIND >= piece)
        some = min(max(piece // TOGETHER // width, 1), most)
        behind = width, some if slots > 1 and groups is None else 0
        return cls(piece=piece, first=rows, behind=behind, rope=rope, groups=count)

    def pieces(self, prompt: np.ndarray, shared: int = 0) -> list[np.ndarray]:
        """A prompt in pieces, all but the first as wide as can be.

        Those behind its first tokens, where these are shared.
        """
        width, prompt = self.behind[0] if shared else self.piece, prompt[shared:]
        first = (len(prompt) - 1) % width + 1
        ends = range(first, len(prompt) + 1, width)
        return [prompt[max(end - width, 0) : end] for end in ends]

    def shared(self, row: Work) -> int:
        """How many of its first tokens a row takes from another slot.

        Half pieces, so that a token that some rows share by chance makes no prefix of
        its own; two whole ones and half of the prompt at least, else it gains little.
        """
        width, rows = self.behind
        shared = row.shared - row.shared % max(width // 2, 1)
        enough = shared >= max(2 * width, len(row.prompt) - shared)
        return shared if rows and enough else 0

    def group(self, row: Work) -> int | Prefix:
        """What rows have in common that may enter together: a width, or a prefix."""
        if shared := self.shared(row):
            return Prefix.of(row, shared, self.rope)
        return self.width(row.prompt)

    def rows(self, group: int | Prefix) -> int:
        """How many rows of a group enter together."""
        return self.behind[1] if isinstance(group, Prefix) else self.first[group]

    def width(self, prompt: np.ndarray) -> int:
        """The width that its first piece is padded to."""
        first = (len(prompt) - 1) % self.piece + 1
        return next(width for width in self.first if width >= first)


def _below(width: int) -> int:
    """The next smaller bucket, or 0."""
    return next((w for w in range(width - 1, 0, -1) if bucket(w) == w), 0)


@final
class Waiting:
    """The rows that no slot has taken yet, by what they enter together with.

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
        self._rows: dict[int | Prefix, list[tuple[int, int, Work]]] = {}  # heaps
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
            heapq.heappush(self._rows.setdefault(self.shapes.group(row), []), entry)
            self._tokens += len(row.prompt)

    def take(self, *free: int) -> tuple[int | Prefix, list[Work]] | None:
        """A group and rows that enter together, if they should.

        Args:
          free: slots that each group of devices has free.
        """
        group, count = self._next()
        if not 0 < count <= sum(free):
            return None
        most = self.shapes.rows(group) // len(free)
        count = min(count, sum(min(slots, most) for slots in free))
        rows = [heapq.heappop(self._rows[group])[-1] for _ in range(count)]
        if not self._rows[group]:
            del self._rows[group]
        self._tokens -= sum(len(row.prompt) for row in rows)
        return group, rows

    def prefix(self) -> Prefix | None:
        """What the next rows begin with, where they share it."""
        group, _ = self._next()
        return group if isinstance(group, Prefix) else None

    def __contains__(self, group: int | Prefix) -> bool:
        return group in self._rows

    def wanted(self) -> int | None:
        """Free slots with which `take` would give rows; None: nobody waits."""
        return self._next()[1] or None

    def rest(self) -> Iterator[Work]:
        """Every row that was not taken."""
        read = sorted(entry[1:] for rows in self._rows.values() for entry in rows)
        return (row for _, row in itertools.chain(read, self._work))

    def _next(self) -> tuple[int | Prefix, int]:
        """A group, and how many rows of it enter next.

        The group whose first row may become longest, full or not: who waits for company
        may be the last to finish.
        """
        if not self._rows:
            return 0, 0
        group = min(self._rows, key=lambda group: self._rows[group][0][:2])
        return group, min(len(self._rows[group]), self.shapes.rows(group))
