"""The next pieces of prompts, as the programs of `filling` are given them."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jrope.batch.filling import Piece
from jrope.batch.programs import no_prompts
from jrope.batch.seats import Seat
from jrope.batch.slots import Asked

Given = tuple[Piece, Asked, np.ndarray, tuple[np.ndarray, np.ndarray]]


def next_pieces(seats: Sequence[Seat], rows: int, width: int) -> Given:
    """Take the next piece of every seat, for a program of so many rows.

    Returns:
      The arguments of `begin`, and sources and starts for `share`.  What is left of the
      shape is the first seat once more.
    """
    piece, asked, planned = no_prompts(rows, width)
    sources, starts = np.zeros((2, rows), np.int32)
    for i, seat in enumerate(seats):
        own, row = seat.pieces.popleft(), seat.work
        piece.rows[i], piece.lengths[i] = seat.slot, len(own)
        piece.tokens[i, : len(own)] = own
        piece.last[i] = not seat.pieces and seat.keeps is None
        sources[i], starts[i] = seat.source, seat.filled
        planned[i] = len(row.prompt) + row.max_new_tokens
        asked.limits[i], asked.seeds[i] = row.max_new_tokens, row.seed % 2**32
        asked.stop_ids[i, : len(row.stop_ids)] = row.stop_ids
        for name, column in vars(asked.sampler).items():
            column[i] = getattr(row.sampler, name)
        seat.source, seat.filled = seat.slot, seat.filled + len(own)
    given: Any = piece, asked, planned, (sources, starts)
    for column in jax.tree.leaves(given):
        column[len(seats) :] = column[0]
    return given
