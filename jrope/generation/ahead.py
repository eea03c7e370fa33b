"""Compiling ahead: what `generate` will run, before the weights are there."""

from concurrent.futures import ThreadPoolExecutor
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
    layout = request.layout
    static: dict[str, Any] = {"config": config, "scored": logprobs, "layout": layout}
    first = (params, *chunk_inputs(request, 0), None, None)
    static_first = {**static, **request.fresh_cache}
    last, cache, _ = prefill.eval_shape(*first, **static_first)
    if layout is not None:  # which eval_shape forgets
        specs = layout.rows(), cache_specs(layout)
        last, cache = layout.place((last, cache), specs)
    lowered = {"prefill": prefill.lower(*first, **static_first)}
    if request.prefill_chunk < request.width:
        later = (params, *chunk_inputs(request, 0), cache, last)
        lowered["prefill_on"] = prefill.lower(*later, capacity=None, **static)
    drawn = (params, last, *first_token_inputs(request))
    static["output_slots"] = request.output_slots
    state = first_token.eval_shape(*drawn, **static)
    lowered["first_token"] = first_token.lower(*drawn, **static)
    limit = request.place(jnp.zeros((), jnp.int32))
    if layout is not None:
        specs = state_specs(layout)
        if not logprobs:  # XLA does not split what is empty
            specs = replace(specs, logprobs=PartitionSpec())
        state = layout.place(state, specs)
    if request.speculate is not None:
        lowered |= _lower_guessing(params, request, config, cache, state)
    else:
        carried = params, cache, state, request.sampling, limit
        lowered["decode"] = decode.lower(*carried, config=config, layout=layout)
    pool = ThreadPoolExecutor(len(lowered))
    try:
        jobs = {name: pool.submit(one.compile) for name, one in lowered.items()}
        return {name: job.result() for name, job in jobs.items()}
    finally:  # after Ctrl-C, too, which nothing can tell the compiler
        pool.shutdown(wait=False, cancel_futures=True)


def _lower_guessing(
    params: Params, request: Request, config: LlamaConfig, cache: Any, rows: Any
) -> dict[str, Lowered]:
    """What runs instead of `decode` where tokens are guessed."""
    guesser, lowered = request.speculate, dict[str, Lowered]()
    memory: Any = jax.ShapeDtypeStruct((len(request.prompt), request.capacity), "int32")
    if isinstance(guesser, Draft):
        how = {"config": guesser.config, "scored": False, "layout": None}
        first = (guesser.params, *chunk_inputs(request, 0), None, None)
        last, memory, _ = prefill.eval_shape(*first, **request.fresh_cache, **how)
        one = prefill.lower(*first, **request.fresh_cache, **how)
        lowered["draft_prefill"] = one
        if request.prefill_chunk < request.width:
            later = (*first[:-2], memory, last)
            one = prefill.lower(*later, capacity=None, **how)
            lowered["draft_prefill_on"] = one
    given = guesser, memory, rows, cache.lengths, request.sampling
    state, limit = begin.eval_shape(*given), jnp.zeros((), jnp.int32)
    lowered["begin"] = begin.lower(*given)
    carried = params, cache, state, request.sampling, limit, limit, guesser
    lowered["decode_guessing"] = decode_guessing.lower(*carried, config=config)
    return lowered
