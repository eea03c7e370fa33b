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
from jrope.generation.loop import DecodeState, draw, prefill_prompts
from jrope.generation.request import Request, SamplingParams
from jrope.generation.sample import log_probs
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.llama import hidden_states, unembed
from jrope.tree import Params

LONGEST_PAUSE = 32  # single tokens after guesses that were wrong again and again

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
        state = replace(state, memory=_put(memory, rows.last[:, None], lengths, 1))
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

    Rows may get ahead of the limit, up to `most`.  Passes over one token, which are
    those of `decode`, and over several are two loops in turns: a condition might copy
    the cache.
    """

    def unfinished(carry: Carry) -> jax.Array:
        rows = carry[1].rows
        return jnp.any(~rows.done & (rows.lengths < limit))

    def hopeful(carry: Carry) -> jax.Array:
        state = carry[1]
        known = (state.guesses[:, 0] >= 0) & ~state.rows.done
        return (state.pause == 0) & jnp.any(known)

    def step(carry: Carry, *, count: int) -> Carry:
        cache, state = carry
        given = params, cache, state.rows, state.guesses[:, :count], sampling, most
        after, rows, kept = one_pass(*given, config=config)
        state = _learn(state, rows, kept, cache.lengths, count)
        return after, _guess(guesser, state, after.lengths, sampling)

    def turn(carry: Carry) -> Carry:
        single, several = partial(step, count=0), partial(step, count=guesser.tokens)
        carry = jax.lax.while_loop(
            lambda carry: unfinished(carry) & ~hopeful(carry), single, carry
        )
        return jax.lax.while_loop(
            lambda carry: unfinished(carry) & hopeful(carry), several, carry
        )

    cache, state = jax.lax.while_loop(unfinished, turn, (cache, state))
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
    drawn, logits, finite = _draw_each(logits, rows, guesses, sampling)
    scores = None
    if rows.logprobs is not None:
        scores = log_probs(logits, drawn.reshape(-1)).reshape(drawn.shape)
    rows, kept = _keep(rows, drawn, guesses, scores, finite, sampling, most)
    return replace(after, lengths=cache.lengths + kept), rows, kept


def _draw_each(
    logits: jax.Array, rows: DecodeState, guesses: jax.Array, sampling: SamplingParams
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A token for each of n + 1 positions, as if the guesses before it were right.

    Returns:
      tokens int32 [B, n + 1], the logits to go on with [B * (n + 1), V], and whether
      those of a position are finite, bool [B, n + 1].
    """
    batch, count = len(guesses), guesses.shape[1] + 1
    at = jnp.arange(count, dtype=jnp.int32)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    keys = fold(sampling.keys, rows.lengths[:, None] + at[None, :]).reshape(-1)
    sampler = jax.tree.map(lambda x: _each(x, count), sampling.sampler)
    size = rows.seen.shape[1]
    before = at[None, :-1] < at[:, None]  # [n + 1, n]
    ids = jnp.where(before[None] & (guesses >= 0)[:, None], guesses[:, None], size)
    seen = _each(rows.seen, count)
    ids = ids.reshape(batch * count, count - 1)
    own = jnp.arange(batch * count, dtype=jnp.int32)[:, None]
    seen = seen.at[own, ids].set(True, mode="drop")
    drawn, logits, finite = draw(logits, sampler, keys, seen)
    return drawn.reshape(batch, count), logits, finite.reshape(batch, count)


def _each(x: Any, count: int) -> Any:
    """What belongs to rows, once for each of their positions."""
    return jnp.repeat(x, count, axis=0) if jnp.ndim(x) else x


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
    batch, count = drawn.shape
    at = jnp.arange(count, dtype=jnp.int32)[None, :]
    right = jnp.cumprod((drawn[:, :-1] == guesses).astype(jnp.int32), axis=1)
    stop = jnp.any(drawn[:, :, None] == sampling.stop_ids[None, None], axis=-1)
    stopped = jnp.cumsum(stop, axis=1, dtype=jnp.int32) - stop.astype(jnp.int32) > 0
    room = (rows.lengths[:, None] + at < most) & ~rows.done[:, None]
    new = (at <= jnp.sum(right, axis=1, keepdims=True)) & ~stopped & room
    kept = jnp.sum(new, axis=1, dtype=jnp.int32)
    newest = jnp.take_along_axis(drawn, jnp.maximum(kept - 1, 0)[:, None], axis=1)
    put = partial(_put, starts=rows.lengths, counts=kept)
    lengths = rows.lengths + kept
    own = jnp.arange(batch, dtype=jnp.int32)[:, None]
    ids = jnp.where(new, drawn, rows.seen.shape[1])
    return replace(
        rows,
        last=jnp.where(kept > 0, newest[:, 0], rows.last),
        tokens=put(rows.tokens, drawn),
        logprobs=None if scores is None else put(rows.logprobs, scores),
        seen=rows.seen.at[own, ids].set(True, mode="drop"),
        done=rows.done | jnp.any(stop & new, axis=1) | (lengths >= most),
        finite=rows.finite & jnp.all(finite | ~new, axis=1),
        lengths=lengths,
    ), kept


def _put(
    into: Any, new: jax.Array, starts: jax.Array, counts: jax.Array | int
) -> jax.Array:
    """The first `counts` of `new` [B, T] into `into` [B, W] from each row's start."""
    batch, count = new.shape
    at = jnp.arange(count, dtype=jnp.int32)[None, :]
    counts = jnp.broadcast_to(jnp.asarray(counts, jnp.int32), batch)[:, None]
    index = jnp.where(at < counts, starts[:, None] + at, into.shape[1])
    own = jnp.arange(batch, dtype=jnp.int32)[:, None]
    return into.at[own, index].set(new, mode="drop")


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
        memory = _put(memory, new, lengths + 1, kept)
        if guessed:  # right at least once in four rows: what a wider pass costs
            paid = 4 * (jnp.sum(kept, dtype=jnp.int32) - going) >= going
            caution = jnp.clip(2 * caution, 1, LONGEST_PAUSE)
            caution = jnp.where(paid, 0, caution)
            pause = caution
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
    guesses, cache = draft(guesser, cache, state.rows, sampling)
    return replace(state, guesses=guesses, memory=cache)


def _with_columns(rows: DecodeState) -> DecodeState:
    """`step` as `decode` leaves it: columns that are final in every row."""
    longest = jnp.max(rows.lengths)
    shortest = jnp.min(jnp.where(rows.done, longest, rows.lengths))
    return replace(rows, step=shortest)
