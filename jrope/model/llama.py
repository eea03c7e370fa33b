"""LLaMA as pure functions of (params, tokens, positions, cache).

The parameter tree is Hugging Face's tensor names split at the dots, every matrix in its
[out, in] order.  `Llama` is the Flax module that owns those names; functions compute.

Layers are separate subtrees, each run through one jitted function that is traced once
and called L times: a scan over stacked weights would copy a layer's weights each step.

Source: Touvron et al. 2023 (arXiv:2302.13971, 2307.09288).
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Never

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from jrope.model.cache import KVCache, all_roll, per_row
from jrope.model.config import LlamaConfig, parameter_shapes
from jrope.model.context import Share, context_share
from jrope.model.flat import Flat
from jrope.model.inputs import (
    check_inputs,
    check_segment_rope,
    flat_table,
    refuse_unknown,
    rotary_table,
    segment_positions,
)
from jrope.model.int8_cache import CacheDtype, check_cache_dtype
from jrope.model.layers import (
    decoder_layer,
    gathered,
    layer_kind,
    mlp,
    norm_of,
    rms_norm,
    times,
)
from jrope.model.packed import widen
from jrope.model.placed import cache_specs, logit_specs, on_mesh
from jrope.model.products import linear
from jrope.numerics import cpu_barrier
from jrope.sharding import stripes
from jrope.sharding.axes import ONE, Axes
from jrope.sharding.meshes import layout_of
from jrope.tree import Params, Tree, flatten, nest


def forward(
    params: Params,
    tokens: ArrayLike,
    positions: ArrayLike | None = None,
    cache: KVCache | None = None,
    *,
    config: LlamaConfig,
    lengths: ArrayLike | None = None,
    rope_lengths: ArrayLike | None = None,
    capacity: int | None = None,
    cache_dtype: CacheDtype | None = None,
    segment_ids: ArrayLike | None = None,
    logits: Literal["all", "last"] = "all",
    axes: Axes = ONE,
    **unknown: Never,
) -> tuple[jax.Array, KVCache]:
    """Next-token logits of every token, and the cache that holds them.

    Pure: works under jit, grad, vmap, jax.checkpoint and eval_shape (config static).

    Args:
      params: the parameter tree, see `config.parameter_shapes`.
      tokens: integers [B, T], rows padded on the right with anything.  An id outside
        the vocabulary makes its row NaN.
      positions: integers [B, T] for the rotary embedding; None: count on from the
        cache, or from each segment's first token.  They order nothing: attention is
        causal in the order given.  Growing lengths take none.
      cache: what earlier tokens left; None: there are none.
      lengths: valid tokens of each row, [B]; None: T.
      rope_lengths: each row's planned total length, scalar or [B], for the methods that
        depend on it.  None: the cache's; without a cache `capacity` if given, else what
        transformers takes, the largest position + 1 (of the row, not of the batch).
        Read where `config.rope.lengths` is "planned".
      capacity: slots of the cache that is made when none is given; None: T.
      cache_dtype: "int8" for the cache that is made, see `model.int8_cache`; None: what
        the model computes in.
      segment_ids: integers [B, T], several sequences packed into a row: a token sees
        those before it whose id is its own.  Not with a cache, and what is returned as
        one cannot be continued.
      logits: "all" tokens, or each row's "last" valid one.
      axes: those of the mesh, for a call inside `jax.shard_map` (check_vma=False where
        they split the sequence, or for one row's token in 16 bits); parameters that
        stand on a mesh need none.

    Returns:
      logits: float32 [B, T, V], or [B, V] for "last".  A row that overflows its cache
        is NaN.
      cache: the given one with the new tokens in it.

    Raises:
      JropeError: arguments of another type or shape, or that exclude each other.
    """
    given: dict[str, Any] = {
        "positions": positions,
        "cache": cache,
        "lengths": lengths,
        "rope_lengths": rope_lengths,
        "segment_ids": segment_ids,
    }
    refuse_unknown("forward", unknown)
    if axes == ONE and (layout := layout_of(params)) is not None:
        rank = 3 if logits == "all" else 2
        specs = logit_specs(layout, rank), cache_specs(layout)
        how = {"config": config, "capacity": capacity, "cache_dtype": cache_dtype}
        how |= {"logits": logits}
        return on_mesh(forward, layout, params, tokens, given, how, specs)
    given |= {"config": config, "capacity": capacity, "cache_dtype": cache_dtype}
    x, cache = hidden_states(params, tokens, **given, axes=axes)
    share = context_share(tokens, given["cache"], axes)
    if logits == "last":
        x, share = last_token(x, lengths, share), None
    y = unembed(params, x, config=config, axes=axes)
    return y if share is None else share.whole(y), cache


def hidden_states(
    params: Params,
    tokens: ArrayLike,
    positions: ArrayLike | None = None,
    cache: KVCache | None = None,
    *,
    config: LlamaConfig,
    lengths: ArrayLike | None = None,
    rope_lengths: ArrayLike | None = None,
    capacity: int | None = None,
    cache_dtype: CacheDtype | None = None,
    segment_ids: ArrayLike | None = None,
    flat: Flat | None = None,
    remat: bool = False,
    mlp: Callable[..., jax.Array] = mlp,
    axes: Axes = ONE,
    **unknown: Never,
) -> tuple[jax.Array, KVCache]:
    """`forward` up to and including the final norm: [B, T, D] in the dtype of `embed`.

    With `axes` that split the sequence, of this device's tokens: see `context.Share`.
    With `remat`, a backward pass keeps no more than each layer's input, and computes
    the rest of the layer anew: less memory for a third more time.

    `mlp` replaces the second half of all layers: a hashable function of (weights, x, *,
    config, axes), as `layers.mlp` is.  It is given the layer's whole subtree, so leaves
    of its own may tell one layer from another; it keeps nothing between calls.

    With `flat`, `tokens` are a line [1, N] of rows, and the cache holds keys and values
    as they lie there, which cannot be continued.
    """
    refuse_unknown("forward", unknown)
    if axes == ONE and (layout := layout_of(params)) is not None:
        given = {
            "positions": positions,
            "cache": cache,
            "lengths": lengths,
            "rope_lengths": rope_lengths,
            "segment_ids": segment_ids,
        }
        specs = layout.rows(), cache_specs(layout)
        how = {"config": config, "capacity": capacity, "cache_dtype": cache_dtype}
        how |= {"remat": remat, "mlp": mlp}
        return on_mesh(_every_state, layout, params, tokens, given, how, specs)
    tokens, positions, segments = check_inputs(
        params, tokens, positions, cache, capacity, segment_ids
    )
    check_cache_dtype(cache_dtype, given=cache is not None)
    batch, count = tokens.shape
    model = params["model"]
    if segments is not None:
        check_segment_rope(config, rope_lengths)
        positions = segment_positions(segments) if positions is None else positions
    share = context_share(tokens, cache, axes)
    if flat is None:
        given = tokens, positions, cache, lengths, rope_lengths, capacity, axes, share
        step, rope_lengths = rotary_table(config, *given)
    else:
        step, rope_lengths = flat_table(config, flat, count), flat.planned
    if lengths is not None:  # what stands in the padding must not matter, NaN neither
        steps = jnp.arange(count, dtype=jnp.int32)[None, :]
        tokens = jnp.where(steps < per_row(lengths, batch)[:, None], tokens, 0)
    own_tokens = tokens if share is None else share.take(tokens)
    x = embed(model, own_tokens, config=config, axes=axes)
    starts = None if cache is None else cache.lengths
    capacity = count if capacity is None else capacity
    own = stripes.share(capacity, axes) if cache is None else cache.capacity
    capacity = own * stripes.count(axes)
    keys, values = [], []

    @functools.cache  # layers of a kind are traced once
    def layer_of(**kind: Any) -> Callable[..., Any]:
        how = {"config": config, "capacity": own, "mlp": mlp, "axes": axes}
        how |= {} if cache_dtype is None else {"cache_dtype": cache_dtype}
        layer = partial(decoder_layer, **how, **kind)
        return jax.checkpoint(layer) if remat else layer

    step = replace(step, starts=starts, segments=segments, share=share)
    if config.windows is not None and lengths is not None:
        step = replace(step, counts=per_row(lengths, batch))
    for i in range(config.num_hidden_layers):
        if cache is not None:
            step = replace(step, slots=(cache.keys[i], cache.values[i]))
        slots = capacity if cache is None else cache.keys[i].shape[1]
        layer = layer_of(**layer_kind(config, i, slots))
        x, (k, v) = layer(model["layers"][str(i)], x, step)
        keys.append(k)
        values.append(v)
    x = rms_norm(x, *norm_of(model["norm"], config))
    if flat is not None:
        return x, KVCache(tuple(keys), tuple(values), flat.lengths, flat.planned)
    filled = per_row(count if lengths is None else lengths, batch)
    filled = filled if starts is None else starts + filled
    if not all_roll(config, keys):
        full = (filled > capacity)[:, None, None]
        x = jnp.where(full, jnp.asarray(jnp.nan, x.dtype), x)
    cache = KVCache(tuple(keys), tuple(values), filled, per_row(rope_lengths, batch))
    return x, cache


def _every_state(
    params: Params,
    tokens: jax.Array,
    *,
    cache: KVCache | None = None,
    axes: Axes,
    **given: Any,
) -> tuple[jax.Array, KVCache]:
    """`hidden_states` of all tokens, on every device."""
    x, after = hidden_states(params, tokens, cache=cache, axes=axes, **given)
    share = context_share(tokens, cache, axes)
    return x if share is None else share.whole(x), after


def embed(
    model: Params, tokens: jax.Array, *, config: LlamaConfig, axes: Axes = ONE
) -> jax.Array:
    """Rows of the embedding [V, D] for tokens [B, T]; NaN for ids outside it.

    They are in the embedding's dtype; of a quantised one, in that of the norms.
    """
    x, factor = _embedded(model, tokens, axes), config.embedding_multiplier
    if config.norm == "gemma":
        factor = float(np.asarray(factor, x.dtype))
    return times(x, factor)


def _embedded(model: Params, tokens: jax.Array, axes: Axes) -> jax.Array:
    leaves = gathered({"embed_tokens": model["embed_tokens"]}, axes)["embed_tokens"]
    if axes.tensor:
        return _embed_share(leaves, tokens, model["norm"]["weight"].dtype, axes)
    # As unsigned, a negative id is out of range too, not counted from the end.
    ids = tokens.astype(jnp.uint32)
    weight = jnp.asarray(leaves["weight"])
    if weight.dtype.itemsize == 2:
        weight, ids = cpu_barrier(weight, ids)
    if "scale" not in leaves:
        return weight.at[ids].get(mode="fill", fill_value=jnp.nan)
    rows = weight.at[ids].get(mode="clip")
    scale = jnp.asarray(leaves["scale"]).at[ids].get(mode="fill", fill_value=jnp.nan)
    return widen(rows, scale, model["norm"]["weight"].dtype, _zeros_of(leaves, ids))


def _embed_share(
    leaves: Params, tokens: jax.Array, dtype: Any, axes: Axes
) -> jax.Array:
    """`embed` where each device holds the rows of a part of the vocabulary."""
    weight = leaves["weight"]
    size, total = weight.shape[0], weight.shape[0] * axes.count()
    ids = jnp.where((tokens >= 0) & (tokens < total), tokens, total).astype(jnp.int32)
    local = axes.local_ids(ids, size)
    if weight.dtype.itemsize == 2:
        weight, local = cpu_barrier(weight, local)
    rows = weight.at[local].get(mode="fill", fill_value=0)
    if "scale" in leaves:
        scale = leaves["scale"].at[local].get(mode="fill", fill_value=0)
        rows = widen(rows, scale, dtype, _zeros_of(leaves, local))
    rows = axes.total(rows)  # exact: all but one are zero
    return jnp.where((ids < total)[..., None], rows, jnp.asarray(jnp.nan, rows.dtype))


def _zeros_of(leaves: Params, ids: jax.Array) -> jax.Array | None:
    """Of some rows of a quantised embedding; any where an id is outside it."""
    zero = leaves.get("zero")
    return None if zero is None else jnp.asarray(zero).at[ids].get(mode="clip")


def last_token(
    x: jax.Array, lengths: ArrayLike | None, share: Share | None = None
) -> jax.Array:
    """The last valid token of each row: [B, T, D] -> [B, D]."""
    count = x.shape[1] if share is None else share.count
    if lengths is None and share is None:
        return x[:, -1]
    index = per_row(count if lengths is None else lengths, x.shape[0]) - 1
    index = jnp.maximum(index, 0)
    if share is not None:
        return share.pick(x, index)
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]


def unembed(
    params: Params, x: jax.Array, *, config: LlamaConfig, axes: Axes = ONE
) -> jax.Array:
    """Logits of hidden states [..., D]: float32 [..., V], not rounded in between.

    With `axes` of this device's share of the vocabulary.
    """
    tied = config.tie_word_embeddings
    head = params["model"]["embed_tokens"] if tied else params["lm_head"]
    head = gathered({"lm_head": head}, axes)["lm_head"]
    with jax.named_scope("lm_head"):
        logits = linear(head, x, dtype=jnp.float32)
    if config.logits_divisor != 1:
        logits = logits / np.float32(config.logits_divisor)
    if (cap := config.logit_cap) is not None:
        logits = jnp.tanh(logits / np.float32(cap)) * np.float32(cap)
    return logits


def init_params(
    key: jax.Array, config: LlamaConfig, dtype: DTypeLike = jnp.float32
) -> Tree:
    """Fresh weights: normal(0, initializer_range), norms those of 1, biases zero."""
    flat: dict[str, jax.Array] = {}
    for i, (name, shape) in enumerate(parameter_shapes(config).items()):
        if name.endswith("bias"):
            flat[name] = jnp.zeros(shape, dtype)
        elif len(shape) == 1:
            ones = jnp.zeros if config.norm == "gemma" else jnp.ones
            flat[name] = ones(shape, dtype)
        else:
            noise = jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)
            flat[name] = (noise * np.float32(config.initializer_range)).astype(dtype)
    return nest(flat)


class Llama(nn.Module):
    """The Flax module: owns the parameters under Hugging Face's names, runs `forward`.

    `Llama(config).init(key, tokens)["params"]` is the tree that `forward`, `generate`
    and `save` take; `Llama(config).apply({"params": params}, tokens)` is `forward`.
    """

    config: LlamaConfig
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and results as `forward`."""
        shapes = parameter_shapes(self.config)
        roots = dict.fromkeys(name.split(".")[0] for name in shapes)
        params = {root: self.param(root, self._fresh, root) for root in roots}
        return forward(params, tokens, *args, config=self.config, **kwargs)

    def _fresh(self, key: jax.Array, root: str) -> Tree:
        return init_params(key, self.config, self.param_dtype)[root]


def count_parameters(params: Params) -> int:
    """Numbers in the tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(params).values())
