"""What a RoPE method does to the attention score as tokens move apart.

    score(d) = mean over queries q and keys k of  (R_d q) . k / sqrt(H)

with R_d the method's rotation by d positions: every query of a text against every key
of it, as if they stood d apart, for each layer and head.  A product is linear in both,
so the mean over all pairs is the product of the means: exact, at any distance.

q and k, not yet rotated, come from the model itself, reading windows within the length
it was trained for with its own rotary embedding.  They are the same for every method,
so what differs between two curves is the rotation alone.  That plain RoPE lets scores
decay with distance is its promise (Su et al. 2021, sec. 3.4.3).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jrope.errors import JropeError
from jrope.lab.memory import compile_fitting
from jrope.model.config import LlamaConfig
from jrope.model.layers import (
    Step,
    decoder_layer,
    gathered,
    layer_kind,
    local_table,
    queries_keys_values,
)
from jrope.model.llama import embed
from jrope.model.placed import share_of
from jrope.rope import Rope, table
from jrope.sharding.axes import ONE, Axes, entry
from jrope.sharding.meshes import Layout, layout_of, readable, stand_whole
from jrope.tree import Params


class Means(NamedTuple):
    """Mean un-rotated queries [L, N, H] and keys [L, K, H], float64."""

    queries: np.ndarray
    keys: np.ndarray


def mean_queries_and_keys(
    params: Params,
    config: LlamaConfig,
    texts: Sequence[np.ndarray],
    context: int,
    *,
    most: int = 16,
) -> Means:
    """Average what attention compares, over all positions of windows of the texts.

    Args:
      params, config: the model, with its own rotary embedding.
      texts: token ids of each, int [n].
      context: tokens of a window, at most what the model was trained for.
      most: windows that are read, taken evenly from the texts.

    Raises:
      JropeError: no text has `context` tokens.
    """
    rows = [
        np.asarray(text[at : at + context], np.int32)
        for text in texts
        for at in range(0, len(text) - context + 1, context)
    ]
    if not rows:
        got = max((len(text) for text in texts), default=0)
        raise JropeError(f"text: got {got} tokens, want at least {context}")
    picked = np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))
    layout = layout_of(params)
    tables = table(config.rope, np.arange(context)[None, :], length=context)
    shape = jax.ShapeDtypeStruct((1, context), jnp.int32)
    what = f"distance at context {context}"
    (cos, sin), shape = stand_whole((tables, shape), layout)
    args, how = (params, shape, cos, sin), {"config": config, "layout": layout}
    program = compile_fitting(_queries_and_keys, what, *args, **how)
    total: Means | None = None
    for i in picked:
        tokens = stand_whole(jnp.asarray(rows[i])[None], layout)
        sums = readable(program.call(params, tokens, cos, sin))
        wide = Means(*(np.asarray(x, np.float64) for x in sums))
        if total is not None:
            wide = Means(total.queries + wide.queries, total.keys + wide.keys)
        total = wide
    if total is None:
        raise JropeError(f"most: got {most}, want at least 1 window")
    return Means(total.queries / len(picked), total.keys / len(picked))


@partial(jax.jit, static_argnames=("config", "axes", "layout"))
def _queries_and_keys(
    params: Params,
    tokens: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    config: LlamaConfig,
    axes: Axes = ONE,
    layout: Layout | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The window's mean queries [L, N, H] and keys [L, K, H], before they are rotated.

    Tokens are int32 [1, T]; on a mesh each group of rows reads the same ones.
    """
    if layout is not None:
        how = {"config": share_of(config, layout), "axes": layout.axes}
        whole, heads = PartitionSpec(), (layout.axes.tensor, layout.axes.kv_heads)
        given = layout.params(params), whole, whole, whole
        means = tuple(PartitionSpec(None, entry(names)) for names in heads)
        run = layout.map(partial(_queries_and_keys, **how), given, means)
        return run(params, tokens, cos, sin)
    model, count = params["model"], tokens.shape[1]
    x = embed(model, tokens, config=config, axes=axes)
    places = jnp.arange(count, dtype=jnp.int32)[None]
    step = Step(cos=cos, sin=sin, local=local_table(config, places))
    queries: list[jax.Array] = []
    keys: list[jax.Array] = []
    layer = partial(decoder_layer, config=config, capacity=count, axes=axes)
    for i in range(config.num_hidden_layers):
        weights, kind = model["layers"][str(i)], layer_kind(config, i, count)
        q, k, _ = queries_keys_values(gathered(weights, axes), x, config)
        for found, y in ((queries, q), (keys, k)):
            found.append(jnp.mean(y.astype(jnp.float32), axis=(0, 1)))
        x, _ = layer(weights, x, step, **kind)
    return jnp.stack(queries), jnp.stack(keys)


def scores_at(
    means: Means,
    config: LlamaConfig,
    distances: Sequence[int],
    *,
    length: int | None = None,
) -> np.ndarray:
    """The mean score of every layer and head at every distance, before any soft cap.

    (q.k over pairs) cos(d f) + (q x k over pairs) sin(d f), times the squared attention
    scaling, plus what the unrotated channels give, over sqrt(H) or times the model's
    own scale; float64.  A layer rotates by the rope it has, or not at all; NaN where
    its window ends.

    Args:
      means: of `mean_queries_and_keys`.
      config: the model, with the method.
      distances: positions from key to query.
      length: for methods that depend on it: that of the sequence.

    Returns:
      float64 [len(distances), L, N].
    """
    group = means.queries.shape[1] // means.keys.shape[1]
    away, every = np.asarray(distances), list[np.ndarray]()
    for i, (q, k) in enumerate(zip(means.queries, means.keys, strict=True)):
        kind, k = layer_kind(config, i, 0), np.repeat(k, group, axis=0)
        rope = config.local_rope if "local" in kind else config.rope
        if "rotary" in kind or rope is None:
            scores = np.broadcast_to((q * k).sum(-1), (len(away), len(q)))
        else:
            scores = _turned(q, k, rope, away, length)
        window = None if config.windows is None else config.windows[i]
        hidden = np.zeros(len(away), bool) if window is None else away >= window
        every.append(np.where(hidden[:, None], np.nan, scores))
    scale = config.attention_scale or 1 / np.sqrt(config.head_dim)
    return np.stack(every, axis=1) * scale


def _turned(
    q: np.ndarray, k: np.ndarray, rope: Rope, away: np.ndarray, length: int | None
) -> np.ndarray:
    """Products of q and k [N, H] as they stand apart: [len(away), N]."""
    frequencies, scaling = rope.frequencies(length, np.float64)
    pairs = rope.rotary_dim // 2
    (qa, qb), (ka, kb) = (_pairs(x, pairs, rope.layout) for x in (q, k))
    angle = away[:, None] * np.asarray(frequencies) / rope.condense
    straight = np.cos(angle) @ (qa * ka + qb * kb).T
    across = np.sin(angle) @ (qa * kb - qb * ka).T
    rest = (q[:, 2 * pairs :] * k[:, 2 * pairs :]).sum(-1)
    return (straight + across) * scaling**2 + rest


def _pairs(x: np.ndarray, pairs: int, layout: str) -> tuple[np.ndarray, np.ndarray]:
    turning = x[..., : 2 * pairs]
    if layout == "interleaved":
        return turning[..., 0::2], turning[..., 1::2]
    return turning[..., :pairs], turning[..., pairs:]


def describe(
    means: Means, config: LlamaConfig, farthest: int, *, length: int | None = None
) -> dict[str, Any]:
    """What a record tells: mean over heads and layers, and the spread over heads.

    Args:
      means, config, length: as in `scores_at`.
      farthest: distances go up to this, or to where every layer's window ends, evenly
        on a logarithmic scale.
    """
    windows = config.windows or (None,)
    seen = [farthest if w is None else min(w - 1, farthest) for w in windows]
    farthest = max(*seen, 1)
    distances = np.unique(np.geomspace(1, farthest, 48).round().astype(int))
    each = scores_at(means, config, distances.tolist(), length=length)
    each = each.reshape(len(distances), -1)
    low, high = np.nanpercentile(each, [10, 90], axis=1)
    return {
        "distances": distances.tolist(),
        "scores": np.nanmean(each, axis=1).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
    }
