"""Speculative decoding: several guessed tokens in one pass of the model, exactly.

A pass over the newest token and n guesses gives the logits of n + 1 tokens.  Each is
drawn as plain decoding draws it, by the same sampler with the same key, and counts if
the guesses before it were what was drawn.  So tokens, greedy or sampled, are those of
plain decoding; only the rounding of sums is another.  A guess x is thus accepted with
probability p(x), and what is drawn in its stead is distributed as p without x, which is
the rule of Leviathan et al. 2023 (arXiv:2211.17192) for a guess that is certain.

Rejected tokens stay in the cache behind a row's length, where the next ones overwrite
them before they are seen.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from jrope.generation.draft import draft
from jrope.generation.guesser import Draft, Guesser, PromptLookup
from jrope.generation.lookup import look_up
from jrope.generation.loop import DecodeState, past_of, prefill_prompts
from jrope.generation.passes import cautious, counted, draw_each, in_turns, put
from jrope.generation.past import add_seen
from jrope.generation.request import Request, SamplingParams
from jrope.generation.sample import log_probs
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.llama import hidden_states, unembed
from jrope.tree import Params

Carry: TypeAlias = "tuple[KVCache, Speculation]"
Memory: TypeAlias = "jax.Array | KVCache"
"""What is guessed from: the text int32 [B, W], or the smaller model's cache."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Speculation:
    """What speculative decoding knows of its rows besides the cache."""

    rows: DecodeState
    memory: Memory
    guesses: jax.Array  # int32 [B, n], what may follow `rows.last`, -1: no idea
    pause: jax.Array  # int32 [], passes to come that take no guesses
    caution: jax.Array  # int32 [], the pause after the next wrong guesses
    passes: jax.Array  # int32 [], of the model over new tokens


def remember_prompts(guesser: Guesser, request: Request) -> Memory:
    """What guesses are made from before there is a new token."""
    if isinstance(guesser, Draft):
        _, cache, _ = prefill_prompts(guesser.params, request, guesser.config, False)
        return cache
    room = request.capacity - request.prompt.shape[1]
    return jnp.asarray(jnp.pad(request.prompt, ((0, 0), (0, room))))


@jax.jit
def begin(
    guesser: Guesser,
    memory: Memory,
    rows: DecodeState,
    lengths: jax.Array,
    sampling: SamplingParams,
) -> Speculation:
    """First guesses, after the first token; `lengths` [B] are those of the prompts."""
    none = jnp.zeros((), jnp.int32)
    guesses = jnp.zeros((len(lengths), guesser.tokens), jnp.int32)
    state = Speculation(rows, memory, guesses, none, none, none)
    if not isinstance(memory, KVCache):
        state = replace(state, memory=put(memory, rows.last[:, None], lengths, 1))
    return _guess(guesser, state, lengths, sampling)


@partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def decode_guessing(
    params: Params,
    cache: KVCache,
    state: Speculation,
    sampling: SamplingParams,
    limit: jax.Array,
    most: jax.Array,
    guesser: Guesser,
    *,
    config: LlamaConfig,
) -> tuple[KVCache, Speculation]:
    """`decode` with guesses, until every row has `limit` tokens or has stopped.

    Rows may get ahead of the limit, up to `most`.
    """

    def unfinished(carry: Carry) -> jax.Array:
        rows = carry[1].rows
        return jnp.any(~rows.done & (rows.lengths < limit))

    def hopeful(carry: Carry) -> jax.Array:
        state = carry[1]
        known = (state.guesses[:, 0] >= 0) & ~state.rows.done
        return (state.pause == 0) & jnp.any(known)

    def step(carry: Carry, count: int) -> Carry:
        cache, state = carry
        given = params, cache, state.rows, state.guesses[:, :count], sampling, most
        after, rows, kept = one_pass(*given, config=config)
        state = _learn(state, rows, kept, cache.lengths, count)
        return after, _guess(guesser, state, after.lengths, sampling)

    cache, state = in_turns(unfinished, hopeful, step, guesser.tokens, (cache, state))
    return cache, replace(state, rows=_with_columns(state.rows))


def one_pass(
    params: Params,
    cache: KVCache,
    rows: DecodeState,
    guesses: jax.Array,
    sampling: SamplingParams,
    most: jax.Array,
    *,
    config: LlamaConfig,
) -> tuple[KVCache, DecodeState, jax.Array]:
    """The newest token and n guesses [B, n] through the model: 1 to n + 1 new tokens.

    Returns:
      the cache, what is known of the rows, and how many tokens each has got, int32 [B].
    """
    tokens = jnp.concatenate([rows.last[:, None], jnp.maximum(guesses, 0)], axis=1)
    x, after = hidden_states(params, tokens, cache=cache, config=config)
    logits = unembed(params, x.reshape(-1, x.shape[-1]), config=config)
    own = sampling.sampler, sampling.keys, rows.lengths
    own = *own, past_of(rows, sampling, rows.lengths)
    drawn, logits, finite = draw_each(logits, guesses, *own)
    scores = None
    if rows.logprobs is not None:
        scores = log_probs(logits, drawn.reshape(-1)).reshape(drawn.shape)
    rows, kept = _keep(rows, drawn, guesses, scores, finite, sampling, most)
    return replace(after, lengths=cache.lengths + kept), rows, kept


def _keep(
    rows: DecodeState,
    drawn: jax.Array,
    guesses: jax.Array,
    scores: jax.Array | None,
    finite: jax.Array,
    sampling: SamplingParams,
    most: jax.Array,
) -> tuple[DecodeState, jax.Array]:
    """The rows with those tokens [B, n + 1] that plain decoding would have drawn."""
    left = jnp.where(rows.done, 0, most - rows.lengths)
    right = drawn[:, :-1] == guesses
    new, stopped = counted(drawn, right, sampling.stop_ids[None], left)
    kept = jnp.sum(new, axis=1, dtype=jnp.int32)
    newest = jnp.take_along_axis(drawn, jnp.maximum(kept - 1, 0)[:, None], axis=1)
    add = partial(put, starts=rows.lengths, counts=kept)
    lengths = rows.lengths + kept
    return replace(
        rows,
        last=jnp.where(kept > 0, newest[:, 0], rows.last),
        tokens=add(rows.tokens, drawn),
        logprobs=None if scores is None else add(rows.logprobs, scores),
        seen=add_seen(rows.seen, jnp.where(new, drawn, rows.seen.shape[1])),
        done=rows.done | stopped | (lengths >= most),
        finite=rows.finite & jnp.all(finite | ~new, axis=1),
        lengths=lengths,
    ), kept


def _learn(
    state: Speculation,
    rows: DecodeState,
    kept: jax.Array,
    lengths: jax.Array,
    guessed: int,
) -> Speculation:
    """The state after a pass; `lengths` [B] are those of the cache before it."""
    going = jnp.sum(~state.rows.done, dtype=jnp.int32)
    pause, caution = jnp.maximum(state.pause - 1, 0), state.caution
    memory = state.memory
    if isinstance(memory, KVCache):
        memory = replace(memory, lengths=lengths + kept)
    else:
        at = jnp.arange(guessed + 1, dtype=jnp.int32)[None, :]
        index = state.rows.lengths[:, None] + at
        new = jnp.take_along_axis(rows.tokens, index, axis=1, mode="clip")
        memory = put(memory, new, lengths + 1, kept)
        if guessed:
            pause = caution = cautious(caution, kept, going)
    passes = state.passes + 1
    return Speculation(rows, memory, state.guesses, pause, caution, passes)


def _guess(
    guesser: Guesser, state: Speculation, lengths: jax.Array, sampling: SamplingParams
) -> Speculation:
    """The state with new guesses; a row's newest token stands at its cache's length."""
    if isinstance(guesser, PromptLookup):
        text: Any = state.memory
        return replace(state, guesses=look_up(text, lengths, guesser))
    cache: Any = state.memory
    rows, own = state.rows, (sampling.sampler, sampling.keys)
    past = past_of(rows, sampling, rows.lengths)
    guesses, cache = draft(guesser, cache, rows.last, *own, rows.lengths, past)
    return replace(state, guesses=guesses, memory=cache)


def _with_columns(rows: DecodeState) -> DecodeState:
    """`step` as `decode` leaves it: columns that are final in every row."""
    longest = jnp.max(rows.lengths)
    shortest = jnp.min(jnp.where(rows.done, longest, rows.lengths))
    return replace(rows, step=shortest)
