"""How fast, and how near the device's own limits.

A plan is a set of prompts and decode loops.  Each is compiled once, run once to warm
up, then timed several times, in turns with whoever is beside it; the figure is the
median.  Something that does not fit or fails is a row that says so.
"""

import gc
import itertools
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, final

import jax
import numpy as np

from jrope.bench.device import Ceilings, host_load, peak_memory, top_kernels
from jrope.bench.model import (
    Order,
    Weights,
    cache_bytes,
    filled_bytes,
    prefill_flops,
    tree_bytes,
)
from jrope.bench.report import Row, Work
from jrope.bench.runs import (
    Decode,
    Prefill,
    Program,
    Runner,
    check_fits,
    in_turns,
    told,
)
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
        self.weights, self.config, self.plan = weights, config, plan
        self.ceilings, self.peer = ceilings, peer
        tree = weights.arranged("none")
        self.itemsize: int = tree["model"]["norm"]["weight"].dtype.itemsize
        self.held, self.read = tree_bytes(tree)

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
        lengths, capacity = self._lengths(task), self._capacity(task)
        self._check_size(task, capacity)
        params, size = self.weights.arranged(task.order), (task.batch, task.context)
        if task.work == "prefill":
            work = Prefill(params, self.config, *size, capacity)
            runners: dict[str, Runner] = {"jrope": work.run}
            if self.peer is not None:
                runners[self.peer.modes[0]] = self.peer.prefill(*size)
            yield from self._time(self._blank(task), work.program, runners)
            return
        loop = Decode(params, self.config, lengths, self.plan.new, capacity)
        for name, sampler in self.plan.samplers.items():
            runners = {"jrope": lambda sampler=sampler: loop.run(sampler)}
            if peer := self.peer:
                more = (self.plan.new, sampler)
                runners |= {m: peer.decode(*size, *more, m) for m in peer.modes}
            blank = replace(self._blank(task), sampler=name)
            yield from self._time(blank, loop.program, runners)

    def _time(
        self, blank: Row, program: Program, runners: Mapping[str, Runner]
    ) -> Iterator[Row]:
        """A row for everyone who runs this."""
        times, problems = in_turns(runners, self.plan.repeats, self.plan.patience)
        own = statistics.median(times["jrope"]) if "jrope" in times else None
        for who in runners:
            row = replace(blank, by=who, order=blank.order if who == "jrope" else None)
            if who in problems:
                yield replace(row, problem=problems[who])
                continue
            row = self._timed(row, times[who])
            if who == "jrope":
                row = self._with_program(row, program, runners[who])
            elif own is not None:
                row = replace(row, ratio=statistics.median(times[who]) / own)
            yield row

    def _timed(self, row: Row, times: list[float]) -> Row:
        median, prompt = statistics.median(times), row.work == "prefill"
        if prompt:
            counted = prefill_flops(self.config, row.batch, row.context)
        else:
            filled = row.batch * row.context + row.batch * row.new // 2
            slots = filled_bytes(self.config, filled, self.itemsize, row.batch)
            counted = self.read + slots
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
        if task.work == "prefill" or task.batch == 1 or not self._ragged():
            return np.full(task.batch, task.context)
        first = max(task.context // 2, 1)
        return np.linspace(first, task.context, task.batch).astype(np.int64)

    def _ragged(self) -> bool:
        return self.plan.ragged and self.peer is None

    def _capacity(self, task: Task) -> int:
        room = bucket(self.plan.new + 1) if task.work == "decode" else 0
        return round(self.plan.capacity_factor * (task.context + room))

    def _check_size(self, task: Task, capacity: int) -> None:
        copies = 1 if self.peer is None or task.order == "none" else 2
        weights = copies * self.held
        cache = cache_bytes(self.config, capacity, self.itemsize, task.batch)
        text = f"weights {weights / 1e9:.2f} + cache {cache / 1e9:.2f} GB are"
        check_fits(weights + cache, text)
