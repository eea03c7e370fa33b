"""The compiled functions of generation: prefill, the first token, decode.

Each compiles once per bucket of shapes (`request`), whatever the prompts, the sampler,
the seeds, the stop ids and the number of new tokens; the loop runs on the device.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jrope.generation.past import PROMPT, Past, add_seen
from jrope.generation.request import (
    Request,
    SamplingParams,
    chunk_inputs,
    first_token_inputs,
    joined_scores,
    sampling_specs,
)
from jrope.generation.sample import Sampler, log_probs
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.context import context_share
from jrope.model.int8_cache import CacheDtype
from jrope.model.llama import hidden_states, last_token, unembed
from jrope.model.placed import cache_specs, logit_specs, row_specs, share_of
from jrope.model.scores import token_logprobs
from jrope.sharding.axes import ONE, Axes
from jrope.sharding.meshes import Layout
from jrope.tree import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeState:
    """What decoding knows of its rows besides the cache."""

    last: jax.Array  # int32 [B], the newest token, not yet in the cache
    tokens: jax.Array  # int32 [B, output_slots]
    logprobs: jax.Array | None  # float32 [B, output_slots], where asked for
    seen: jax.Array  # int32 [B, V], for penalties, see `Past`
    done: jax.Array  # bool [B]
    finite: jax.Array  # bool [B], no logit so far was NaN or infinite
    lengths: jax.Array  # int32 [B], new tokens
    step: jax.Array  # int32 [], columns of `tokens` that are filled


def state_specs(layout: Layout) -> Any:
    """How a `DecodeState` is split."""
    rows: Any = layout.rows()
    every: Any = dict.fromkeys([f.name for f in fields(DecodeState)], rows)
    seen = logit_specs(layout, 2)
    return DecodeState(**every | {"seen": seen, "step": PartitionSpec()})


@partial(
    jax.jit,
    static_argnames=("config", "capacity", "cache_dtype", "scored", "axes", "layout"),
    donate_argnames=("cache",),
)
def prefill(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    rope_lengths: jax.Array,
    cache: KVCache | None,
    last: jax.Array | None,
    *,
    config: LlamaConfig,
    capacity: int | None,
    scored: bool,
    cache_dtype: CacheDtype | None = None,
    axes: Axes = ONE,
    layout: Layout | None = None,
) -> tuple[jax.Array, KVCache, jax.Array | None]:
    """A chunk of the prompts into a fresh cache, or onto the one given.

    Args:
      params, config: the model.
      tokens: int32 [B, T + 1], the chunk and the token after it.
      lengths: valid tokens of the chunk, int32 [B].
      rope_lengths: int32 [B], planned totals.
      cache: what the chunks before left, None for the first one.
      last: [B, D], hidden states that rows without a token in this chunk keep.
      capacity, cache_dtype: of a fresh cache.
      scored: whether to return log p(token t + 1 | tokens up to t).
      axes: as in `forward`.
      layout: where params stand, which makes this the same for each device's share.

    Returns:
      hidden state [B, D] of each row's last token so far, the cache, scores [B, T].
    """
    given = tokens, lengths, rope_lengths, cache, last
    if layout is not None:
        how = {"config": share_of(config, layout), "axes": layout.axes}
        how |= {"capacity": capacity, "cache_dtype": cache_dtype}
        share = partial(prefill, scored=scored, **how)
        specs = layout.params(params), *row_specs(layout, given)
        rows = layout.rows()
        returned = rows, cache_specs(layout), rows if scored else None
        return layout.map(share, specs, returned)(params, *given)
    share = context_share(tokens[:, :-1], cache, axes)
    x, cache = hidden_states(
        params,
        tokens[:, :-1],
        config=config,
        cache=cache,
        lengths=lengths,
        rope_lengths=rope_lengths,
        capacity=capacity,
        cache_dtype=cache_dtype,
        axes=axes,
    )
    score = partial(token_logprobs, params, config=config, axes=axes, share=share)
    scores = score(x, tokens[:, 1:]) if scored else None
    newest = last_token(x, lengths, share)
    if last is not None:
        newest = jnp.where((lengths > 0)[:, None], newest, last)
    return newest, cache, scores


@partial(
    jax.jit, static_argnames=("config", "output_slots", "scored", "axes", "layout")
)
def first_token(
    params: Params,
    last: jax.Array,
    prompt: jax.Array,
    lengths: jax.Array,
    sampling: SamplingParams,
    *,
    config: LlamaConfig,
    output_slots: int,
    scored: bool,
    axes: Axes = ONE,
    layout: Layout | None = None,
) -> DecodeState:
    """Draw each row's first new token from the hidden state [B, D] of its prompt."""
    if layout is not None:
        how = {"config": share_of(config, layout), "axes": layout.axes}
        share = partial(first_token, output_slots=output_slots, scored=scored, **how)
        specs = layout.params(params), *row_specs(layout, (last, prompt, lengths))
        run = layout.map(
            share, (*specs, sampling_specs(layout, sampling)), state_specs(layout)
        )
        return run(params, last, prompt, lengths, sampling)
    batch, width = prompt.shape
    valid = jnp.arange(width, dtype=jnp.int32)[None, :] < lengths[:, None]
    size = config.vocab_size
    ids = jnp.where(valid, axes.local_ids(prompt, size), size)
    seen = jnp.zeros((batch, config.vocab_size), jnp.int32)
    seen = seen.at[jnp.arange(batch)[:, None], ids].set(PROMPT, mode="drop")
    state = DecodeState(
        last=jnp.zeros(batch, jnp.int32),
        tokens=jnp.full((batch, output_slots), sampling.pad_id, jnp.int32),
        # None, not an array of no columns: of one that a mesh splits, XLA's GPU
        # compiler dies (jax 0.11.2, two H100s).
        logprobs=jnp.zeros((batch, output_slots), jnp.float32) if scored else None,
        seen=seen,
        done=jnp.zeros(batch, bool),
        finite=jnp.ones(batch, bool),
        lengths=jnp.zeros(batch, jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )
    logits = unembed(params, last, config=config, axes=axes)
    return draw_token(logits, state, sampling, axes)


@partial(
    jax.jit, static_argnames=("config", "axes", "layout"), donate_argnames=("cache",)
)
def decode(
    params: Params,
    cache: KVCache,
    state: DecodeState,
    sampling: SamplingParams,
    limit: jax.Array,
    *,
    config: LlamaConfig,
    axes: Axes = ONE,
    layout: Layout | None = None,
) -> tuple[KVCache, DecodeState]:
    """Draw tokens on the device until column `limit` or until every row has stopped."""
    if layout is not None:
        share = partial(decode, config=share_of(config, layout), axes=layout.axes)
        carried = cache_specs(layout), state_specs(layout)
        how = sampling_specs(layout, sampling), PartitionSpec()
        run = layout.map(share, (layout.params(params), *carried, *how), carried)
        return run(params, cache, state, sampling, limit)

    def unfinished(carry: tuple[KVCache, DecodeState]) -> jax.Array:
        going = axes.any_row(~jnp.all(carry[1].done))
        return (carry[1].step < limit) & going

    def step(carry: tuple[KVCache, DecodeState]) -> tuple[KVCache, DecodeState]:
        cache, state = carry
        last = state.last[:, None]
        x, cache = hidden_states(params, last, cache=cache, config=config, axes=axes)
        logits = unembed(params, x[:, 0], config=config, axes=axes)
        return cache, draw_token(logits, state, sampling, axes)

    return jax.lax.while_loop(unfinished, step, (cache, state))


def draw_token(
    logits: jax.Array,
    state: DecodeState,
    sampling: SamplingParams,
    axes: Axes = ONE,
) -> DecodeState:
    """One new token for every row that goes on, from float32 logits [B, V]."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(sampling.keys, state.step)
    past = past_of(state, sampling, jnp.broadcast_to(state.step, len(logits)))
    drawn, logits, finite = draw(logits, sampling.sampler, keys, past, axes)
    finite |= state.done
    token = jnp.where(state.done, sampling.pad_id, drawn)
    stopped = jnp.any(drawn[:, None] == sampling.stop_ids[None, :], axis=1)
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.step, axis=1)
    scores = state.logprobs
    if scores is not None:
        score = jnp.where(state.done, 0, log_probs(logits, drawn, axes))
        scores = put(scores, score[:, None])
    own = axes.local_ids(drawn, logits.shape[1])
    return replace(
        state,
        last=token,
        tokens=put(state.tokens, token[:, None]),
        logprobs=scores,
        seen=add_seen(state.seen, own[:, None]),
        done=state.done | stopped,
        finite=state.finite & finite,
        lengths=state.lengths + (~state.done).astype(jnp.int32),
        step=state.step + 1,
    )


def past_of(state: DecodeState, sampling: SamplingParams, steps: jax.Array) -> Past:
    """What tokens are drawn in view of, where rows have so many already, int32 [B]."""
    return Past(
        seen=state.seen,
        bias=sampling.bias,
        stop_ids=sampling.stop_ids,
        early=sampling.least - steps,
    )


def draw(
    logits: jax.Array,
    sampler: Sampler,
    keys: jax.Array,
    past: Past,
    axes: Axes = ONE,
    allowed: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A token for every row of float32 logits [B, V], each with its own key.

    `past` is what these are drawn in view of; `allowed` bool [B, V] marks those that
    may be drawn (None: all of them).

    Returns:
      tokens int32 [B], the logits to go on with, and whether a row's are all finite.
    """
    # Without it XLA's GPU backend (jax 0.11) computes the head's product once for the
    # sampler and again for the sum below: 0.33 ms more of 5.66 a step (8B, H100).
    logits = jax.lax.optimization_barrier(logits)
    with jax.named_scope("sample"):
        own = {"axes": axes} if axes.tensor or axes.batch else {}
        free = logits if allowed is None else jnp.where(allowed, logits, -jnp.inf)
        if type(sampler).__call__ is Sampler.__call__:
            drawn = sampler(free, keys, past, **own)
        else:  # the caller's own, maybe a Sampler that does more
            drawn = sampler(past.changed(free, axes), keys, past.counts() > 0, **own)
    # x - x is 0, or NaN where x is not finite: XLA's CPU maximum may lose a NaN.
    wrong = axes.total(jnp.sum(logits - logits, axis=-1))
    return drawn, logits, wrong == 0


def prefill_prompts(
    params: Params, request: Request, config: LlamaConfig, scored: bool
) -> tuple[jax.Array, KVCache, jax.Array | None]:
    """`prefill`, in chunks where asked."""
    size = request.prefill_chunk
    static = {"config": config, "scored": scored, "layout": request.layout}

    def chunk(at: int, *so_far: Any) -> tuple[jax.Array, KVCache, jax.Array | None]:
        fresh = {} if at else request.fresh_cache
        args = (*chunk_inputs(request, at), *so_far)
        return prefill(params, *args, **{"capacity": None, **fresh}, **static)

    last, cache, score = chunk(0, None, None)
    scores = [score]
    for at in range(size, request.width, size):
        last, cache, score = chunk(at, cache, last)
        scores.append(score)
    return last, cache, joined_scores(scores, request) if scored else None


def prefill_and_first_token(
    params: Params, request: Request, config: LlamaConfig, scored: bool
) -> tuple[KVCache, DecodeState, jax.Array | None]:
    """Prefill, in chunks where asked, and the first token."""
    last, cache, scores = prefill_prompts(params, request, config, scored)
    state = first_token(
        params,
        last,
        *first_token_inputs(request),
        config=config,
        output_slots=request.output_slots,
        scored=scored,
        layout=request.layout,
    )
    return cache, state, scores
