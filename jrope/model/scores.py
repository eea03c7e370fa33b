"""How likely a text is: log-probabilities of given tokens, the vocabulary in chunks."""

from functools import partial
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jrope.model.config import LlamaConfig
from jrope.model.context import Share, context_share
from jrope.model.llama import hidden_states, unembed
from jrope.model.placed import on_mesh
from jrope.sharding.axes import ONE, Axes
from jrope.sharding.meshes import layout_of
from jrope.sharding.vocabulary import argmax, logsumexp, pick
from jrope.tree import Params

LOGITS_AT_ONCE = 256


class Scores(NamedTuple):
    """What `score` gives with `greedy`.

    Args:
      logprobs: float32 [B, T - 1], as without it.
      greedy: bool [B, T - 1], whether token t + 1 is the argmax, of equal logits the
        first as in torch; False where there is nothing to score.
    """

    logprobs: jax.Array
    greedy: jax.Array


@overload
def score(
    params: Params,
    tokens: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    config: LlamaConfig,
    rope_lengths: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    remat: bool = False,
    greedy: Literal[False] = False,
) -> jax.Array: ...


@overload
def score(
    params: Params,
    tokens: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    config: LlamaConfig,
    rope_lengths: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    remat: bool = False,
    greedy: Literal[True],
) -> Scores: ...


def score(
    params: Params,
    tokens: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    config: LlamaConfig,
    rope_lengths: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    remat: bool = False,
    greedy: bool = False,
) -> jax.Array | Scores:
    """log p(token t + 1 | tokens up to t) for every t.

    The perplexity of row b is exp(-mean(score[b, : lengths[b] - 1])).

    Args:
      params, config: the model.
      tokens: integers [B, T], rows padded on the right.
      lengths: valid tokens of each row, [B]; None: T.
      rope_lengths, segment_ids: as in `forward`.
      remat: for training on long texts, see `llama.hidden_states`.
      greedy: whether to tell, too, which tokens are the argmax of their logits.

    Returns:
      float32 [B, T - 1]; entries from lengths - 1 on are 0, and those of a segment's
      first token.  With `greedy`, `Scores`.
    """
    given = {
        "lengths": lengths,
        "rope_lengths": rope_lengths,
        "segment_ids": segment_ids,
    }
    if (layout := layout_of(params)) is not None:
        how = {"config": config, "remat": remat, "greedy": greedy}
        rows: Any = layout.rows()
        returned = Scores(rows, rows) if greedy else rows
        return on_mesh(_score, layout, params, tokens, given, how, returned)
    return _score(params, tokens, **given, config=config, remat=remat, greedy=greedy)


@partial(jax.jit, static_argnames=("config", "remat", "greedy", "axes"))
def _score(
    params: Params,
    tokens: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    config: LlamaConfig,
    rope_lengths: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    remat: bool = False,
    greedy: bool = False,
    axes: Axes = ONE,
) -> jax.Array | Scores:
    x, cache = hidden_states(
        params,
        tokens,
        config=config,
        lengths=lengths,
        rope_lengths=rope_lengths,
        segment_ids=segment_ids,
        remat=remat,
        axes=axes,
    )
    tokens = jnp.asarray(tokens)
    share, targets = context_share(tokens, None, axes), tokens[:, 1:]
    if share is None:
        x = x[:, :-1]
    else:
        targets = jnp.pad(targets, ((0, 0), (0, 1)))
    how: dict[str, Any] = {"config": config, "axes": axes, "share": share}
    scores = _token_scores(params, x, targets, **how, greedy=greedy)
    steps = jnp.arange(1, tokens.shape[1], dtype=jnp.int32)[None, :]
    known = steps < cache.lengths[:, None]
    if segment_ids is not None:
        segments = jnp.asarray(segment_ids)
        known &= segments[:, 1:] == segments[:, :-1]
    scores = [x[:, : known.shape[1]] for x in scores]
    scores = [jnp.where(known, x, jnp.zeros_like(x)) for x in scores]
    return Scores(*scores) if greedy else scores[0]


def token_logprobs(
    params: Params,
    x: jax.Array,
    targets: jax.Array,
    *,
    config: LlamaConfig,
    axes: Axes = ONE,
    share: Share | None = None,
) -> jax.Array:
    """log softmax(unembed(x))[target], never holding more than 256 x V logits a row.

    Args:
      params, config: the model.
      x: hidden states [B, T, D], after the final norm.
      targets: integers [B, T].
      axes: as in `forward`.
      share: whose tokens x has, where a mesh splits the sequence.

    Returns:
      float32 [B, T].
    """
    how: dict[str, Any] = {"config": config, "axes": axes, "share": share}
    (scores,) = _token_scores(params, x, targets, **how, greedy=False)
    return scores


def _token_scores(
    params: Params,
    x: jax.Array,
    targets: jax.Array,
    *,
    config: LlamaConfig,
    axes: Axes,
    share: Share | None,
    greedy: bool,
) -> tuple[jax.Array, ...]:
    """`token_logprobs`, and with `greedy` whether the target is the best token."""
    if share is not None:
        how: dict[str, Any] = {"config": config, "axes": axes, "greedy": greedy}
        scores = _token_scores(params, x, share.take(targets), **how, share=None)
        return tuple(map(share.whole, scores))
    batch, count = targets.shape
    size = max(1, min(LOGITS_AT_ONCE, count))
    pad = -count % size
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)))

    @jax.checkpoint
    def chunk(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        states, wanted = inputs
        logits = unembed(params, states, config=config, axes=axes)
        scores = pick(logits, wanted, axes) - logsumexp(logits, axes)
        if not greedy:
            return (scores,)
        best = argmax(logits.reshape(-1, logits.shape[-1]), axes)
        return scores, best.reshape(wanted.shape) == wanted.astype(jnp.int32)

    def split(a: jax.Array) -> jax.Array:
        a = a.reshape(batch, (count + pad) // size, size, *a.shape[2:])
        return jnp.moveaxis(a, 1, 0)

    scores = jax.lax.map(chunk, (split(x), split(targets)))
    whole = [jnp.moveaxis(a, 0, 1).reshape(batch, count + pad) for a in scores]
    return tuple(a[:, :count] for a in whole)
