"""What `jrope batch` shows while it runs: loading, progress, signals, figures."""

import argparse
import contextlib
import json
import signal
import threading
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from types import FrameType
from typing import Any, cast

import jax
import numpy as np

from jrope.batch.answering import BatchSummary
from jrope.batch.embeddings import Embedder
from jrope.batch.engine import Engine
from jrope.batch.journal import replaced
from jrope.batch.work import Finished, Stopped, Work
from jrope.cli.loading import Loading
from jrope.cli.speculating import Guessing
from jrope.cli.terminal import TimeLeft, duration_text, note
from jrope.errors import JropeError
from jrope.model.config import LlamaConfig


class _NotLoaded(Exception):
    """There is no engine: the end of the run, where an error of `check` is a row's."""


class Live:
    """The engine, which waits for the weights when the first row is wanted."""

    def __init__(
        self,
        args: argparse.Namespace,
        config: LlamaConfig,
        capacity: int,
        loading: Loading,
        guessing: Guessing,
    ) -> None:
        self._args, self._config, self._loading = args, config, loading
        self._guessing = guessing
        self._capacity = capacity
        self._engine: Engine | None = None
        self._embedder: Embedder | None = None
        self._bar: TimeLeft | None = None
        self._seconds: dict[str, float] = {}
        self._signal: int | None = None
        self._structures = False

    def expect(self, *, structures: bool) -> None:
        """As the engine hears it, which is not there yet."""
        self._structures = structures

    def check(self, work: Work) -> None:
        """As the engine does."""
        try:
            engine = self._made()
        except JropeError as error:
            raise _NotLoaded from error
        engine.check(work)

    def run(self, work: Iterable[Work], stopped: Stopped | None) -> Iterator[Finished]:
        """Generate, until a signal comes; without any work nothing is compiled."""
        work = iter(work)
        with self._signals():
            try:
                first = next(work, None)
            except _NotLoaded as error:
                raise cast(JropeError, error.__cause__) from None
            if first is not None:
                yield from self._made().run(chain([first], work), stopped)

    def embed(self, prompts: list[list[int]]) -> np.ndarray:
        """Vectors of texts."""
        if self._embedder is None:
            params, pooling = self._loaded(), self._args.embedding
            self._embedder = Embedder(params, self._config, pooling)
        return self._embedder(prompts)

    def _loaded(self) -> Any:
        self._loading.show()
        params, timing = self._loading.wait()
        self._seconds = {"load_seconds": timing.load}
        return params

    def _made(self) -> Engine:
        if self._engine is None:
            self._engine = Engine(
                self._loaded(),
                self._config,
                capacity=self._capacity,
                slots=self._args.slots,
                cache_dtype=self._args.cache_dtype,
                key=jax.random.key(self._args.seed or 0),
                structures=self._structures,
                speculate=self._guessing.wait(),
                warn=note,
            )
        return self._engine

    @contextlib.contextmanager
    def _signals(self) -> Generator[None]:
        """Note the first Ctrl-C or SIGTERM; the second one acts at once.

        What is ignored stays so, such as Ctrl-C by what a script runs behind itself.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        before = {n: was for n, was in before.items() if was is not signal.SIG_IGN}

        def note_it(number: int, _: FrameType | None) -> None:
            self._signal = number
            signal.signal(number, before[signal.Signals(number)])

        for number in before:
            signal.signal(number, note_it)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def interrupted(self) -> bool:
        """Whether a signal has come."""
        return self._signal is not None

    def tell(self, summary: BatchSummary) -> None:
        """Draw how far the run is."""
        if self._bar is None:
            self._bar = TimeLeft(summary.rows - summary.before)
            self._bar.drawn = 0 if self._bar.shown else self._bar.begin
        rate = summary.new_tokens / max(summary.seconds, 1e-9)
        parts = [f"{summary.answered + summary.failed:,} rows"]
        if self._engine is not None:
            stats = self._engine.stats
            parts.append(f"{rate:,.0f} new tokens/s")
            parts.append(f"{stats.occupancy:.0%} of {stats.slots} slots")
        self._bar.label = ", ".join(parts)
        self._bar.step(1)

    def end(self, summary: BatchSummary) -> int:
        """Tell what was done; the exit status."""
        if self._bar is not None:
            self._bar.label = ""  # the line below tells more
            self._bar.__exit__(None)
        seconds, new = summary.seconds, summary.new_tokens
        note(
            f"{summary.before + summary.answered:,} of {summary.rows:,} rows answered, "
            f"{summary.before:,} of them before; {summary.failed:,} failed; "
            f"{summary.prompt_tokens:,} prompt and {new:,} new tokens in "
            f"{duration_text(seconds)}"
        )
        if self._args.metrics is not None:
            told = {**asdict(summary), **self._seconds}
            if self._engine is not None:
                told["engine"] = asdict(self._engine.stats)
                for name in ("occupancy", "tokens_a_pass"):
                    told["engine"][name] = getattr(self._engine.stats, name)
            with replaced(self._args.metrics) as file:
                file.write(json.dumps(told, indent=1).encode() + b"\n")
        if summary.interrupted:
            note("interrupted; the same command goes on from here")
            return 128 + (self._signal or signal.SIGINT)
        return 1 if summary.failed else 0
