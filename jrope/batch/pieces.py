"""The next pieces of prompts, as the programs of `filling` are given them."""

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from jrope.batch.lowering import no_prompts
from jrope.batch.packing import Shapes
from jrope.batch.reading import Piece
from jrope.batch.seats import Seat
from jrope.batch.slots import Asked
from jrope.generation.past import biases


@dataclass(eq=False)
class Ahead:
    """First pieces of rows, which may not have slots yet.

    Args:
      seats: the rows, by those of the program.
      longest: which program that is.
      piece, asked, planned: what it is given.
      line: what becomes of them, once it is called aside.
    """

    seats: Mapping[int, Seat]
    longest: int
    piece: Piece
    asked: Asked
    planned: np.ndarray
    line: "Future[Any] | None" = None

    @classmethod
    def of(cls, seats: Mapping[int, Seat], shapes: Shapes, own: int) -> "Ahead":
        """Those of some rows, of slots of which a group of devices has so many."""
        longest = shapes.longest(next(iter(seats.values())).work.prompt)
        line = shapes.groups * shapes.rows, shapes.first[longest], own, shapes.groups
        piece, asked, planned, _ = next_pieces(seats, *line)
        return cls(seats, longest, piece, asked, planned)

    def placed(self, own: int) -> Piece:
        """The pieces with the rows' slots, of which a group of devices has so many."""
        rows = np.array(self.piece.rows)
        for i, seat in self.seats.items():
            rows[i] = seat.slot % own
        return replace(self.piece, rows=rows)


Given = tuple[Piece, Asked, np.ndarray, tuple[np.ndarray, np.ndarray]]


def next_pieces(
    seats: Mapping[int, Seat], rows: int, width: int, own: int, lines: int | None = None
) -> Given:
    """Take the next piece of every seat, for a program of so many rows.

    Args:
      seats: by their row of the program, ascending; the other rows are nobody's.
      rows, width, lines: of the program, see `no_prompts`; a line's first rows come
        first.
      own: slots of a group of devices, which numbers its own.

    Returns:
      The arguments of `enter` behind a line, and sources and starts for `share`.
    """
    piece, asked, planned = no_prompts(rows, width, lines)
    sources, starts = np.zeros((2, rows), np.int32)
    filled = np.zeros(len(piece.tokens), np.int32)
    for i, seat in seats.items():
        tokens, row = seat.pieces.popleft(), seat.work
        piece.rows[i], piece.lengths[i] = seat.slot % own, len(tokens)
        line = i * len(filled) // rows
        piece.tokens[line, filled[line] :][: len(tokens)] = tokens
        filled[line] += len(tokens)
        piece.last[i] = not seat.pieces and seat.keeps is None
        sources[i], starts[i] = seat.source, seat.filled
        planned[i] = len(row.prompt) + row.max_new_tokens
        asked.limits[i], asked.seeds[i] = row.max_new_tokens, row.seed % 2**32
        asked.stop_ids[i, : len(row.stop_ids)] = row.stop_ids
        asked.least[i] = row.min_new_tokens
        if row.logit_bias:
            bias = biases([row.logit_bias])
            asked.bias.ids[i], asked.bias.values[i] = bias.ids[0], bias.values[0]
        for name, column in vars(asked.sampler).items():
            column[i] = getattr(row.sampler, name)
        seat.source, seat.filled = seat.slot, seat.filled + len(tokens)
    return piece, asked, planned, (sources, starts)
