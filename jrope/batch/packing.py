"""Which rows enter together, in which shapes: all of it on the host.

The pieces of a prompt, and the shapes they are computed in, follow from its own length
alone, so that a row's answer does not depend on who else is there.
"""

import itertools
from bisect import insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import numpy as np

from jrope.batch.prefix import Prefix
from jrope.batch.work import Work
from jrope.generation.request import bucket
from jrope.rope import Rope

WIDEST = 2048  # tokens of a row in a piece, and of all rows of a program
NARROWEST = 32  # parts of the widest, and rows of a program at most
SHORTEST = 16  # tokens that a program is for, and what they are a multiple of
BEHIND = 16  # parts of the widest, of a piece behind a prefix
TOGETHER = 4  # parts of it, of all rows of such a program: enough to keep a GPU busy
SHARE = 8  # of the slots: so many that one program fills at most
AHEAD = 4  # programs' rows, among which those are looked for that fill one up
WINDOW = 16  # rows waiting, in terms of the slots
WINDOW_TOKENS = 2**20  # of their prompts together


@final
@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The shapes that prompts are computed in.

    Args:
      piece: tokens of every piece but a prompt's first, one row at a time.
      first: length -> tokens of a program for first pieces up to that length, of a
        group; they lie one behind another.
      rows: of such a program, of a group.
      behind: (width, rows) of pieces behind a prefix; rows 0: none is shared.
      rope: what turns the keys.
      groups: of slots, and of devices that have these; each has its share of the rows.
    """

    piece: int
    first: Mapping[int, int]
    rows: int = 1
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
        """One program for all first pieces, and some for those too short to fill it.

        These are half as long at most, a quarter, ..., and take as many tokens as their
        rows have on average.  All are whole tiles, or a product might round its last
        rows in another way.  On a mesh, of so many groups, no prefix is shared.
        """
        piece, count = min(piece, capacity), groups or 1
        most = max(slots // count // SHARE, 1)
        rows = min(most, NARROWEST)
        parts = (piece >> i for i in range(1, NARROWEST.bit_length()))
        halves = {-(-n // SHORTEST) * SHORTEST for n in parts if n >= SHORTEST}
        halves = [n for n in halves if rows * n < piece]
        shorter = {n: max(n, rows * n * 3 // 4) for n in halves}
        first = sorted({piece: piece, **shorter}.items())
        first = {n: -(-size // SHORTEST) * SHORTEST for n, size in first}
        width = min(bucket(-(-piece // BEHIND)), piece)
        some = min(max(piece // TOGETHER // width, 1), most)
        behind = width, some if slots > 1 and groups is None else 0
        own = partial(cls, rows=rows, rope=rope, groups=count)
        return own(piece=piece, first=first, behind=behind)

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
        """What rows have in common that may enter together: a program, or a prefix."""
        if shared := self.shared(row):
            return Prefix.of(row, shared, self.rope)
        return self.longest(row.prompt)

    def most(self, group: int | Prefix) -> tuple[int, int]:
        """How many rows of a group enter together on a group of devices, and tokens.

        Those of a prefix have shapes of their own, whatever their tokens.
        """
        if isinstance(group, Prefix):
            return self.behind[1], WINDOW_TOKENS
        return self.rows, self.first[group]

    def begins(self, prompt: np.ndarray) -> int:
        """Tokens of its first piece."""
        return (len(prompt) - 1) % self.piece + 1

    def longest(self, prompt: np.ndarray) -> int:
        """The length up to which first pieces enter with its own."""
        return next(n for n in self.first if n >= self.begins(prompt))


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
        self._rows: dict[int | Prefix, list[tuple[int, int, Work]]] = {}  # in order
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
            insort(self._rows.setdefault(self.shapes.group(row), []), entry)
            self._tokens += len(row.prompt)

    def take(self, *free: int) -> list[list[Work]] | None:
        """Rows that enter together, if they should, for each group of devices.

        Args:
          free: slots that each group of devices has free.
        """
        wanted = self.wanted()
        if wanted is None or wanted > sum(free):
            return None
        group = self._next()
        entries, found = self._rows[group], self._together(group, free)
        rows = [[entries[i][-1] for i in part] for part in found]
        for i in sorted(itertools.chain(*found), reverse=True):
            self._tokens -= len(entries.pop(i)[-1].prompt)
        if not entries:
            del self._rows[group]
        return rows

    def prefix(self) -> Prefix | None:
        """What the next rows begin with, where they share it."""
        group = self._next() if self._rows else None
        return group if isinstance(group, Prefix) else None

    def __contains__(self, group: int | Prefix) -> bool:
        return group in self._rows

    def wanted(self) -> int | None:
        """Free slots with which `take` would give rows; None: nobody waits."""
        if not self._rows:
            return None
        room = [len(self)] * self.shapes.groups
        return sum(map(len, self._together(self._next(), room)))

    def rest(self) -> Iterator[Work]:
        """Every row that was not taken."""
        read = sorted(entry[1:] for rows in self._rows.values() for entry in rows)
        return (row for _, row in itertools.chain(read, self._work))

    def _next(self) -> int | Prefix:
        """The group whose first row may become longest, if it fills a program or not.

        Who waits for company may be the last to finish.
        """
        return min(self._rows, key=lambda group: self._rows[group][0][:2])

    def _together(self, group: int | Prefix, free: Sequence[int]) -> list[list[int]]:
        """Which rows of a group enter next, for each group of devices.

        One after the other where most slots are free, those left out that do not fit.
        """
        rows, tokens = self.shapes.most(group)
        found, left = [list[int]() for _ in free], [tokens] * len(free)
        ahead = self._rows[group][: AHEAD * rows * len(free)]
        for i, (*_, row) in enumerate(ahead):
            size = self.shapes.begins(row.prompt)
            fits = [
                (slots - len(part), at)
                for at, (slots, part) in enumerate(zip(free, found, strict=True))
                if len(part) < min(slots, rows) and size <= left[at]
            ]
            if fits:
                _, at = max(fits, key=lambda fit: (fit[0], left[fit[1]]))
                found[at].append(i)
                left[at] -= size
        return found
