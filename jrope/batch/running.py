"""One run of an engine: who sits where, and what the device does next."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from itertools import chain
from typing import Any, final

import jax
import numpy as np

from jrope.batch.lowering import not_yet
from jrope.batch.packing import Shapes, Waiting
from jrope.batch.pieces import Ahead, next_pieces
from jrope.batch.prefix import Prefix
from jrope.batch.programs import Programs, Ruled
from jrope.batch.reading import Piece
from jrope.batch.seating import Seating
from jrope.batch.seats import Seat
from jrope.batch.stats import Stats
from jrope.batch.work import Finished, Stopped, Work
from jrope.forms.rules import Held, Rules
from jrope.tree import Params

BURST = 4  # widest pieces of prompts between two chunks, where most slots are live


@final
class Run:
    """Rows through slots of their own.

    Args:
      params: the model's.
      programs: compiled for them, for so many slots and these shapes.
      ruled: that for rows with structures, compiled now if it was not ahead.
      share: that for what follows a prefix, as well.
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
        share: Callable[[], Any],
        shapes: Shapes,
        stats: Stats,
        key: jax.Array,
        work: Iterable[Work],
        stopped: Stopped | None,
    ) -> None:
        self.params, self.programs = params, programs
        self.ruled, self.share, self.shapes = ruled, share, shapes
        self.stats, self.key, self.stopped = stats, key, stopped
        self.waiting = Waiting(work, shapes, stats.slots)
        self.seating = Seating(stats.slots, shapes)
        self.ahead: Ahead | None = None  # the rows that come next
        self.since: float | None = None  # when the device had nothing to do
        self.held: Held | None = None  # of structures
        self.guessing = not_yet()
        self.slots: Any = None

    def rows(self) -> Iterator[Finished]:
        """Everything, as it finishes.

        A chunk is started aside: some devices' clients are busy until it ends, since
        its steps are a loop of which they look at the condition.  Behind it, before the
        host knows what it drew, the device reads the prompts that come next.
        """
        with ThreadPoolExecutor(1) as aside:
            yield from self._rows(aside)

    def _rows(self, aside: Executor) -> Iterator[Finished]:
        begin = time.perf_counter()
        self.slots = self.programs.empty()
        self.waiting.read()
        self.since = time.perf_counter()
        while self.waiting or self.seating.rows() or self.ahead is not None:
            self.fill()
            ahead = self._look_ahead()
            chunk = aside.submit(*self.decoding())
            self._busy()
            behind = False
            if ahead is not None and ahead.line is None:
                ahead.line, behind = aside.submit(*self._reading(ahead)), True
            yield from self.give()
            self.waiting.read()
            asked = time.perf_counter()
            try:
                self.slots, block = chunk.result()
            finally:  # what failed would hold this run, and its cache, by its traceback
                del chunk
            block = jax.device_get(block)
            now = time.perf_counter()
            self.stats.waited += now - asked
            self.stats.seconds += now - begin
            begin, self.since = now, None if behind else now
            self._in_turn()
            self.take(block)
        yield from self.give()
        self.stats.seconds += time.perf_counter() - begin

    def _busy(self) -> None:
        """The device has something to do now."""
        if self.since is not None:
            self.stats.between += time.perf_counter() - self.since
            self.since = None

    def _in_turn(self) -> None:
        """Wait until what reads ahead has been called, where a mesh has the slots.

        Of two programs that two threads call at once, some devices may begin with the
        one and some with the other, and none would get its sums from the others.
        """
        line = None if self.ahead is None else self.ahead.line
        if line is not None and self.programs.layout is not None:
            wait([line])

    def unfinished(self) -> Iterator[Work]:
        """The rows that were not given, those that had begun first."""
        ahead = [] if self.ahead is None else self.ahead.seats.values()
        begun = *self.seating.ended, *self.seating.rows(), *ahead
        return chain((seat.work for seat in begun), self.waiting.rest())

    def fill(self) -> None:
        """Start prompts, or go on with them; not too many where most slots are live."""
        live = sum(not seat.pieces for seat in self.seating.rows())
        most = BURST * self.shapes.groups * self.shapes.piece
        begin, few = self.stats.padded_tokens, 2 * live <= len(self.seating)
        while few or self.stats.padded_tokens - begin < most:
            begun = [seat for seat in self.seating.every() if seat.pieces]
            behind = [seat for seat in begun if seat.shared]
            if behind:
                self._share(behind)
            elif begun:  # the first of each group
                self._extend({x.slot // self.seating.own: x for x in begun[::-1]})
            elif not (self._enter() if self.ahead is None else self._sit()):
                return

    def _enter(self) -> bool:
        """Give slots to the next rows, or first to what they share; False: not now."""
        prefix, free = self.waiting.prefix(), self.seating.free()
        if prefix is not None and prefix not in self.seating.kept:
            if free:
                self._keep(prefix, free[0])
            return bool(free)
        places = self.seating.groups(free)
        taken = self.waiting.take(*map(len, places)) or []
        seats = {
            at * self.shapes.rows + i: self.seating.put(Seat.of(row, self.shapes), slot)
            for at, rows in enumerate(taken)
            for i, (slot, row) in enumerate(zip(places[at], rows, strict=False))
        }
        if not seats:
            return False
        if prefix is None:
            self._begin(seats)
            return True
        source = self.seating.use(prefix)
        for seat in seats.values():
            seat.source = source
        self._share([*seats.values()])
        self.stats.shared_tokens += sum(seat.shared for seat in seats.values())
        return True

    def _keep(self, prefix: Prefix, slot: int) -> None:
        """Compute a prefix in a slot, from which its rows take it."""
        self.seating.keep(prefix, slot)
        seat = Seat.of(prefix.work(), self.shapes, prefix)
        self._begin({0: self.seating.put(seat, slot)})

    def _look_ahead(self) -> Ahead | None:
        """The rows that come next, which no slots are free for yet.

        None where they share a prefix, or a mesh has parts of the slots.
        """
        own = self.ahead is None and self.shapes.groups == 1 and self.waiting
        if own and self.waiting.prefix() is None:
            taken = chain(*self.waiting.take(self.shapes.rows) or [])
            seats = [Seat.of(row, self.shapes) for row in taken]
            self.ahead = self._pieces(dict(enumerate(seats)))
        return self.ahead

    def _pieces(self, seats: Mapping[int, Seat]) -> Ahead:
        """The first pieces of some rows."""
        ahead = Ahead.of(seats, self.shapes, self.seating.own)
        self._count(ahead.piece)
        return ahead

    def _reading(self, ahead: Ahead) -> tuple[Any, ...]:
        """The program that reads them, and what it takes."""
        given = ahead.piece, ahead.planned, self.programs.speculate
        return self.programs.read[ahead.longest], self.params, *given

    def _begin(self, seats: Mapping[int, Seat]) -> None:
        """Read the first pieces of rows that have slots."""
        ahead, begin = self._pieces(seats), time.perf_counter()
        self._busy()
        program, *given = self._reading(ahead)
        line = program(*given)
        self.stats.calls += time.perf_counter() - begin
        self._let_in(ahead, line)

    def _sit(self) -> bool:
        """Give slots to the rows that come next; False: not so many are free."""
        ahead, free = self.ahead, self.seating.free()
        if ahead is None or ahead.line is None or len(free) < len(ahead.seats):
            return False
        line, ahead.line = ahead.line, None
        try:
            read = line.result()
        finally:  # as in `_rows`
            del line
        for slot, seat in zip(free, ahead.seats.values(), strict=False):
            self.seating.put(seat, slot)
        self.ahead = None
        self._let_in(ahead, read)
        return True

    def _let_in(self, ahead: Ahead, line: Any) -> None:
        begin, piece = time.perf_counter(), ahead.placed(self.seating.own)
        self._busy()
        program = self.programs.enter[ahead.longest]
        self.slots = program(self.slots, line, piece, ahead.asked, ahead.planned)
        self.stats.calls += time.perf_counter() - begin

    def _extend(self, begun: Mapping[int, Seat]) -> None:
        """Go on with one row of each group."""
        groups, piece = self.shapes.groups, self.shapes.piece
        piece, *_ = next_pieces(begun, groups, piece, self.seating.own)
        self._put(self.programs.extend, piece)

    def _share(self, seats: list[Seat]) -> None:
        width, rows = self.shapes.behind
        seated = dict(enumerate(seats[:rows]))
        piece, asked, _, held = next_pieces(seated, rows, width, self.seating.own)
        self._put(self.share(), piece, asked, *held)

    def _put(self, program: Any, piece: Piece, *given: Any) -> None:
        begin = time.perf_counter()
        self._busy()
        given = piece, *given, self.programs.speculate
        self.slots = program(self.params, self.slots, *given)
        self.stats.calls += time.perf_counter() - begin
        self._count(piece)

    def _count(self, piece: Piece) -> None:
        self.stats.prefill_tokens += int(piece.lengths.sum())
        self.stats.padded_tokens += piece.tokens.size

    def decoding(self) -> tuple[Any, ...]:
        """The program that decodes until the next rows have room, and what it takes."""
        taken, wanted = self.seating.rows(), self.waiting.wanted()
        if self.ahead is not None:
            wanted = len(self.ahead.seats)
        going = np.array([seat is not None for seat in self.seating.seats])
        enough = len(self.seating) + 1
        if wanted is not None:
            enough = max(wanted - len(self.seating.free()), 1)
        scored = any(seat.work.logprobs is not None for seat in taken)
        given = self.key, going, np.int32(enough)
        program = self.programs.decode[scored]
        if any(seat.work.structure is not None for seat in taken):
            rules = self._rules()
            given, program = (*given, rules), self.ruled((scored, rules.table.size))
        elif self.programs.speculate is not None:
            guesser = self.programs.speculate
            given = (
                *given,
                guesser,
                self.seating.text(self.slots.cache.capacity),
                self.guessing,
            )
        return program, self.params, self.slots, *given

    def _rules(self) -> Rules:
        """What tokens the rows in the slots may draw."""
        if self.held is None:
            size, layout = self.slots.seen.shape[1], self.programs.layout
            self.held = Held(size, len(self.seating), layout)
        free = None, 0
        return self.held.rules(
            [
                free if s is None else (s.work.structure, s.state)
                for s in self.seating.seats
            ]
        )

    def take(self, block: Any) -> None:
        """Note what was drawn; rows that have ended leave their slots."""
        self.stats.chunks += 1
        self.stats.steps += int(block.steps)
        self.stats.slot_steps += int(block.steps) * len(self.seating)
        tokens = live_rows = int(block.counts.sum())
        if block.guessing is not None:
            self.guessing, live_rows = block.guessing, int(block.guessing.rows)
            self.stats.guessing_steps += int(block.guessing.passes)
        self.stats.decode_tokens += tokens
        self.stats.live_rows += live_rows
        for seat in self.seating.rows():
            if not seat.pieces:
                seat.take(block)
            if seat.over:
                self.seating.leave(seat)
        self.seating.let_go(self.waiting)
        spoilt = np.array(block.spoilt)
        spoilt[[seat.slot for seat in self.seating.every()]] = False
        if spoilt.any():
            self.slots = self.programs.clean(self.slots, spoilt)

    def give(self) -> Iterator[Finished]:
        """What has ended, or is stopped by the caller now."""
        for seat in self.seating.ended:
            seat.ask(self.stopped)
        for seat in self.seating.rows():
            seat.ask(self.stopped)
            if seat.over:
                self.seating.leave(seat)
        while self.seating.ended:
            self.stats.rows += 1
            yield self.seating.ended.pop(0).finished()
