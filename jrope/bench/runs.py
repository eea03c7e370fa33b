"""Programs compiled once and timed many times, in turns with others."""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jrope.bench.device import memory_limit
from jrope.bench.versus import COMPILED
from jrope.errors import JropeError
from jrope.generation.loop import decode, first_token, prefill
from jrope.generation.request import prepare, sampling_specs
from jrope.generation.sample import Sampler
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.placed import cache_specs
from jrope.sharding.meshes import Layout, stand_whole
from jrope.tree import Params

Runner = Callable[[], float]


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
        check_fits(self.memory, "the compiled program takes")


class Decode:
    """The whole decode loop, sampling included, from `lengths` filled slots on."""

    def __init__(
        self,
        params: Params,
        config: LlamaConfig,
        lengths: np.ndarray,
        new: int,
        capacity: int,
        layout: Layout | None = None,
    ) -> None:
        batch, dtype = len(lengths), params["model"]["norm"]["weight"].dtype
        prompt = np.ones((batch, 1), np.int32)
        how: dict[str, Any] = {"max_new_tokens": new + 1, "stop_ids": ()}
        request = prepare(prompt, None, config, layout, **how)
        self.params, self.sampling, self.new = params, request.sampling, new
        self.layout = request.layout
        self.lengths = request.place(jnp.asarray(lengths, jnp.int32))
        self.cache = _empty(config, batch, capacity, dtype, self.layout)
        hidden = jnp.ones((batch, config.hidden_size), dtype)
        prompts = jnp.asarray(request.prompt), jnp.asarray(request.lengths)
        self.rows = first_token(
            params,
            *request.place((hidden, *prompts)),
            request.sampling,
            config=config,
            output_slots=request.output_slots,
            scored=False,
            layout=self.layout,
        )
        self.limit = stand_whole(jnp.asarray(new + 1, jnp.int32), self.layout)
        args = (params, self.cache, self.rows, self.sampling, self.limit)
        self.program = Program(decode, *args, config=config, layout=self.layout)

    def run(self, sampler: Sampler) -> float:
        """Seconds of a step."""
        sampling = replace(self.sampling, sampler=sampler)
        if self.layout is not None:
            specs = sampling_specs(self.layout, sampling)
            sampling = self.layout.place(sampling, specs)
        cache = replace(self.cache, lengths=self.lengths + 0)  # it will be donated
        jax.block_until_ready((cache, self.rows))
        begin = time.perf_counter()
        self.cache, rows = self.program.call(
            self.params, cache, self.rows, sampling, self.limit
        )
        jax.block_until_ready(rows)
        return (time.perf_counter() - begin) / self.new


class Prefill:
    """A prompt of `context` tokens into a fresh cache, and the first new token."""

    def __init__(
        self,
        params: Params,
        config: LlamaConfig,
        batch: int,
        context: int,
        capacity: int,
        layout: Layout | None = None,
    ) -> None:
        shape, key = (batch, context + 1), jax.random.key(1)
        tokens = jax.random.randint(key, shape, 0, config.vocab_size, jnp.int32)
        prompt = np.asarray(tokens[:, :-1])
        how: dict[str, Any] = {"max_new_tokens": 1, "stop_ids": ()}
        request = prepare(prompt, None, config, layout, **how)
        tokens, lengths = request.place((tokens, jnp.asarray(request.lengths)))
        self.args = (params, tokens, lengths, lengths, None, None)
        static: dict[str, Any] = {"config": config, "scored": False}
        static |= {"capacity": capacity, "layout": request.layout}
        self.program = Program(prefill, *self.args, **static)
        last, _, _ = self.program.call(*self.args)
        prompt = request.place(tokens[:, :-1])
        self.first_args = (prompt, lengths, request.sampling)
        static["output_slots"] = request.output_slots
        del static["capacity"]
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


def once(work: Prefill | Decode, sampler: Sampler) -> float:
    """Seconds of a prompt, or of a step."""
    return work.run(sampler) if isinstance(work, Decode) else work.run()


def _empty(
    config: LlamaConfig, batch: int, capacity: int, dtype: Any, layout: Layout | None
) -> KVCache:
    if layout is None:
        return KVCache.empty(config, batch, capacity, dtype)
    capacity = -(-capacity // (n := layout.size(layout.axes.context))) * n
    specs = cache_specs(layout)
    make = partial(KVCache.empty, config, batch, capacity, dtype)

    def there(spec: PartitionSpec, part: Any) -> Any:
        return jax.tree.map(lambda _: layout.sharding(spec), part)

    places = jax.tree.map(
        there,
        specs,
        jax.eval_shape(make),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    return jax.jit(make, out_shardings=places)()


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
                problems[name] = told(error)
            else:
                times[name] += [seconds] if number else []
    return {name: found for name, found in times.items() if found}, problems


def check_fits(size: int, what: str) -> None:
    """Raise a JropeError if `size` bytes are more than the device has."""
    limit = memory_limit()
    if limit is not None and size > limit:
        text = f"{what} {size / 1e9:.2f} GB, the device has {limit / 1e9:.2f}"
        raise JropeError(f"too large: {text}")


def told(error: Exception) -> str:
    """One line of what went wrong."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, JropeError):
        return text
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return f"out of memory: {text}"
    return f"failed: {type(error).__name__}: {text}"
