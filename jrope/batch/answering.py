"""Rows on their way through the engine, and what comes of them into the output."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, cast, final

import numpy as np

from jrope.batch.answers import Record, answer, failure
from jrope.batch.embeddings import embedding
from jrope.batch.journal import Output
from jrope.batch.neighbours import Neighbours
from jrope.batch.rows import BatchSettings, Row, read_row
from jrope.batch.source import Index, Line
from jrope.batch.text import tokens_to_stop
from jrope.batch.work import Finished, Stopped, Work
from jrope.errors import JropeError, RowError

_TEXTS = 64  # to embed together


class Lines(Protocol):
    """Where rows come from, such as a `Source`."""

    @property
    def path(self) -> Path:
        """What errors name."""
        ...

    def mine(self) -> Iterator[Line]:
        """The rows."""
        ...


class Engine(Protocol):
    """What generates: it takes work as it has room, and gives it back in any order."""

    def expect(self, *, structures: bool) -> None:
        """Hear, before any work, whether some of it has a structure."""
        ...

    def check(self, work: Work) -> None:
        """Raise a JropeError that says why it cannot run this."""
        ...

    def run(self, work: Iterable[Work], stopped: Stopped | None) -> Iterator[Finished]:
        """Generate every sequence."""
        ...


@final
@dataclass
class BatchSummary:
    """How far a run has come.

    Args:
      rows: of the input, or of this shard of it.
      before: that an earlier run answered.
      answered, failed: by this one.
      prompt_tokens, new_tokens: of the answered rows.
      running: sequences that the engine has taken and not given back.
      seconds: since the engine began, without loading and compiling.
      interrupted: whether rows are left because the caller wished to stop.
    """

    rows: int
    before: int
    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    running: int = 0
    seconds: float = 0.0
    interrupted: bool = False


Key: TypeAlias = tuple[str, int]  # a line's id, and which of its sequences
Embed: TypeAlias = Callable[[list[list[int]]], np.ndarray]
Progress = Callable[[BatchSummary], None]


@final
@dataclass
class _Pending:
    """A row of which some sequences are still to come."""

    row: Row
    finished: list[Finished | None]


@final
@dataclass
class Run:
    """Rows on their way through the engine."""

    source: Lines
    settings: BatchSettings
    index: Index
    output: Output
    interrupted: Callable[[], bool]
    progress: Progress
    embed: Embed | None
    neighbours: Neighbours | None = None  # None: no row shares what others have

    def __post_init__(self) -> None:
        self.begun, self.begin = False, time.monotonic()
        self.summary = BatchSummary(rows=self.index.rows, before=self.index.done)
        self.pending: dict[str, _Pending] = {}
        self.cut: set[Any] = set()  # sequences that ended only because the run does
        self.texts: list[Row] = []  # to embed

    def drain(self, engine: Engine) -> None:
        """Answer what is not done."""
        if self.index.done == self.index.rows:
            return
        engine.expect(structures=self.index.structured)
        given = engine.run(self._work(engine), self._stopped)
        for one in given:
            self._take(one)
            if one.key in self.cut:  # what ended by itself came before
                break
        left = self.index.rows - self.index.done
        self.summary.interrupted = left > 0 and self.interrupted()
        if left and not self.summary.interrupted:
            raise JropeError(f"{self.source.path}: {left} rows went while it was read")

    def _work(self, engine: Engine) -> Iterator[Work]:
        for line in self.source.mine():
            if self.interrupted():
                return
            if line.id not in self.index:
                raise JropeError(
                    f"{self.source.path}: line {line.number} changed while it was read"
                )
            if self.index.is_done(line.id):
                if self.neighbours is not None:
                    self.neighbours.passed(line)
                continue
            try:
                yield from self._begun(read_row(line, self.settings), engine)
            except RowError as error:
                self._fail(line, error)
        self._embed()

    def _begun(self, row: Row, engine: Engine) -> Iterator[Work]:
        shared = [0] * len(row.prompts)
        if self.neighbours is not None:
            shared = self.neighbours.shared(row)
        if row.form == "embeddings":
            if self.embed is None:
                raise RowError("embeddings are not served here", "unsupported")
            self.texts.append(row)
            if sum(len(text.prompts) for text in self.texts) >= _TEXTS:
                self._embed()
            return
        works = [*_works(row, shared)]
        _check(engine, works)
        self.pending[row.line.id] = _Pending(row, [None] * len(works))
        for work in works:
            self.summary.running += 1
            yield work
            if not self.begun:  # the engine has loaded and compiled for the first one
                self.begun, self.begin = True, time.monotonic()

    def _embed(self) -> None:
        """Answer the rows of embeddings that have gathered."""
        rows, self.texts = self.texts, []
        if not rows or self.embed is None:
            return
        vectors, at = self.embed([ids for row in rows for ids in row.prompts]), 0
        for row in rows:
            own, at = vectors[at : at + len(row.prompts)], at + len(row.prompts)
            try:
                self._answered(row, embedding(row, own, self.settings), 0)
            except RowError as error:
                self._fail(row.line, error)

    def _stopped(self, work: Work, tokens: np.ndarray) -> int | None:
        """Where a sequence holds a stop text; all of it, when the run is to end."""
        id, at = cast(Key, work.key)
        row, tokenizer = self.pending[id].row, self.settings.tokenizer
        if stops := row.request.stop:
            prompt = row.prompts[at // row.request.n]
            given = tokenizer, prompt, tokens.tolist(), stops
            found = tokens_to_stop(*given, row.request.min_tokens)
            if found is not None:
                return found
        if not self.interrupted():
            return None
        if work.is_over(tokens) or len(tokens) >= work.max_new_tokens:
            return None
        self.cut.add(work.key)
        return len(tokens)

    def _take(self, one: Finished) -> None:
        self.summary.running -= 1
        if one.key in self.cut:
            return
        id, at = cast(Key, one.key)
        pending = self.pending[id]
        pending.finished[at] = one
        finished = [x for x in pending.finished if x is not None]
        if len(finished) < len(pending.finished):
            return
        del self.pending[id]
        try:
            record = answer(pending.row, finished, self.settings)
        except RowError as error:
            self._fail(pending.row.line, error)
            return
        new = sum(len(x.tokens) for x in finished)
        self._answered(pending.row, record, new)

    def _answered(self, row: Row, record: Record, new: int) -> None:
        self.summary.answered += 1
        self.summary.prompt_tokens += sum(map(len, row.prompts))
        self.summary.new_tokens += new
        self._keep(row.line.id, record)

    def _fail(self, line: Line, error: RowError) -> None:
        self.summary.failed += 1
        self._keep(line.id, failure(line, error))

    def _keep(self, id: str, record: Record) -> None:
        self.output.add(record)
        self.index.finish(id)
        self.summary.seconds = time.monotonic() - self.begin
        self.progress(self.summary)


def _works(row: Row, shared: list[int]) -> Iterator[Work]:
    """n sequences for the first prompt, n for the second, ..."""
    request = row.request
    for at in range(len(row.prompts) * request.n):
        which, choice = divmod(at, request.n)
        yield Work(
            key=(row.line.id, at),
            prompt=np.array(row.prompts[which], np.int32),
            sampler=request.sampler,
            seed=(request.seed + choice) % 2**32,
            max_new_tokens=row.limits[which],
            stop_ids=request.stop_ids,
            min_new_tokens=request.min_tokens,
            logit_bias=request.logit_bias,
            logprobs=request.logprobs,
            structure=row.structure,
            shared=shared[which],
        )


def _check(engine: Engine, works: Iterable[Work]) -> None:
    for work in works:
        try:
            engine.check(work)
        except JropeError as error:
            raise RowError(str(error).removeprefix(f"row {work.key!r}: ")) from None
