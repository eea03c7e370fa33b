"""One run of an engine: who sits where, and what the device does next."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, final

import jax
import numpy as np

from jrope.batch.packing import Shapes, Waiting
from jrope.batch.programs import Programs, Ruled, no_prompts
from jrope.batch.rules import Held, Rules
from jrope.batch.seats import Seat
from jrope.batch.stats import Stats
from jrope.batch.work import Finished, Stopped, Work
from jrope.tree import Params

BURST = 4  # widest pieces of prompts between two chunks, where most slots are live


@final
class Run:
    """Rows through slots of their own.

    Args:
      params: the model's.
      programs: compiled for them, for so many slots and these shapes.
      ruled: that for rows with structures, compiled now if it was not ahead.
      shapes: of prompts.
      stats: to count in.
      key: that tokens are drawn with.
      work: rows that have been checked.
      stopped: may end them.
    """

    def __init__(
        self,
        params: Params,
        programs: Programs,
        ruled: Callable[[Ruled], Any],
        shapes: Shapes,
        stats: Stats,
        key: jax.Array,
        work: Iterable[Work],
        stopped: Stopped | None,
    ) -> None:
        self.params, self.programs, self.ruled = params, programs, ruled
        self.shapes, self.stats, self.key, self.stopped = shapes, stats, key, stopped
        self.waiting = Waiting(work, shapes, stats.slots)
        self.seats: list[Seat | None] = [None] * stats.slots
        self.ended = list[Seat]()  # but not given yet
        self.held: Held | None = None  # of structures
        self.slots: Any = None

    def rows(self) -> Iterator[Finished]:
        """Everything, as it finishes."""
        begin = time.perf_counter()
        self.slots = self.programs.empty()
        self.waiting.read()
        read = time.perf_counter()
        while self.waiting or self.taken():
            self.fill()
            block = self.decode()
            self.stats.between += time.perf_counter() - read
            yield from self.give()
            self.waiting.read()
            wait = time.perf_counter()
            block = jax.device_get(block)
            read = time.perf_counter()
            self.stats.waited += read - wait
            self.stats.seconds += read - begin
            begin = read
            self.take(block)
        yield from self.give()
        self.stats.seconds += time.perf_counter() - begin

    def unfinished(self) -> Iterator[Work]:
        """The rows that were not given, those that had begun first."""
        begun = [seat.work for seat in [*self.ended, *self.taken()]]
        return chain(begun, self.waiting.rest())

    def taken(self) -> list[Seat]:
        """The rows in the slots."""
        return [seat for seat in self.seats if seat is not None]

    def free(self) -> list[int]:
        """The slots without a row."""
        return [slot for slot, seat in enumerate(self.seats) if seat is None]

    def fill(self) -> None:
        """Start prompts, or go on with them; not too many where most slots are live."""
        live = sum(not seat.pieces for seat in self.taken())
        most = BURST * self.shapes.piece if 2 * live > len(self.seats) else None
        begin = self.stats.padded_tokens
        while most is None or self.stats.padded_tokens - begin < most:
            begun = [seat for seat in self.taken() if seat.pieces]
            if begun:
                self._extend(begun[0])
            elif group := self.waiting.take(len(self.free())):
                self._begin(*group)
            else:
                return

    def _begin(self, width: int, group: list[Work]) -> None:
        count = self.shapes.first[width]
        piece, asked, planned = no_prompts(count, width)
        placed = [*zip(self.free(), group, strict=False)]
        placed += [placed[0]] * (count - len(placed))  # what is left of the shape
        for i, (slot, row) in enumerate(placed):
            first, *more = self.shapes.pieces(row.prompt)
            self.seats[slot] = Seat(work=row, slot=slot, pieces=deque(more))
            piece.rows[i], piece.lengths[i], piece.last[i] = slot, len(first), not more
            piece.tokens[i, : len(first)] = first
            planned[i] = len(row.prompt) + row.max_new_tokens
            asked.limits[i], asked.seeds[i] = row.max_new_tokens, row.seed % 2**32
            asked.stop_ids[i, : len(row.stop_ids)] = row.stop_ids
            for name, column in vars(asked.sampler).items():
                column[i] = getattr(row.sampler, name)
        self.slots = self._call(self.programs.begin[width], piece, asked, planned)
        self._count(int(piece.lengths[: len(group)].sum()), piece)

    def _extend(self, seat: Seat) -> None:
        piece, _, _ = no_prompts(1, self.shapes.piece)
        piece.tokens[0] = seat.pieces.popleft()
        piece.rows[0], piece.lengths[0] = seat.slot, self.shapes.piece
        piece.last[0] = not seat.pieces
        self.slots = self._call(self.programs.extend, piece)
        self._count(self.shapes.piece, piece)

    def _count(self, tokens: int, piece: Any) -> None:
        self.stats.prefill_tokens += tokens
        self.stats.padded_tokens += piece.tokens.size

    def decode(self) -> Any:
        """Start a chunk of decoding, until there is room for the next rows."""
        taken, wanted = self.taken(), self.waiting.wanted()
        going = np.array([seat is not None for seat in self.seats])
        enough = len(self.seats) + 1
        if wanted is not None:
            enough = max(wanted - len(self.free()), 1)
        scored = any(seat.work.logprobs is not None for seat in taken)
        given = self.key, going, np.int32(enough)
        program = self.programs.decode[scored]
        if any(seat.work.structure is not None for seat in taken):
            rules = self._rules()
            given, program = (*given, rules), self.ruled((scored, rules.table.size))
        self.slots, block = self._call(program, *given)
        return block

    def _rules(self) -> Rules:
        """What tokens the rows in the slots may draw."""
        if self.held is None:
            self.held = Held(self.slots.seen.shape[1], len(self.seats))
        free = None, 0
        return self.held.rules(
            [free if s is None else (s.work.structure, s.state) for s in self.seats]
        )

    def _call(self, program: Any, *given: Any) -> Any:
        """Start a program, or run it, where the device is the host's own processor."""
        begin = time.perf_counter()
        result = program(self.params, self.slots, *given)
        self.stats.calls += time.perf_counter() - begin
        return result

    def take(self, block: Any) -> None:
        """Note what was drawn; rows that have ended leave their slots."""
        self.stats.chunks += 1
        self.stats.steps += int(block.steps)
        self.stats.slot_steps += int(block.steps) * len(self.seats)
        self.stats.decode_tokens += int(block.counts.sum())
        for seat in self.taken():
            if not seat.pieces:
                seat.take(block)
            if seat.over:
                self._leave(seat)
        spoilt = np.array(block.spoilt)
        spoilt[[seat.slot for seat in self.taken()]] = False
        if spoilt.any():
            self.slots = self.programs.clean(self.slots, spoilt)

    def _leave(self, seat: Seat) -> None:
        self.seats[seat.slot] = None
        self.ended.append(seat)

    def give(self) -> Iterator[Finished]:
        """What has ended, or is stopped by the caller now."""
        for seat in self.ended:
            seat.ask(self.stopped)
        for seat in self.taken():
            seat.ask(self.stopped)
            if seat.over:
                self._leave(seat)
        while self.ended:
            self.stats.rows += 1
            yield self.ended.pop(0).finished()
