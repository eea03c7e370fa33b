"""How fast, and how near the device's own limits.

A plan is a set of prompts and decode loops.  Each is compiled once, run once to warm
up, then timed several times, in turns with whoever is beside it; the figure is the
median.  Something that does not fit or fails is a row that says so.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, final

import jax
import jax.numpy as jnp
import numpy as np

from jrope.bench_device import (
    Ceilings,
    host_load,
    memory_limit,
    peak_memory,
    top_kernels,
)
from jrope.bench_model import (
    Order,
    Weights,
    cache_bytes,
    prefill_flops,
    step_bytes,
    weight_count,
)
from jrope.bench_report import Row, Work
from jrope.bench_versus import COMPILED, Peer
from jrope.cache import KVCache
from jrope.config import LlamaConfig
from jrope.errors import JropeError
from jrope.generate import decode, first_token, prefill
from jrope.request import bucket, prepare
from jrope.sample import Sampler

Runner = Callable[[], float]


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


class Program:
    """A compiled program and what is known of it."""

    def __init__(self, function: Any, *args: Any, **static: Any) -> None:
        begin = time.perf_counter()
        self.call: Any = function.lower(*args, **static).compile()
        self.compile_seconds = time.perf_counter() - begin
        sizes = self.call.memory_analysis()
        self.temp: int = sizes.temp_size_in_bytes
        self.alias: int = sizes.alias_size_in_bytes
        used = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        self.memory: int = used - self.alias + self.temp
        _check_fits(self.memory, "the compiled program takes")


class Decode:
    """The whole decode loop, sampling included, from `lengths` filled slots on."""

    def __init__(
        self,
        params: Mapping[str, Any],
        config: LlamaConfig,
        lengths: np.ndarray,
        new: int,
        capacity: int,
    ) -> None:
        batch, dtype = len(lengths), params["model"]["embed_tokens"]["weight"].dtype
        prompt = np.ones((batch, 1), np.int32)
        request = prepare(prompt, None, config, max_new_tokens=new + 1, stop_ids=())
        self.params, self.rules, self.new = params, request.rules, new
        self.lengths = jnp.asarray(lengths, jnp.int32)
        self.cache = KVCache.empty(config, batch, capacity, dtype)
        self.rows = first_token(
            params,
            jnp.ones((batch, config.hidden_size), dtype),
            jnp.asarray(request.prompt),
            jnp.asarray(request.lengths),
            request.rules,
            config=config,
            room=request.room,
            scored=False,
        )
        self.limit = jnp.asarray(new + 1, jnp.int32)
        args = (params, self.cache, self.rows, self.rules, self.limit)
        self.program = Program(decode, *args, config=config)

    def run(self, sampler: Sampler) -> float:
        """Seconds of a step."""
        rules = replace(self.rules, sampler=sampler)
        cache = replace(self.cache, lengths=self.lengths + 0)  # it will be donated
        jax.block_until_ready((cache, self.rows))
        begin = time.perf_counter()
        self.cache, rows = self.program.call(
            self.params, cache, self.rows, rules, self.limit
        )
        jax.block_until_ready(rows)
        return (time.perf_counter() - begin) / self.new


class Prefill:
    """A prompt of `context` tokens into a fresh cache, and the first new token."""

    def __init__(
        self,
        params: Mapping[str, Any],
        config: LlamaConfig,
        batch: int,
        context: int,
        capacity: int,
    ) -> None:
        shape, key = (batch, context + 1), jax.random.key(1)
        tokens = jax.random.randint(key, shape, 0, config.vocab_size, jnp.int32)
        prompt = np.asarray(tokens[:, :-1])
        request = prepare(prompt, None, config, max_new_tokens=1, stop_ids=())
        lengths = jnp.asarray(request.lengths)
        self.args = (params, tokens, lengths, lengths, None, None)
        static = {"config": config, "capacity": capacity, "scored": False}
        self.program = Program(prefill, *self.args, **static)
        last, _, _ = self.program.call(*self.args)
        self.first_args = (tokens[:, :-1], lengths, request.rules)
        static = {"config": config, "room": request.room, "scored": False}
        self.first = Program(first_token, params, last, *self.first_args, **static)
        self.program.compile_seconds += self.first.compile_seconds

    def run(self) -> float:
        """Seconds of a prompt."""
        begin = time.perf_counter()
        last, cache, _ = self.program.call(*self.args)
        rows = self.first.call(self.args[0], last, *self.first_args)
        jax.block_until_ready(rows)
        seconds = time.perf_counter() - begin
        del cache
        return seconds


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
        table = weights.arranged("none")["model"]["embed_tokens"]["weight"]
        self.itemsize: int = table.dtype.itemsize

    def rows(self) -> Iterator[Row]:
        """Every row as soon as it is known."""
        for task in self.plan.tasks():
            try:
                yield from self._run(task)
            except Exception as error:  # whatever a device or compiler says
                yield replace(self._blank(task), problem=_told(error))
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
            counted = step_bytes(self.config, filled, self.itemsize)
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
        weights = copies * weight_count(self.config) * self.itemsize
        cache = cache_bytes(self.config, task.batch * capacity, self.itemsize)
        text = f"weights {weights / 1e9:.2f} + cache {cache / 1e9:.2f} GB are"
        _check_fits(weights + cache, text)


def in_turns(
    runners: Mapping[str, Runner], repeats: int, patience: float
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time everyone in turns, after warming up; who fails is out, with the reason.

    Args:
      runners: functions that return seconds, by name.
      repeats: rounds.
      patience: seconds after which no new round begins.

    Returns:
      Times of those that work, problems of the others.
    """
    times: dict[str, list[float]] = {name: [] for name in runners}
    problems: dict[str, str] = {}
    warm = [name for name in runners for _ in range(3 if name == COMPILED else 1)]
    rounds = [warm, *[list(runners)] * repeats]
    begin = time.perf_counter()
    for number, names in enumerate(rounds):
        begin = time.perf_counter() if number == 1 else begin
        if number > 1 and time.perf_counter() - begin > patience:
            break
        for name in (name for name in names if name not in problems):
            try:
                seconds = runners[name]()
            except Exception as error:  # whatever a device or compiler says
                problems[name] = _told(error)
            else:
                times[name] += [seconds] if number else []
    return {name: found for name, found in times.items() if found}, problems


def _check_fits(size: int, what: str) -> None:
    limit = memory_limit()
    if limit is not None and size > limit:
        text = f"{what} {size / 1e9:.2f} GB, the device has {limit / 1e9:.2f}"
        raise JropeError(f"too large: {text}")


def _told(error: Exception) -> str:
    """One line of what went wrong."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, JropeError):
        return text
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return f"out of memory: {text}"
    return f"failed: {type(error).__name__}: {text}"
