"""Compiling ahead: what `generate` will run, before the weights are there."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jrope.generation.loop import (
    chunk_inputs,
    decode,
    first_token,
    first_token_inputs,
    prefill,
)
from jrope.generation.request import Options, prepare
from jrope.model.config import LlamaConfig
from jrope.model.inputs import check_params
from jrope.tree import Params


def compile_ahead(
    params: Params,
    prompt: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    config: LlamaConfig,
    logprobs: bool = False,
    **options: Unpack[Options],
) -> None:
    """Compile what `generate` and `stream` run for these arguments, and run nothing.

    The programs compile side by side; calls in the same bucket of shapes find them.

    Args:
      params: the parameters, or a tree of ShapeDtypeStructs such as
        `load_shapes` gives: compiling may then overlap with loading.
      prompt, lengths, config, logprobs, options: as in `generate`.

    Raises:
      JropeError: as `generate`.
    """
    check_params(params)
    request = prepare(prompt, lengths, config, **options)
    static: dict[str, Any] = {"config": config, "scored": logprobs}
    first = (params, *chunk_inputs(request, 0), None, None)
    static_first = {**static, "capacity": request.capacity}
    last, cache, _ = prefill.eval_shape(*first, **static_first)
    lowered = [prefill.lower(*first, **static_first)]
    if request.prefill_chunk < request.width:
        later = (params, *chunk_inputs(request, 0), cache, last)
        lowered.append(prefill.lower(*later, capacity=None, **static))
    drawn = (params, last, *first_token_inputs(request))
    static["output_slots"] = request.output_slots
    state = first_token.eval_shape(*drawn, **static)
    lowered.append(first_token.lower(*drawn, **static))
    limit = jax.ShapeDtypeStruct((), jnp.int32)
    lowered.append(
        decode.lower(params, cache, state, request.sampling, limit, config=config)
    )
    pool = ThreadPoolExecutor(len(lowered))
    try:
        for job in [pool.submit(program.compile) for program in lowered]:
            job.result()
    finally:  # after Ctrl-C, too, which nothing can tell the compiler
        pool.shutdown(wait=False, cancel_futures=True)
