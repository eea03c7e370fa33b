"""Compiling ahead: what `generate` will run, before the weights are there."""

import gc
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.stages import Compiled, Lowered
from jax.typing import ArrayLike

from jrope.generation.guesser import Draft
from jrope.generation.loop import decode, first_token, prefill, state_specs
from jrope.generation.request import (
    Options,
    Request,
    chunk_inputs,
    first_token_inputs,
    prepare,
)
from jrope.generation.speculate import begin, decode_guessing
from jrope.model.config import LlamaConfig
from jrope.model.inputs import check_params
from jrope.model.placed import cache_specs
from jrope.sharding.meshes import layout_of
from jrope.tree import Params


def compile_ahead(
    params: Params,
    prompt: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    config: LlamaConfig,
    logprobs: bool = False,
    **options: Unpack[Options],
) -> dict[str, Compiled]:
    """Compile what `generate` and `stream` run for these arguments, and run nothing.

    The programs compile side by side; calls in the same bucket of shapes find them.
    On a mesh of devices that are not here (`jrope.mesh(..., on="v5e:2x2")`) they are
    TPUs' programs, from any machine.

    Args:
      params: the parameters, or a tree of ShapeDtypeStructs such as
        `load_shapes` gives: compiling may then overlap with loading.
      prompt, lengths, config, logprobs, options: as in `generate`.

    Returns:
      The programs by name: "prefill", "prefill_on" where a prompt comes in several
      chunks, "first_token", "decode".  With `speculate` the last is "begin" and
      "decode_guessing", and a draft has its "draft_prefill" and "draft_prefill_on".
      Each tells its `memory_analysis()`.

    Raises:
      JropeError: as `generate`.
    """
    check_params(params)
    request = prepare(prompt, lengths, config, layout_of(params), **options)
    lowered = _lowered(params, request, config, logprobs)
    return side_by_side((name, one.compile) for name, one in lowered)


def side_by_side(
    traced: Iterable[tuple[Any, Callable[[], Compiled]]],
) -> dict[Any, Compiled]:
    """Programs by name: each is compiled while the next ones are traced."""
    pool = ThreadPoolExecutor()
    try:
        with _without_collector():
            jobs = {name: pool.submit(compile) for name, compile in traced}
        return {name: job.result() for name, job in jobs.items()}
    finally:  # after Ctrl-C, too, which nothing can tell the compiler
        pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _without_collector() -> Generator[None]:
    """Python's collector of cycles waits: it takes a tenth of tracing, or more."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _lowered(
    params: Params, request: Request, config: LlamaConfig, scored: bool
) -> Iterator[tuple[str, Lowered]]:
    """The programs, traced; those that take longest to compile come first."""
    layout = request.layout
    static: dict[str, Any] = {"config": config, "scored": scored, "layout": layout}
    first = (params, *chunk_inputs(request, 0), None, None)
    static_first = {**static, **request.fresh_cache}
    yield "prefill", prefill.lower(*first, **static_first)
    last, cache, _ = prefill.eval_shape(*first, **static_first)
    if layout is not None:  # which eval_shape forgets
        specs = layout.rows(), cache_specs(layout)
        last, cache = layout.place((last, cache), specs)
    drawn = (params, last, *first_token_inputs(request))
    static_drawn = {**static, "output_slots": request.output_slots}
    state = first_token.eval_shape(*drawn, **static_drawn)
    if layout is not None:
        specs = state_specs(layout)
        if not scored:  # XLA does not split what is empty
            specs = replace(specs, logprobs=PartitionSpec())
        state = layout.place(state, specs)
    if request.speculate is not None:
        yield from _lowered_guessing(params, request, config, cache, state)
    else:
        limit = request.place(jnp.zeros((), jnp.int32))
        carried = params, cache, state, request.sampling, limit
        yield "decode", decode.lower(*carried, config=config, layout=layout)
    if request.prefill_chunk < request.width:
        later = (params, *chunk_inputs(request, 0), cache, last)
        yield "prefill_on", prefill.lower(*later, capacity=None, **static)
    yield "first_token", first_token.lower(*drawn, **static_drawn)


def _lowered_guessing(
    params: Params, request: Request, config: LlamaConfig, cache: Any, rows: Any
) -> Iterator[tuple[str, Lowered]]:
    """What runs instead of `decode` where tokens are guessed."""
    guesser = request.speculate
    memory: Any = jax.ShapeDtypeStruct((len(request.prompt), request.capacity), "int32")
    if isinstance(guesser, Draft):
        how = {"config": guesser.config, "scored": False, "layout": None}
        first = (guesser.params, *chunk_inputs(request, 0), None, None)
        last, memory, _ = prefill.eval_shape(*first, **request.fresh_cache, **how)
        yield "draft_prefill", prefill.lower(*first, **request.fresh_cache, **how)
        if request.prefill_chunk < request.width:
            later = (*first[:-2], memory, last)
            yield "draft_prefill_on", prefill.lower(*later, capacity=None, **how)
    given = guesser, memory, rows, cache.lengths, request.sampling
    state, limit = begin.eval_shape(*given), jnp.zeros((), jnp.int32)
    carried = params, cache, state, request.sampling, limit, limit, guesser
    yield "decode_guessing", decode_guessing.lower(*carried, config=config)
    yield "begin", begin.lower(*given)
