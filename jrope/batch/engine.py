"""Continuous batching: rows enter and leave a fixed number of slots as they finish.

The device runs `decode` until enough rows have finished to fill their slots again, in
one program for all of them; the host reads what was drawn, starts the prompts of the
next rows and the next chunk of decoding, and only then deals with the results, while
the device is at work.
"""

import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, final

import jax
import numpy as np

from jrope.batch.admission import check_model, check_work
from jrope.batch.packing import WIDEST, Shapes, Waiting
from jrope.batch.programs import Programs, compile_programs, names, no_prompts
from jrope.batch.room import free_memory, slots_for
from jrope.batch.seats import Seat
from jrope.batch.stats import Stats
from jrope.batch.work import Finished, Stopped, Work
from jrope.errors import check_count
from jrope.model.config import LlamaConfig
from jrope.tree import Params

CHUNK = 32  # decode steps between two looks at the device, at most
BURST = 8  # widest pieces of prompts between two chunks, where most slots are live
ROUND = 16  # the capacity is a multiple of this


@final
class Engine:
    """Generates any number of rows in a fixed number of slots.

    A row's answer is that of `jrope.generate` for its prompt, seed and sampler, to the
    rounding of other shapes; with the same slots, capacity and piece it is the same to
    the bit, whoever is beside it and in whatever order.

    Args:
      params, config: the model, on one device.
      capacity: tokens of the longest row, prompt and new ones.
      slots: rows that are decoded at once; None: as `slots_for` finds.
      chunk: decode steps between two looks at the device, at most.
      piece: tokens of a prompt at a time.
      key: the base key; None: jax.random.key(0).
      logprobs: whether rows may ask for log-probabilities, which takes a program more.
      warn: told, in a sentence, what happened; None: `warnings.warn`.

    Attributes:
      stats: what was done so far.
    """

    def __init__(
        self,
        params: Params,
        config: LlamaConfig,
        *,
        capacity: int,
        slots: int | None = None,
        chunk: int = CHUNK,
        piece: int = WIDEST,
        key: jax.Array | None = None,
        logprobs: bool = True,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        check_model(params, config)
        check_count("capacity", capacity, 2)
        capacity = -(-capacity // ROUND) * ROUND
        if slots is None:
            slots = slots_for(params, config, capacity, free_memory())
        for name, value in (("slots", slots), ("chunk", chunk), ("piece", piece)):
            check_count(name, value, 1)
        self.params, self.config, self.chunk, self.piece = params, config, chunk, piece
        self.capacity = capacity
        self.key = jax.random.key(0) if key is None else key
        self.logprobs, self.stats = logprobs, Stats(slots=slots)
        self._warn = warn or warnings.warn
        self._programs: Programs | None = None

    @property
    def shapes(self) -> Shapes:
        """Those that prompts are computed in."""
        return Shapes.of(self.stats.slots, self.capacity, self.piece)

    @property
    def programs(self) -> tuple[str, ...]:
        """The programs by name; `compile` compiles them, and nothing is compiled later."""
        return names(self.shapes, self.logprobs)

    def compile(self) -> Programs:
        """Compile all programs, if that has not been done."""
        if self._programs is None:
            self._programs = compile_programs(
                self.params,
                self.config,
                self.shapes,
                slots=self.stats.slots,
                capacity=self.capacity,
                size=self.chunk,
                key=self.key,
                logprobs=self.logprobs,
            )
            self.stats.compiled += len(self.programs)
            self.stats.compile_seconds += self._programs.seconds
        return self._programs

    def check(self, work: Work) -> None:
        """Raise a JropeError that says why this engine cannot run a row."""
        check_work(work, self.config, self.capacity, self.logprobs)

    def run(
        self, work: Iterable[Work], stopped: Stopped | None = None
    ) -> Iterator[Finished]:
        """Generate every row, and give each as soon as it is finished.

        Rows are read from `work` while others are computed.  Where the device runs out
        of memory, the rows that are not finished begin again in half of the slots.

        Raises:
          JropeError: a row that this engine cannot run; see `check`.
        """
        while True:
            run = _Run(self, self.compile(), work, stopped)
            try:
                yield from run.rows()
                return
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error) or self.stats.slots == 1:
                    raise
            work = run.unfinished()
            del run  # and its cache
            self._halve()

    def _halve(self) -> None:
        had = self.stats.slots
        self.stats.slots, self._programs = had // 2, None
        self.stats.restarts += 1
        self._warn(
            f"the device ran out of memory with {had} rows at once: going on with "
            f"{had // 2}; unfinished rows begin again"
        )


class _Run:
    """One run over rows, with the slots of its own."""

    def __init__(
        self,
        engine: Engine,
        programs: Programs,
        work: Iterable[Work],
        stopped: Stopped | None,
    ) -> None:
        self.engine, self.programs, self.stopped = engine, programs, stopped
        self.params, self.stats = engine.params, engine.stats
        self.shapes, count = engine.shapes, engine.stats.slots
        self.waiting = Waiting(self._checked(work), self.shapes, count)
        self.seats: list[Seat | None] = [None] * count
        self.ended = list[Seat]()  # but not given yet
        self.slots: Any = None

    def _checked(self, work: Iterable[Work]) -> Iterator[Work]:
        for row in work:
            self.engine.check(row)
            yield row

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
        """Start prompts, or go on with them: few at a time where most slots are live."""
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
        shape = self.shapes.first[width], width
        piece, asked, planned = no_prompts(*shape, len(self.seats))
        for i, (slot, row) in enumerate(zip(self.free(), group, strict=False)):
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
        self._count(piece)

    def _extend(self, seat: Seat) -> None:
        piece, _, _ = no_prompts(1, self.shapes.piece, len(self.seats))
        piece.tokens[0] = seat.pieces.popleft()
        piece.rows[0], piece.lengths[0] = seat.slot, self.shapes.piece
        piece.last[0] = not seat.pieces
        self.slots = self._call(self.programs.extend, piece)
        self._count(piece)

    def _count(self, piece: Any) -> None:
        self.stats.prefill_tokens += int(piece.lengths.sum())
        self.stats.padded_tokens += piece.tokens.size

    def decode(self) -> Any:
        """Start a chunk of decoding, until there is room for the next rows."""
        taken, wanted = self.taken(), self.waiting.wanted(len(self.free()))
        going = np.array([seat is not None for seat in self.seats])
        enough = len(self.seats) + 1
        if wanted is not None:
            enough = max(wanted - len(self.free()), 1)
        scored = any(seat.work.logprobs is not None for seat in taken)
        given = self.engine.key, going, np.int32(enough)
        self.slots, block = self._call(self.programs.decode[scored], *given)
        return block

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
        spoilt = ~block.finite
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
