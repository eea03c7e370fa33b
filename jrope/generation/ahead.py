"""Compiling ahead: what `generate` will run, before the weights are there."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Unpack

import jax
import jax.numpy as jnp

from jrope.generation.loop import decode, first_of, first_token, piece_of, prefill
from jrope.generation.request import Options, prepare
from jrope.model.config import LlamaConfig


def compile_ahead(
    params: Mapping[str, Any],
    prompt: Any,
    lengths: Any = None,
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
    request = prepare(prompt, lengths, config, **options)
    static: dict[str, Any] = {"config": config, "scored": logprobs}
    first = (params, *piece_of(request, 0), None, None)
    static_first = {**static, "capacity": request.capacity}
    last, cache, _ = prefill.eval_shape(*first, **static_first)
    lowered = [prefill.lower(*first, **static_first)]
    if request.prefill_chunk < request.width:
        later = (params, *piece_of(request, 0), cache, last)
        lowered.append(prefill.lower(*later, capacity=None, **static))
    drawn = (params, last, *first_of(request))
    static["room"] = request.room
    rows = first_token.eval_shape(*drawn, **static)
    lowered.append(first_token.lower(*drawn, **static))
    limit = jax.ShapeDtypeStruct((), jnp.int32)
    lowered.append(
        decode.lower(params, cache, rows, request.rules, limit, config=config)
    )
    pool = ThreadPoolExecutor(len(lowered))
    try:
        for job in [pool.submit(program.compile) for program in lowered]:
            job.result()
    finally:  # after Ctrl-C, too, which nothing can tell the compiler
        pool.shutdown(wait=False, cancel_futures=True)
