"""How fast, and how near the device's own limits.

A plan is a set of prompts and decode loops.  Each is compiled once, run once to warm
up, then timed several times, in turns with whoever is beside it; the figure is the
median.  A mesh takes turns with one of its devices.  Something that does not fit or
fails is a row that says so.
"""

import gc
import itertools
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, final

import jax
import numpy as np

from jrope.bench.device import Ceilings, host_load, peak_memory, top_kernels
from jrope.bench.model import Order, Weights
from jrope.bench.report import Row, Work
from jrope.bench.runs import Decode, Prefill, Program, Runner, in_turns, once, told
from jrope.bench.share import ALONE, Side, check_sizes, one_device
from jrope.bench.versus import Peer
from jrope.errors import JropeError
from jrope.generation.request import bucket
from jrope.generation.sample import Sampler
from jrope.model.config import LlamaConfig


@final
@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to time.

    Args:
      works: "prefill", "decode".
      batches, contexts: every pair is timed.
      samplers: of decode, by name.
      new: tokens that a decode run adds to each row.
      repeats: runs behind a median.
      patience: seconds after which a row's runs end, however few they are.
      capacity_factor: slots of the cache in terms of those that `generate` makes.
      order: of the layers' matrices; "auto": out_in for one row at a time, else in_out.
      ragged: decode rows hold from half of the context to all of it.
      profile: folder for traces.
    """

    works: tuple[Work, ...] = ("prefill", "decode")
    batches: tuple[int, ...] = (1,)
    contexts: tuple[int, ...] = (2048,)
    samplers: Mapping[str, Sampler]
    new: int = 64
    repeats: int = 5
    patience: float = 60.0
    capacity_factor: float = 1.0
    order: Literal["auto"] | Order = "auto"
    ragged: bool = True
    profile: str | None = None

    def tasks(self) -> list["Task"]:
        """One for each work, batch and context; those of one arrangement together."""
        tasks = [
            Task(
                work=work, batch=batch, context=context, order=self._order(work, batch)
            )
            for work, batch, context in itertools.product(
                self.works, self.batches, sorted(self.contexts)
            )
        ]
        return sorted(tasks, key=lambda task: task.order != "out_in")

    def _order(self, work: Work, batch: int) -> Order:
        if self.order != "auto":
            return self.order
        return "out_in" if work == "decode" and batch == 1 else "in_out"


@final
@dataclass(frozen=True, kw_only=True)
class Task:
    """One shape of work; it is compiled once."""

    work: Work
    batch: int
    context: int
    order: Order


class Bench:
    """Runs a plan.

    Args:
      weights: the model's parameters, made with `keep` if there is a peer.
      config: the model.
      ceilings: what the device does at best.
      plan: what to time.
      peer: who runs beside jrope.
    """

    def __init__(
        self,
        weights: Weights,
        config: LlamaConfig,
        ceilings: Ceilings,
        plan: Plan,
        peer: Peer | None = None,
    ) -> None:
        self.plan, self.ceilings, self.peer = plan, ceilings, peer
        self.side = Side(weights, config)
        self.alone = one_device(self.side)

    def rows(self) -> Iterator[Row]:
        """Every row as soon as it is known."""
        for task in self.plan.tasks():
            try:
                yield from self._run(task)
            except Exception as error:  # whatever a device or compiler says
                yield replace(self._blank(task), problem=told(error))
            if self.peer is not None:
                self.peer.free()
            gc.collect()

    def _run(self, task: Task) -> Iterator[Row]:
        works, problem = {"jrope": self._work(task, self.side)}, None
        if self.alone is not None:
            try:
                works[ALONE] = self._work(task, self.alone, self.side)
            except Exception as error:  # whatever a device or compiler says
                problem = told(error)
        decoding = task.work == "decode"
        samplers = self.plan.samplers if decoding else {None: Sampler()}
        for name, sampler in samplers.items():
            runners: dict[str, Runner] = {
                who: partial(once, work, sampler) for who, work in works.items()
            }
            runners |= self._peers(task, sampler)
            blank = replace(self._blank(task), sampler=name)
            yield from self._time(blank, works, runners)
            if problem is not None:
                yield replace(blank, by=ALONE, problem=problem)

    def _work(self, task: Task, side: Side | str, *beside: Side) -> Prefill | Decode:
        """What is timed, compiled; the others' weights and caches stay there."""
        if isinstance(side, str):
            raise JropeError(side)
        capacity = self._capacity(task)
        copies = 1 if self.peer is None or task.order == "none" else 2
        shares = [other.share for other in (side, *beside)]
        check_sizes(shares, task.batch, capacity, copies)
        if task.work == "prefill":
            return side.prefill(task.order, task.batch, task.context, capacity)
        return side.decode(task.order, self._lengths(task), self.plan.new, capacity)

    def _peers(self, task: Task, sampler: Sampler) -> dict[str, Runner]:
        peer, size = self.peer, (task.batch, task.context)
        if peer is None:
            return {}
        if task.work == "prefill":
            return {peer.modes[0]: peer.prefill(*size)}
        more = (self.plan.new, sampler)
        return {mode: peer.decode(*size, *more, mode) for mode in peer.modes}

    def _time(
        self,
        blank: Row,
        works: Mapping[str, Prefill | Decode],
        runners: Mapping[str, Runner],
    ) -> Iterator[Row]:
        """A row for everyone who runs this."""
        times, problems = in_turns(runners, self.plan.repeats, self.plan.patience)
        own = statistics.median(times["jrope"]) if "jrope" in times else None
        for who in runners:
            row = replace(blank, by=who, order=blank.order if who in works else None)
            if who in problems:
                yield replace(row, problem=problems[who])
                continue
            row = self._timed(row, times[who])
            if who in works:
                row = self._with_program(row, works[who].program, runners[who])
            if who != "jrope" and own is not None:
                row = replace(row, ratio=statistics.median(times[who]) / own)
            yield row

    def _timed(self, row: Row, times: list[float]) -> Row:
        median, prompt = statistics.median(times), row.work == "prefill"
        counted = self._counted(row)
        best = self.ceilings.matmul if prompt else self.ceilings.read
        return replace(
            row,
            seconds=median,
            spread=(max(times) - min(times)) / median,
            repeats=len(times),
            tokens_per_second=row.batch * (row.context if prompt else 1) / median,
            counted=counted,
            of_ceiling=counted / median / best,
            device_peak_bytes=peak_memory(),
            host_load=host_load(),
        )

    def _counted(self, row: Row) -> int:
        """FLOPs of a device's part of a prompt, or bytes that it reads in a step."""
        alone = self.alone if row.by == ALONE else None
        share = alone.share if isinstance(alone, Side) else self.side.share
        if row.work == "prefill":
            return share.prompt_flops(row.batch, row.context)
        return share.step_bytes(row.batch, row.context, row.new)

    def _with_program(self, row: Row, program: Program, run: Runner) -> Row:
        row = replace(
            row,
            memory_bytes=program.memory,
            temp_bytes=program.temp,
            alias_bytes=program.alias,
            compile_seconds=program.compile_seconds,
        )
        if self.plan.profile is None:
            return row
        names = (row.work, row.sampler, f"b{row.batch}", f"c{row.context}")
        name = "-".join(part.replace(" ", "") for part in names if part)
        folder = f"{self.plan.profile}/{name}"
        with jax.profiler.trace(folder):
            run()
        try:
            kernels = top_kernels(folder, row.new if row.work == "decode" else 1)
        except JropeError as error:
            return replace(row, note=str(error))
        return replace(row, kernels=tuple(kernels))

    def _blank(self, task: Task) -> Row:
        return Row(
            work=task.work,
            by="jrope",
            sampler=None,
            order=task.order,
            batch=task.batch,
            context=round(self._lengths(task).mean()),
            capacity=self._capacity(task),
            new=self.plan.new if task.work == "decode" else 0,
        )

    def _lengths(self, task: Task) -> np.ndarray:
        ragged = self.plan.ragged and self.peer is None
        if task.work == "prefill" or task.batch == 1 or not ragged:
            return np.full(task.batch, task.context)
        first = max(task.context // 2, 1)
        return np.linspace(first, task.context, task.batch).astype(np.int64)

    def _capacity(self, task: Task) -> int:
        room = bucket(self.plan.new + 1) if task.work == "decode" else 0
        return round(self.plan.capacity_factor * (task.context + room))
