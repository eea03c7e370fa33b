"""`generate` and `stream`: a request through prefill, first token and decode."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jrope.errors import check_count
from jrope.generation.checks import refuse_traced
from jrope.generation.loop import DecodeState, decode, prefill_and_first_token
from jrope.generation.request import Options, Request, prepare
from jrope.generation.speculate import (
    Speculation,
    begin,
    decode_guessing,
    remember_prompts,
)
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.inputs import check_params
from jrope.sharding.meshes import layout_of, readable
from jrope.tree import Params


@final
@dataclass(frozen=True)
class Generation:
    """What `generate` returns; every array is on the device.

    On a mesh rows stand where the mesh splits them; on one of several processes each
    device has all rows, and each process can read them.

    Args:
      tokens: int32 [B, max_new_tokens], new tokens only, pad id after a row's stop.
      lengths: int32 [B], new tokens of each row, its stop id included.
      finite: bool [B], whether every logit that a row's tokens were drawn from was a
        finite number.  Where not, its tokens mean nothing: weights hold a NaN, or
        float16 overflowed, which bfloat16 does not.
      logprobs: float32 [B, max_new_tokens] under the model itself (before biases,
        penalties, temperature and filters), 0 after the stop; None unless asked for.
      prompt_logprobs: float32 [B, T - 1], as `score` gives; None unless asked for.
    """

    tokens: jax.Array
    lengths: jax.Array
    finite: jax.Array
    logprobs: jax.Array | None
    prompt_logprobs: jax.Array | None


@final
class Decoding:
    """Rows that go on, with guesses where the request has some.

    Attributes:
      rows: what is known of them so far.
    """

    def __init__(
        self,
        params: Params,
        request: Request,
        config: LlamaConfig,
        cache: KVCache,
        rows: DecodeState,
    ) -> None:
        self.params, self.request, self.config = params, request, config
        self.cache, self.rows = cache, rows
        self.guessing: Speculation | None = None
        if (guesser := request.speculate) is not None:
            memory = remember_prompts(guesser, request)
            given = guesser, memory, rows, cache.lengths, request.sampling
            self.guessing = begin(*given)

    def go_on(self, limit: int) -> None:
        """Until every row has so many tokens, or has stopped."""
        request, config = self.request, self.config
        until = request.place(jnp.asarray(limit, jnp.int32))
        if self.guessing is None:
            given = self.params, self.cache, self.rows, request.sampling, until
            how = {"config": config, "layout": request.layout}
            self.cache, self.rows = decode(*given, **how)
            return
        most = jnp.asarray(request.max_new_tokens, jnp.int32)
        given = self.params, self.cache, self.guessing, request.sampling, until, most
        going = decode_guessing(*given, request.speculate, config=config)
        self.cache, self.guessing = going
        self.rows = going[1].rows


def generate(
    params: Params,
    prompt: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    config: LlamaConfig,
    logprobs: bool = False,
    **options: Unpack[Options],
) -> Generation:
    """Continue every prompt by up to `max_new_tokens` tokens.

    A row does not depend on what its neighbours hold: in the same shapes (batch size,
    prompt and new tokens rounded up to their buckets, prefill_chunk) it is the same to
    the bit.  In other shapes sums are taken in another order: float32 agrees to
    rounding, 16 bits only to theirs, after which tokens may differ.  (Of a random
    bfloat16 model of 2 layers, on a CPU, 3 of 8 rows did within 16 greedy tokens when
    each ran alone instead of in one batch; in float32 none.)

    Args:
      params, config: the model.  On a mesh, where the parameters stand decides what
        is split over what: see `jrope.shard`.
      prompt: integers [B, T], rows padded on the right with anything.
      lengths: tokens of each prompt, [B], at least 1; None: T.
      logprobs: also return log-probabilities of prompt and new tokens.
      options: sampler, key, seeds, max_new_tokens, stop_ids, logit_bias, ...: see
        `request.Options`.

    Returns:
      The new tokens and what is known of them.

    Raises:
      JropeError: an empty prompt, ids outside the vocabulary, a missing key, ...
    """
    check_params(params)
    request = prepare(prompt, lengths, config, layout_of(params), **options)
    cache, state, scores = prefill_and_first_token(params, request, config, logprobs)
    decoding = Decoding(params, request, config, cache, state)
    decoding.go_on(request.max_new_tokens)
    state = decoding.rows
    new, chances = request.max_new_tokens, state.logprobs
    found = (
        state.tokens[:, :new],
        jnp.minimum(state.lengths, new),
        state.finite,
        None if chances is None else chances[:, :new],
        scores,
    )
    return Generation(*readable(found))


def stream(
    params: Params,
    prompt: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    config: LlamaConfig,
    chunk: int = 8,
    **options: Unpack[Options],
) -> "Stream":
    """`generate` as it goes: the same tokens in blocks of columns.

    The first token comes alone, then `chunk` at a time; a block is read while the
    device already computes the next one.

    Args:
      chunk: tokens per row between two looks at the device.
      params, prompt, lengths, config, options: as in `generate`.

    Returns:
      An iterator of int32 [B, n], the next n tokens of every row; it ends when every
      row has stopped.  Of several processes each gets all rows, and each has to go on.

    Raises:
      JropeError: as `generate`, at the call, not at the first block.
    """
    check_count("chunk", chunk, 1)
    check_params(params)
    refuse_traced(params=params)
    request = prepare(prompt, lengths, config, layout_of(params), **options)
    return Stream(params, request, config, chunk)


@final
class Stream(Iterator[np.ndarray]):
    """The blocks of `stream`.

    Attributes:
      finite: bool [B], as `Generation.finite`, of the blocks so far.
    """

    def __init__(
        self, params: Params, request: Request, config: LlamaConfig, chunk: int
    ) -> None:
        self.finite = np.ones(len(request.prompt), bool)
        self._blocks = self._run(params, request, config, chunk)

    def __next__(self) -> np.ndarray:
        return next(self._blocks)

    def _run(
        self, params: Params, request: Request, config: LlamaConfig, chunk: int
    ) -> Iterator[np.ndarray]:
        if request.max_new_tokens == 0:
            return
        cache, state, _ = prefill_and_first_token(params, request, config, False)
        decoding = Decoding(params, request, config, cache, state)
        emitted = 0
        for planned in [*range(1, request.max_new_tokens, chunk), None]:
            following = state
            shown = readable((state.tokens, state.finite, state.done, state.step))
            if planned is not None:
                limit = min(planned + chunk, request.max_new_tokens)
                decoding.go_on(limit)
                following = decoding.rows
            tokens, finite, done, step = map(np.asarray, shown)
            self.finite, reached = finite, int(step)
            if reached > emitted:
                yield tokens[:, emitted:reached]
            emitted = reached
            if done.all():
                return
            state = following
