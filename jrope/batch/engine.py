"""Continuous batching: rows enter and leave a fixed number of slots as they finish.

The device runs `decode` until enough rows have finished to fill their slots again, in
one program for all of them, and behind it reads the prompts of the next rows.  The
host meanwhile reads what was drawn, puts these rows into free slots, starts the next
chunk of decoding, and only then deals with the results.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, final

import jax

from jrope.batch.admission import (
    check_model,
    check_slots,
    check_work,
    fit_guesser,
    without_far_windows,
)
from jrope.batch.compiling import compiling, platform_of
from jrope.batch.drafting import share_of_step
from jrope.batch.lowering import lower_decode, lower_share
from jrope.batch.packing import WIDEST, Shapes
from jrope.batch.pauses import in_vain
from jrope.batch.programs import (
    Programs,
    Ruled,
    compile_programs,
    decodings,
    names,
)
from jrope.batch.room import free_memory, slots_for
from jrope.batch.running import Run
from jrope.batch.stats import Stats
from jrope.batch.work import Finished, Stopped, Work
from jrope.errors import check_count
from jrope.forms.rules import ENTRIES
from jrope.generation.guesser import Guesser
from jrope.model.config import LlamaConfig
from jrope.model.int8_cache import CacheDtype, check_cache_dtype
from jrope.sharding.meshes import layout_of, stand_whole
from jrope.tree import Params

CHUNK = 32  # decode steps between two looks at the device, at most
ROUND = 16  # the capacity is a multiple of this,
BLOCK = 64  # on a CPU from two of these on, by which it reads slots, of this


@final
class Engine:
    """Generates any number of rows in a fixed number of slots.

    A row's answer is that of `jrope.generate` for its prompt, seed and sampler, to the
    rounding of other shapes; with the same slots, capacity and piece it is the same to
    the bit, whoever is beside it and in whatever order.

    Args:
      params, config: the model.  On a mesh, where the parameters stand decides what is
        split over what: see `jrope.shard`.
      capacity: tokens of the longest row, prompt and new ones; it may be longer than a
        window.
      slots: rows that are decoded at once; None: as `slots_for` finds.
      chunk: decode steps between two looks at the device, at most.
      piece: tokens of a prompt at a time.
      cache_dtype: "int8" for half of the cache's memory, as `generate` takes it.
      key: the base key; None: jax.random.key(0).
      logprobs: whether rows may ask for log-probabilities, which takes a program more.
      structures: whether rows are expected to have them, which takes as many again to
        decode with; if not, those are compiled when the first such row comes.
      speculate: guesses tokens that one pass of the model then checks, where over all
        live rows it pays; in a program of its own, instead of the other.  Answers are
        the same to the rounding of other shapes, but no more to the bit.  While a row
        whose answer has a form is in a slot, nothing is guessed.  Not with rows longer
        than a window.  A `Draft` reads every prompt, too, and has a cache of its own
        beside the model's, of its kind.
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
        cache_dtype: CacheDtype | None = None,
        key: jax.Array | None = None,
        logprobs: bool = True,
        structures: bool = False,
        speculate: Guesser | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        check_model(params, config)
        check_count("capacity", capacity, 2)
        guesses = getattr(speculate, "tokens", 0)  # stand behind the longest row
        width = capacity + guesses
        cpu = (platform_of(params) or jax.default_backend()) == "cpu"
        whole = BLOCK if cpu and width > 2 * BLOCK else ROUND
        width = -(-width // whole) * whole
        config, longest = without_far_windows(config, capacity, width)
        check_cache_dtype(cache_dtype)
        if speculate is not None:
            speculate = fit_guesser(speculate, params, config, capacity, width)
        self.layout = layout = layout_of(params)
        if slots is None:
            how: Any = {"structures": structures, "cache_dtype": cache_dtype}
            how |= {"layout": layout, "speculate": speculate}
            slots = slots_for(params, config, width, free_memory(layout), **how)
        check_slots(slots, layout)
        for name, value in (("chunk", chunk), ("piece", piece)):
            check_count(name, value, 1)
        self.params, self.config, self.chunk, self.piece = params, config, chunk, piece
        self.capacity, self.width = min(width - guesses, longest), width
        self.speculate, self.cache_dtype = speculate, cache_dtype
        self.key = stand_whole(jax.random.key(0) if key is None else key, layout)
        self.logprobs, self.structures = logprobs, structures
        self.stats = Stats(slots=slots)
        self._warn = warn or warnings.warn
        self._programs: Programs | None = None

    @property
    def shapes(self) -> Shapes:
        """Those that prompts are computed in."""
        rope = self.config.rope
        groups = None if self.layout is None else self.groups
        return Shapes.of(self.stats.slots, self.width, self.piece, rope, groups)

    @property
    def groups(self) -> int:
        """Into so many the mesh splits the slots."""
        layout = self.layout
        return 1 if layout is None else layout.size(layout.axes.batch)

    @property
    def programs(self) -> tuple[str, ...]:
        """What `compile` compiles, by name, and what had to be compiled after it."""
        given = partial(names, self.shapes, self.logprobs, self.speculate is not None)
        if (made := self._programs) is None:
            return given(self._expected())
        return given(made.ruled, made.share)

    def _expected(self) -> list[Ruled]:
        return decodings(self.logprobs, ENTRIES) if self.structures else []

    def compile(self) -> Programs:
        """Compile all programs, if that has not been done."""
        if self._programs is None:
            self._tell_vain()
            self._programs = compile_programs(
                self.params,
                self.config,
                self.shapes,
                **self._how(),
                logprobs=self.logprobs,
                ruled=self._expected(),
                warm=jax.default_backend() != "cpu",
            )
            self.stats.compiled += len(self.programs)
            self.stats.compile_seconds += self._programs.seconds
        return self._programs

    def _tell_vain(self) -> None:
        if (guesser := self.speculate) is not None:
            share = share_of_step(guesser, self.params, self.config)
            if (why := in_vain(self.stats.slots, guesser, share)) is not None:
                self._warn(why)

    def _how(self) -> dict[str, Any]:
        own = {"layout": self.layout, "size": self.chunk, "key": self.key}
        return {**self._cache(), **own}

    def _cache(self) -> dict[str, Any]:
        same: dict[str, Any] = {"slots": self.stats.slots, "capacity": self.width}
        return {**same, "cache_dtype": self.cache_dtype, "speculate": self.speculate}

    def _ruled(self, way: Ruled) -> Any:
        """The program to decode rows with structures, compiled if it is not there."""
        how = {**self._how(), "scored": way[0], "entries": way[1]}
        lower = partial(lower_decode, self.params, self.config, **how)
        slots, ready = self.stats.slots, self.compile().ruled
        return self._later(ready, way, lambda: lower()[1], slots)

    def _share(self) -> Any:
        """The program for what follows a prefix, compiled when the first is shared."""
        way = width, rows = self.shapes.behind
        how = {**self._cache(), "behind": way}
        lower = partial(lower_share, self.params, self.config, **how)
        return self._later(self.compile().share, way, lower, width * rows)

    def _later(
        self, ready: dict[Any, Any], way: Any, lower: Callable[[], Any], tokens: int
    ) -> Any:
        if way not in ready:
            begin = time.perf_counter()
            how = self.params, tokens, self.layout, self.speculate
            ready[way] = compiling(lower(), *how)()
            self.stats.compiled += 1
            self.stats.compile_seconds += time.perf_counter() - begin
        return ready[way]

    def expect(self, *, structures: bool) -> None:
        """Say, before anything is compiled, whether rows will have structures."""
        self.structures = self.structures or structures

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
        rows = self._checked(work)
        while True:
            run = None
            try:
                own = self.params, self.compile(), self._ruled, self._share
                run = Run(*own, self.shapes, self.stats, self.key, rows, stopped)
                yield from run.rows()
                return
            except jax.errors.JaxRuntimeError as error:
                fewest = self.stats.slots <= self.groups
                if "RESOURCE_EXHAUSTED" not in str(error) or fewest:
                    raise
            rows = rows if run is None else run.unfinished()
            del run  # and its cache
            self._halve()

    def _checked(self, work: Iterable[Work]) -> Iterator[Work]:
        for row in work:
            self.check(row)
            yield row

    def _halve(self) -> None:
        had, groups = self.stats.slots, self.groups
        now = had // groups // 2 * groups
        self.stats.slots, self._programs = now, None
        self.stats.restarts += 1
        self._warn(
            f"the device ran out of memory with {had} rows at once: going on with "
            f"{now}; unfinished rows begin again"
        )
