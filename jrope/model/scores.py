"""How likely a text is: log-probabilities of given tokens, the vocabulary in chunks."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jrope.model.config import LlamaConfig
from jrope.model.context import Share, context_share
from jrope.model.llama import hidden_states, unembed
from jrope.model.placed import on_mesh
from jrope.sharding.axes import ONE, Axes
from jrope.sharding.meshes import layout_of
from jrope.sharding.vocabulary import logsumexp, pick
from jrope.tree import Params

LOGITS_AT_ONCE = 256


def score(
    params: Params,
    tokens: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    config: LlamaConfig,
    rope_lengths: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    remat: bool = False,
) -> jax.Array:
    """log p(token t + 1 | tokens up to t) for every t.

    The perplexity of row b is exp(-mean(score[b, : lengths[b] - 1])).

    Args:
      params, config: the model.
      tokens: integers [B, T], rows padded on the right.
      lengths: valid tokens of each row, [B]; None: T.
      rope_lengths, segment_ids: as in `forward`.
      remat: for training on long texts, see `llama.hidden_states`.

    Returns:
      float32 [B, T - 1]; entries from lengths - 1 on are 0, and those of a segment's
      first token.
    """
    given = {
        "lengths": lengths,
        "rope_lengths": rope_lengths,
        "segment_ids": segment_ids,
    }
    if (layout := layout_of(params)) is not None:
        how, rows = {"config": config, "remat": remat}, layout.rows()
        return on_mesh(_score, layout, params, tokens, given, how, rows)
    return _score(params, tokens, **given, config=config, remat=remat)


@partial(jax.jit, static_argnames=("config", "remat", "axes"))
def _score(
    params: Params,
    tokens: ArrayLike,
    lengths: ArrayLike | None = None,
    *,
    config: LlamaConfig,
    rope_lengths: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    remat: bool = False,
    axes: Axes = ONE,
) -> jax.Array:
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
    scores = token_logprobs(params, x, targets, config=config, axes=axes, share=share)[
        :, : tokens.shape[1] - 1
    ]
    steps = jnp.arange(1, tokens.shape[1], dtype=jnp.int32)[None, :]
    known = steps < cache.lengths[:, None]
    if segment_ids is not None:
        segments = jnp.asarray(segment_ids)
        known &= segments[:, 1:] == segments[:, :-1]
    return jnp.where(known, scores, 0)


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
    if share is not None:
        own = share.take(targets)
        scores = token_logprobs(params, x, own, config=config, axes=axes)
        return share.whole(scores)
    batch, count = targets.shape
    size = max(1, min(LOGITS_AT_ONCE, count))
    pad = -count % size
    x = jnp.pad(x, ((0, 0), (0, pad), (0, 0)))
    targets = jnp.pad(targets, ((0, 0), (0, pad)))

    @jax.checkpoint
    def chunk(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        states, wanted = inputs
        logits = unembed(params, states, config=config, axes=axes)
        return pick(logits, wanted, axes) - logsumexp(logits, axes)

    def split(a: jax.Array) -> jax.Array:
        a = a.reshape(batch, (count + pad) // size, size, *a.shape[2:])
        return jnp.moveaxis(a, 1, 0)

    scores = jax.lax.map(chunk, (split(x), split(targets)))
    return jnp.moveaxis(scores, 0, 1).reshape(batch, count + pad)[:, :count]
