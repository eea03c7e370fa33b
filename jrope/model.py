"""LLaMA as pure functions of (params, tokens, positions, cache).

The parameter tree is Hugging Face's tensor names split at the dots, every matrix in its
[out, in] order.  `Llama` is the Flax module that owns those names; functions compute.

Layers are separate subtrees, each run through one jitted function that is traced once
and called L times: a scan over stacked weights would copy a layer's weights each step.

Sources: Touvron et al. 2023 (arXiv:2302.13971); RMSNorm, Zhang and Sennrich 2019;
SwiGLU, Shazeer 2020; grouped queries, Ainslie et al. 2023 (arXiv:2305.13245).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jrope.activations import ACTIVATIONS
from jrope.attention import attend, matmul_precision
from jrope.cache import KVCache, grow, per_row, write
from jrope.config import LlamaConfig, Tree, flatten, nest, parameter_shapes
from jrope.errors import JropeError
from jrope.rope import rotate, table

# block: (name when joined by `fuse`, the projections in it)
FUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}


def forward(
    params: Mapping[str, Any],
    tokens: jax.Array,
    positions: jax.Array | None = None,
    cache: KVCache | None = None,
    *,
    config: LlamaConfig,
    lengths: Any = None,
    rope_lengths: Any = None,
    capacity: int | None = None,
    logits: Literal["all", "last"] = "all",
) -> tuple[jax.Array, KVCache]:
    """Next-token logits of every token, and the cache that holds them.

    Pure: works under jit, grad, vmap, jax.checkpoint and eval_shape (config static).

    Args:
      params: the parameter tree, see `config.parameter_shapes`.
      tokens: integers [B, T], rows padded on the right.  An id outside the vocabulary
        gives NaN.
      positions: integers [B, T] for the rotary embedding; None: count on from the
        cache.  They order nothing: attention is causal in the order given.
      cache: what earlier tokens left; None: there are none.
      lengths: valid tokens of each row, [B]; None: T.
      rope_lengths: each row's planned total length, scalar or [B], for the methods that
        depend on it.  None: the cache's; without a cache `capacity` if given, else what
        transformers takes, the largest position + 1 (of the row, not of the batch).
      capacity: slots of the cache that is made when none is given; None: T.
      logits: "all" tokens, or each row's "last" valid one.

    Returns:
      logits: float32 [B, T, V], or [B, V] for "last".  A row that overflows its cache
        is NaN.
      cache: the given one with the new tokens in it.
    """
    x, cache = hidden_states(
        params,
        tokens,
        positions,
        cache,
        config=config,
        lengths=lengths,
        rope_lengths=rope_lengths,
        capacity=capacity,
    )
    if logits == "last":
        x = last_token(x, lengths)
    return unembed(params, x, config=config), cache


def hidden_states(
    params: Mapping[str, Any],
    tokens: jax.Array,
    positions: jax.Array | None = None,
    cache: KVCache | None = None,
    *,
    config: LlamaConfig,
    lengths: Any = None,
    rope_lengths: Any = None,
    capacity: int | None = None,
) -> tuple[jax.Array, KVCache]:
    """`forward` up to and including the final norm: [B, T, D] in the params' dtype."""
    batch, count = _check_tokens(tokens, positions, cache, capacity)
    model = params["model"]
    cos, sin, rope_lengths = _rotary_table(
        config, tokens, positions, cache, lengths, rope_lengths, capacity
    )
    x = embed(model["embed_tokens"]["weight"], tokens)
    starts = None if cache is None else cache.lengths
    room = (
        cache.capacity if cache is not None else count if capacity is None else capacity
    )
    keys, values = [], []
    for i in range(config.num_hidden_layers):
        slots = None if cache is None else (cache.keys[i], cache.values[i])
        weights = model["layers"][str(i)]
        x, (k, v) = decoder_layer(
            weights, x, cos, sin, slots, starts, config=config, capacity=room
        )
        keys.append(k)
        values.append(v)
    x = rms_norm(x, model["norm"]["weight"], config.rms_norm_eps)
    filled = per_row(count if lengths is None else lengths, batch)
    filled = filled if starts is None else starts + filled
    x = jnp.where((filled > room)[:, None, None], jnp.asarray(jnp.nan, x.dtype), x)
    cache = KVCache(tuple(keys), tuple(values), filled, per_row(rope_lengths, batch))
    return x, cache


def _check_tokens(
    tokens: jax.Array,
    positions: jax.Array | None,
    cache: KVCache | None,
    capacity: int | None,
) -> tuple[int, int]:
    dims = chex.Dimensions()
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        got = f"{tokens.dtype} {list(tokens.shape)}"
        raise JropeError(f"tokens: got {got}, want integers [B, T]")
    dims["BT"] = tokens.shape
    if positions is not None:
        chex.assert_shape(positions, dims["BT"])
    if cache is not None and capacity is not None:
        raise JropeError("capacity: the given cache already has one; give only one")
    room = cache.capacity if cache is not None else capacity
    if room is not None and tokens.shape[1] > room and cache is None:
        raise JropeError(f"capacity: got {room}, want at least T = {tokens.shape[1]}")
    return tokens.shape[0], tokens.shape[1]


def _rotary_table(
    config: LlamaConfig,
    tokens: jax.Array,
    positions: jax.Array | None,
    cache: KVCache | None,
    lengths: Any,
    rope_lengths: Any,
    capacity: int | None,
) -> tuple[jax.Array, jax.Array, Any]:
    """cos, sin [B, T, R], once for all layers, and the lengths they were made for."""
    batch, count = tokens.shape
    counted = positions is None
    if positions is None:
        steps = jnp.arange(count, dtype=jnp.int32)[None, :]
        first = jnp.zeros(batch, jnp.int32) if cache is None else cache.lengths
        positions = first[:, None] + steps
    if rope_lengths is None:
        if cache is not None:
            rope_lengths = cache.rope_lengths
        elif capacity is not None:
            rope_lengths = capacity
        elif counted:
            rope_lengths = count if lengths is None else per_row(lengths, batch)
        else:
            rope_lengths = jnp.max(positions, axis=1).astype(jnp.int32) + 1
    with jax.named_scope("rope"):
        cos, sin = table(config.rope, positions, length=rope_lengths)
    return cos, sin, rope_lengths


def embed(weight: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the embedding [V, D] for tokens [B, T]; NaN for ids outside it."""
    # As unsigned, a negative id is out of range too, not counted from the end.
    ids = tokens.astype(jnp.uint32)
    return jnp.asarray(weight).at[ids].get(mode="fill", fill_value=jnp.nan)


def last_token(x: jax.Array, lengths: Any) -> jax.Array:
    """The last valid token of each row: [B, T, D] -> [B, D]."""
    if lengths is None:
        return x[:, -1]
    index = per_row(lengths, x.shape[0])[:, None, None] - 1
    return jnp.take_along_axis(x, jnp.maximum(index, 0), axis=1)[:, 0]


def unembed(
    params: Mapping[str, Any], x: jax.Array, *, config: LlamaConfig
) -> jax.Array:
    """Logits of hidden states [..., D]: float32 [..., V], not rounded in between."""
    tied = config.tie_word_embeddings
    head = params["model"]["embed_tokens"] if tied else params["lm_head"]
    with jax.named_scope("lm_head"):
        return linear(head, x, dtype=jnp.float32)


@partial(jax.jit, static_argnames=("config", "capacity"))
def decoder_layer(
    weights: Mapping[str, Any],
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slots: tuple[jax.Array, jax.Array] | None,
    starts: jax.Array | None,
    *,
    config: LlamaConfig,
    capacity: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
      weights: the layer's subtree.
      x: [B, T, D].
      cos, sin: float32 [B, T, R].
      slots: keys and values [B, S, K, H] to write into; None: there are none yet.
      starts: int32 [B], filled slots of each row, given with `slots`.
      config: the model's.
      capacity: S.

    Returns:
      x [B, T, D], and keys and values with the new tokens in them.
    """
    eps = config.rms_norm_eps
    with jax.named_scope("attention"):
        normed = rms_norm(x, weights["input_layernorm"]["weight"], eps)
        y, filled = attention(
            weights["self_attn"], normed, cos, sin, slots, starts, config, capacity
        )
        x = x + y
    with jax.named_scope("mlp"):
        normed = rms_norm(x, weights["post_attention_layernorm"]["weight"], eps)
        x = x + mlp(weights["mlp"], normed, config=config)
    if x.shape[1] > 1:
        # Else XLA puts the cache writes of all layers off, and keeps their inputs.
        x, filled = jax.lax.optimization_barrier((x, filled))
    return x, filled


def attention(
    weights: Mapping[str, Any],
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    slots: tuple[jax.Array, jax.Array] | None,
    starts: jax.Array | None,
    config: LlamaConfig,
    capacity: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Project, rotate, remember, attend, project back; arguments as `decoder_layer`."""
    batch, count, _ = x.shape
    heads = (batch, count, -1, config.head_dim)
    width, kv_width = (
        n * config.head_dim
        for n in (config.num_attention_heads, config.num_key_value_heads)
    )
    sizes = (width, kv_width, kv_width)
    q, k, v = (y.reshape(heads) for y in linears(weights, "self_attn", x, sizes))
    turn = partial(
        rotate,
        cos=cos,
        sin=sin,
        layout=config.rope.layout,
        precision=config.rope.precision,
    )
    q, k = turn(q), turn(k)
    if slots is None or starts is None:
        y = attend(q, k, v)
        slots = grow(k, capacity), grow(v, capacity)
    else:
        slots = (write(slots[0], k, starts), write(slots[1], v, starts))
        y = attend(q, *slots, starts)
    return linear(weights["o_proj"], y.reshape(batch, count, -1)), slots


def mlp(weights: Mapping[str, Any], x: jax.Array, *, config: LlamaConfig) -> jax.Array:
    """down(act(gate(x)) * up(x))."""
    sizes = (config.intermediate_size, config.intermediate_size)
    gate, up = linears(weights, "mlp", x, sizes)
    return linear(weights["down_proj"], ACTIVATIONS[config.hidden_act](gate) * up)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """weight * x / sqrt(mean(x^2) + eps), float32 inside, rounded before the weight."""
    wide = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = (wide * jax.lax.rsqrt(mean + np.float32(eps))).astype(x.dtype)
    return normed * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def linears(
    weights: Mapping[str, Any], block: str, x: jax.Array, sizes: Sequence[int]
) -> list[jax.Array]:
    """The block's projections of one input, in one product where `fuse` joined them."""
    joined, names = FUSED[block]
    if joined not in weights:
        return [linear(weights[name], x) for name in names]
    ends = np.cumsum(sizes).tolist()
    y = linear(weights[joined], x)
    return [y[..., e - size : e] for e, size in zip(ends, sizes, strict=True)]


def linear(
    weights: Mapping[str, jax.Array], x: jax.Array, *, dtype: Any = None
) -> jax.Array:
    """x W^T + b for W [out, in], accumulated in float32, rounded once to `dtype`.

    A single 16-bit token is a multiply and a reduction: on GPU and CPU it streams the
    weights faster than a matrix product of one row.  `fuse` may hold W as a `kernel`
    [in, out] instead, which suits larger batches.
    """
    bias = weights.get("bias")
    dtype = x.dtype if dtype is None else dtype
    if "kernel" in weights:
        y = _product(x, weights["kernel"], 0, dtype if bias is None else jnp.float32)
    elif x.size == x.shape[-1] and jnp.dtype(x.dtype).itemsize == 2:
        y = _row_product(x, weights["weight"])
    else:
        y = _product(x, weights["weight"], 1, dtype if bias is None else jnp.float32)
    if bias is not None:
        bias = bias.reshape((1,) * (x.ndim - 1) + bias.shape)
        y = y + bias.astype(jnp.float32)
    return y.astype(dtype)


def _product(x: jax.Array, w: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """x [..., in] times w, whose `axis` is `in`; float32 sums on every backend."""
    # A GPU rounds its float32 sums to a 16-bit result for free; XLA's CPU backend is
    # three times faster when asked for float32 and rounded after.
    asked = jnp.float32 if jax.default_backend() == "cpu" else dtype
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    precision = matmul_precision(x.dtype)
    return jax.lax.dot_general(
        x, w, contract, precision=precision, preferred_element_type=asked
    )


def _row_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., in] of one row times w [out, in]: float32 [..., out]."""
    if jax.default_backend() == "cpu":
        # XLA's CPU backend would widen all weights once, ahead of a decode loop.
        w, x = jax.lax.optimization_barrier((w, x))
    row = x.reshape(1, -1).astype(jnp.float32)
    y = jnp.sum(w.astype(jnp.float32) * row, axis=1)
    return y.reshape(*x.shape[:-1], -1)


def init_params(key: jax.Array, config: LlamaConfig, dtype: Any = jnp.float32) -> Tree:
    """Fresh weights: normal(0, initializer_range), norms one, biases zero."""
    flat: dict[str, jax.Array] = {}
    for i, (name, shape) in enumerate(parameter_shapes(config).items()):
        if name.endswith("bias"):
            flat[name] = jnp.zeros(shape, dtype)
        elif len(shape) == 1:
            flat[name] = jnp.ones(shape, dtype)
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
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, *args: Any, **kwargs: Any) -> Any:
        """Same arguments and results as `forward`."""
        shapes = parameter_shapes(self.config)
        roots = dict.fromkeys(name.split(".")[0] for name in shapes)
        params = {root: self.param(root, self._fresh, root) for root in roots}
        return forward(params, tokens, *args, config=self.config, **kwargs)

    def _fresh(self, key: jax.Array, root: str) -> Tree:
        return init_params(key, self.config, self.param_dtype)[root]


def count_parameters(params: Mapping[str, Any]) -> int:
    """Numbers in the tree."""
    return sum(int(np.prod(leaf.shape)) for leaf in flatten(params).values())
