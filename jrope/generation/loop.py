"""Generation: two compiled functions, prefill and decode, and the doors around them.

Each compiles once per bucket of shapes (`request`), whatever the prompts, the sampler,
the seeds, the stop ids and the number of new tokens; the loop runs on the device.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack, final

import jax
import jax.numpy as jnp
import numpy as np

from jrope.errors import check_count
from jrope.generation.request import Options, Request, Rules, prepare
from jrope.generation.sample import log_probs
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.llama import hidden_states, last_token, unembed
from jrope.model.scores import token_logprobs


@final
@dataclass(frozen=True)
class Generation:
    """What `generate` returns; every array is on the device.

    Args:
      tokens: int32 [B, max_new_tokens], new tokens only, pad id after a row's stop.
      lengths: int32 [B], new tokens of each row, its stop id included.
      logprobs: float32 [B, max_new_tokens] under the model itself (before temperature
        and filters), 0 after the stop; None unless asked for.
      prompt_logprobs: float32 [B, T - 1], as `score` gives; None unless asked for.
    """

    tokens: jax.Array
    lengths: jax.Array
    logprobs: jax.Array | None
    prompt_logprobs: jax.Array | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Rows:
    """What decoding knows of its rows besides the cache."""

    last: jax.Array  # int32 [B], the newest token, not yet in the cache
    tokens: jax.Array  # int32 [B, room]
    logprobs: jax.Array  # float32 [B, room], or [B, 0] when not asked for
    seen: jax.Array  # bool [B, V], for the repetition penalty
    done: jax.Array  # bool [B]
    lengths: jax.Array  # int32 [B], new tokens
    step: jax.Array  # int32 [], columns of `tokens` that are filled


def generate(
    params: Mapping[str, Any],
    prompt: Any,
    lengths: Any = None,
    *,
    config: LlamaConfig,
    logprobs: bool = False,
    **options: Unpack[Options],
) -> Generation:
    """Continue every prompt by up to `max_new_tokens` tokens.

    Args:
      params, config: the model.
      prompt: integers [B, T], rows padded on the right with anything.
      lengths: tokens of each prompt, [B], at least 1; None: T.
      logprobs: also return log-probabilities of prompt and new tokens.
      options: sampler, key, seeds, max_new_tokens, stop_ids, pad_id, prefill_chunk: see
        `request.Options`.

    Returns:
      The new tokens and what is known of them.

    Raises:
      JropeError: an empty prompt, ids outside the vocabulary, a missing key, ...
    """
    request = prepare(prompt, lengths, config, **options)
    cache, rows, prompt_scores = begin(params, request, config, logprobs)
    limit = jnp.asarray(request.max_new_tokens, jnp.int32)
    _, rows = decode(params, cache, rows, request.rules, limit, config=config)
    new = request.max_new_tokens
    return Generation(
        tokens=rows.tokens[:, :new],
        lengths=jnp.minimum(rows.lengths, new),
        logprobs=rows.logprobs[:, :new] if logprobs else None,
        prompt_logprobs=prompt_scores,
    )


def stream(
    params: Mapping[str, Any],
    prompt: Any,
    lengths: Any = None,
    *,
    config: LlamaConfig,
    chunk: int = 8,
    **options: Unpack[Options],
) -> Iterator[np.ndarray]:
    """`generate` as it goes: the same tokens in blocks of columns.

    The first token comes alone, then `chunk` at a time; a block is read while the
    device already computes the next one.

    Args:
      chunk: tokens per row between two looks at the device.
      params, prompt, lengths, config, options: as in `generate`.

    Yields:
      int32 [B, n], the next n tokens of every row; ends when every row has stopped.

    Raises:
      JropeError: as `generate`, at the call, not at the first block.
    """
    check_count("chunk", chunk, 1)
    request = prepare(prompt, lengths, config, **options)
    return _blocks(params, request, config, chunk)


def _blocks(
    params: Mapping[str, Any], request: Request, config: LlamaConfig, chunk: int
) -> Iterator[np.ndarray]:
    if request.max_new_tokens == 0:
        return
    cache, rows, _ = begin(params, request, config, False)
    told = 0
    for planned in [*range(1, request.max_new_tokens, chunk), None]:
        ahead = rows
        if planned is not None:
            limit = min(planned + chunk, request.max_new_tokens)
            limit = jnp.asarray(limit, jnp.int32)
            cache, ahead = decode(
                params, cache, rows, request.rules, limit, config=config
            )
        reached = int(rows.step)  # waits for the block before, not for this one
        if reached > told:
            yield np.asarray(rows.tokens)[:, told:reached]
        told = reached
        if bool(rows.done.all()):
            return
        rows = ahead


@partial(
    jax.jit,
    static_argnames=("config", "capacity", "scored"),
    donate_argnames=("cache",),
)
def prefill(
    params: Mapping[str, Any],
    tokens: jax.Array,
    lengths: jax.Array,
    rope_lengths: jax.Array,
    cache: KVCache | None,
    last: jax.Array | None,
    *,
    config: LlamaConfig,
    capacity: int | None,
    scored: bool,
) -> tuple[jax.Array, KVCache, jax.Array | None]:
    """A piece of the prompts into a fresh cache, or onto the one given.

    Args:
      params, config: the model.
      tokens: int32 [B, T + 1], the piece and the token after it.
      lengths: valid tokens of the piece, int32 [B].
      rope_lengths: int32 [B], planned totals.
      cache: what the pieces before left, None for the first one.
      last: [B, D], hidden states that rows without a token in this piece keep.
      capacity: slots of a fresh cache.
      scored: whether to return log p(token t + 1 | tokens up to t).

    Returns:
      hidden state [B, D] of each row's last token so far, the cache, scores [B, T].
    """
    x, cache = hidden_states(
        params,
        tokens[:, :-1],
        config=config,
        cache=cache,
        lengths=lengths,
        rope_lengths=rope_lengths,
        capacity=capacity,
    )
    scores = token_logprobs(params, x, tokens[:, 1:], config=config) if scored else None
    newest = last_token(x, lengths)
    if last is not None:
        newest = jnp.where((lengths > 0)[:, None], newest, last)
    return newest, cache, scores


@partial(jax.jit, static_argnames=("config", "room", "scored"))
def first_token(
    params: Mapping[str, Any],
    last: jax.Array,
    prompt: jax.Array,
    lengths: jax.Array,
    rules: Rules,
    *,
    config: LlamaConfig,
    room: int,
    scored: bool,
) -> _Rows:
    """Draw each row's first new token from the hidden state [B, D] of its prompt."""
    batch, width = prompt.shape
    valid = jnp.arange(width, dtype=jnp.int32)[None, :] < lengths[:, None]
    ids = jnp.where(valid, prompt, config.vocab_size)
    seen = jnp.zeros((batch, config.vocab_size), bool)
    seen = seen.at[jnp.arange(batch)[:, None], ids].set(True, mode="drop")
    rows = _Rows(
        last=jnp.zeros(batch, jnp.int32),
        tokens=jnp.full((batch, room), rules.pad_id, jnp.int32),
        logprobs=jnp.zeros((batch, room if scored else 0), jnp.float32),
        seen=seen,
        done=jnp.zeros(batch, bool),
        lengths=jnp.zeros(batch, jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )
    return _draw(unembed(params, last, config=config), rows, rules)


@partial(jax.jit, static_argnames=("config",), donate_argnames=("cache",))
def decode(
    params: Mapping[str, Any],
    cache: KVCache,
    rows: _Rows,
    rules: Rules,
    limit: jax.Array,
    *,
    config: LlamaConfig,
) -> tuple[KVCache, _Rows]:
    """Draw tokens on the device until column `limit` or until every row has stopped."""

    def unfinished(state: tuple[KVCache, _Rows]) -> jax.Array:
        return (state[1].step < limit) & ~jnp.all(state[1].done)

    def step(state: tuple[KVCache, _Rows]) -> tuple[KVCache, _Rows]:
        cache, rows = state
        x, cache = hidden_states(params, rows.last[:, None], cache=cache, config=config)
        return cache, _draw(unembed(params, x[:, 0], config=config), rows, rules)

    return jax.lax.while_loop(unfinished, step, (cache, rows))


def _draw(logits: jax.Array, rows: _Rows, rules: Rules) -> _Rows:
    """One new token for every row that goes on; write down what came of it."""
    with jax.named_scope("sample"):
        keys = jax.vmap(jax.random.fold_in, (0, None))(rules.keys, rows.step)
        drawn = rules.sampler(logits, keys, rows.seen)
    token = jnp.where(rows.done, rules.pad_id, drawn)
    stopped = jnp.any(drawn[:, None] == rules.stop_ids[None, :], axis=1)
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=rows.step, axis=1)
    scores = rows.logprobs
    if scores.shape[1]:
        score = jnp.where(rows.done, 0, log_probs(logits, drawn))
        scores = put(scores, score[:, None])
    batch = jnp.arange(token.shape[0], dtype=jnp.int32)
    return replace(
        rows,
        last=token,
        tokens=put(rows.tokens, token[:, None]),
        logprobs=scores,
        seen=rows.seen.at[batch, drawn].set(True),
        done=rows.done | stopped,
        lengths=rows.lengths + (~rows.done).astype(jnp.int32),
        step=rows.step + 1,
    )


def begin(
    params: Mapping[str, Any], request: Request, config: LlamaConfig, scored: bool
) -> tuple[KVCache, _Rows, jax.Array | None]:
    """Prefill, in pieces where asked, and the first token."""
    size, static = request.prefill_chunk, {"config": config, "scored": scored}

    def piece(at: int, *so_far: Any) -> tuple[jax.Array, KVCache, jax.Array | None]:
        capacity = None if at else request.capacity
        args = (*piece_of(request, at), *so_far)
        return prefill(params, *args, capacity=capacity, **static)

    last, cache, score = piece(0, None, None)
    scores = [score]
    for at in range(size, request.width, size):
        last, cache, score = piece(at, cache, last)
        scores.append(score)
    rows = first_token(params, last, *first_of(request), room=request.room, **static)
    return cache, rows, _prompt_scores(scores, request) if scored else None


def piece_of(request: Request, at: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, lengths and planned totals of the piece of the prompts from `at` on."""
    size = request.prefill_chunk
    ahead = np.pad(request.prompt[:, at : at + size + 1], ((0, 0), (0, 1)))
    valid = np.clip(request.lengths - at, 0, size)
    planned = request.lengths + request.max_new_tokens
    return (
        jnp.asarray(ahead[:, : size + 1]),
        jnp.asarray(valid, jnp.int32),
        jnp.asarray(planned, jnp.int32),
    )


def first_of(request: Request) -> tuple[jax.Array, jax.Array, Rules]:
    """What `first_token` is told of the request."""
    return jnp.asarray(request.prompt), jnp.asarray(request.lengths), request.rules


def _prompt_scores(scores: list[Any], request: Request) -> jax.Array:
    whole = jnp.concatenate(scores, axis=1)[:, : request.width - 1]
    known = np.arange(1, request.width)[None, :] < request.lengths[:, None]
    return jnp.where(known, whole, 0)
