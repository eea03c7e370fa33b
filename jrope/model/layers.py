"""One decoder layer, as functions of its subtree of the parameters.

Sources: RMSNorm, Zhang and Sennrich 2019 (arXiv:1910.07467); SwiGLU, Shazeer 2020
(arXiv:2002.05202); grouped queries, Ainslie et al. 2023 (arXiv:2305.13245).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jrope.errors import JropeError
from jrope.model.activations import ACTIVATIONS
from jrope.model.attention import attend
from jrope.model.cache import Slots, as_cached, grow, write
from jrope.model.config import LlamaConfig, NormKind
from jrope.model.context import Share, attend_share, attend_share_growing, remember
from jrope.model.decode_kernel import rotate_append_attend
from jrope.model.decode_parts import kernel_takes, on_cuda
from jrope.model.flat import Flat, attend_flat
from jrope.model.growing import attend_growing
from jrope.model.int8_cache import CacheDtype
from jrope.model.products import is_row, linear
from jrope.model.rolling import extend, keep_last
from jrope.numerics import with_rank
from jrope.rope import Rope, rotate, table
from jrope.sharding.axes import ONE, Axes
from jrope.tree import LayerParams, LinearParams, Params, flatten, nest

# block: (name when joined by `fuse`, the projections in it)
FUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}

Norm: TypeAlias = tuple[jax.Array, float, NormKind]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Step:
    """What a layer is given besides its weights and hidden states.

    Args:
      cos, sin: float32 [B, T, R]; for growing lengths of the slots, see `growing`.
      slots: this layer's keys and values [B, S, K, H] to write into; None: none yet.
      starts: int32 [B], filled slots of each row, given with `slots`.
      segments: int32 [B, T], equal for tokens of one sequence; None: a row is one.
      flat: the rows of a line of tokens, B = 1; None: it is one of B.
      share: where a mesh splits the sequence, what this device computes of it.
      local: cos and sin of the layers with a rotary embedding of their own.
      counts: int32 [B], valid tokens of each row, read where slots go round; None: T.
    """

    cos: jax.Array
    sin: jax.Array
    slots: Slots | None = None
    starts: jax.Array | None = None
    segments: jax.Array | None = None
    flat: Flat | None = None
    share: Share | None = None
    local: tuple[jax.Array, jax.Array] | None = None
    counts: jax.Array | None = None


def attention(
    weights: LayerParams,
    x: jax.Array,
    step: Step,
    *,
    config: LlamaConfig,
    capacity: int,
    window: int | None,
    rotary: bool,
    local: bool = False,
    cache_dtype: CacheDtype | None = None,
    axes: Axes = ONE,
) -> tuple[jax.Array, Slots]:
    """Norm, project, rotate, remember, attend, project back; see `decoder_layer`."""
    batch, count, _ = x.shape
    q, k, v = queries_keys_values(weights, x, config)
    rope, (cos, sin) = config.rope, (step.cos, step.sin)
    if local and config.local_rope is not None and step.local is not None:
        rope, (cos, sin) = config.local_rope, step.local
    tables = {"cos": cos, "sin": sin}
    how = {"scale": config.attention_scale, "cap": config.score_cap}
    see = partial(attend, window=window, segments=step.segments, **how)
    if rotary and rope.lengths == "growing":  # keys are cached as they are
        see = partial(attend_growing, **tables, rope=rope, window=window, **how)
    elif rotary:
        precision = "accurate" if config.wide_rotation else rope.precision
        turn = partial(rotate, layout=rope.layout, precision=precision)
        if window is None and _is_kernels(q, k, step, config, rope):
            fused = partial(
                rotate_append_attend, precision=precision, scale=config.attention_scale
            )
            y, slots = _at_once(fused, turn, see, (q, k, v), step, cos, sin)
            y = y.reshape(batch, count, -1)
            return linear(weights["self_attn"]["o_proj"], y, axes=axes), slots
        q, k = turn(q, cos, sin), turn(k, cos, sin)
    new = as_cached((k, v), step.slots, cache_dtype)
    if step.flat is not None:
        see = partial(attend_flat, see, flat=step.flat, config=config, window=window)
    if step.share is not None:
        slots = remember(step.slots, new, step.share, capacity)
        seen = (k, v) if step.slots is None else slots
        if rotary and rope.lengths == "growing":
            see = partial(attend_share_growing, **tables, rope=rope)
        else:
            see = partial(attend_share, segments=step.segments, config=config)
        y = see(q, seen, step.share, window=window)
    elif step.slots is None or step.starts is None:
        y = see(q, k, v)
        keep = partial(grow, capacity=capacity)
        if window is not None and window <= capacity and step.flat is None:
            keep = partial(keep_last, window=window, counts=step.counts)
        slots = keep(new[0]), keep(new[1])
    elif window == step.slots[0].shape[1]:
        y, slots = extend(see, q, new, step.slots, step.starts, step.counts)
    else:
        y, slots = _append(see, q, new, step.slots, step.starts)
    y = y.reshape(batch, count, -1)
    return linear(weights["self_attn"]["o_proj"], y, axes=axes), slots


def _append(
    see: Callable[..., jax.Array],
    q: jax.Array,
    new: Slots,
    slots: Slots,
    starts: jax.Array,
) -> tuple[jax.Array, Slots]:
    """Put new keys and values into the slots from each row's start on, and attend."""
    keys, values = (write(x, y, starts) for x, y in zip(slots, new, strict=True))
    return see(q, keys, values, starts), (keys, values)


def _is_kernels(
    q: jax.Array, k: jax.Array, step: Step, config: LlamaConfig, rope: Rope
) -> bool:
    """Whether a GPU's kernel computes the step: plain attention, whole heads turned."""
    decodes = step.slots is not None and step.starts is not None and step.share is None
    bare = decodes and step.segments is None and config.score_cap is None
    whole = rope.layout == "half" and 2 * step.cos.shape[-1] == config.head_dim
    arrays = step.slots is not None and isinstance(step.slots[0], jax.Array)
    return bare and whole and arrays and kernel_takes(q, k.shape[2])


def _at_once(
    fused: Callable[..., tuple[jax.Array, Slots]],
    turn: Callable[..., jax.Array],
    see: Callable[..., jax.Array],
    new: tuple[jax.Array, jax.Array, jax.Array],
    step: Step,
    cos: jax.Array,
    sin: jax.Array,
) -> tuple[jax.Array, Slots]:
    """Rotate, remember and attend by the kernel on CUDA, one by one elsewhere."""

    def one_by_one(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        slots: Slots,
        starts: jax.Array,
        *table: jax.Array,
    ) -> tuple[jax.Array, Slots]:
        q, k = (turn(x, *table) for x in (q, k))
        return _append(see, q, (k, v), slots, starts)

    at_once = on_cuda(fused, one_by_one)
    return at_once(*new, step.slots, step.starts, cos, sin)


def queries_keys_values(
    weights: LayerParams, x: jax.Array, config: LlamaConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What attention turns and compares, as yet not rotated: [B, T, N or K, H]."""
    heads = (*x.shape[:2], -1, config.head_dim)
    width, kv_width = (
        n * config.head_dim
        for n in (config.num_attention_heads, config.num_key_value_heads)
    )
    block, sizes = weights["self_attn"], (width, kv_width, kv_width)
    norm = norm_before(weights, config, "input_layernorm")
    q, k, v = linears(block, "self_attn", x, norm, sizes)
    if config.qk_norm == "whole":
        q, k = _qk_norm(block, q, k, config)
    q, k, v = (y.reshape(heads) for y in (q, k, v))
    if config.qk_norm == "head":
        q, k = _qk_norm(block, q, k, config)
    return q, k, v


def _qk_norm(
    block: Params, q: jax.Array, k: jax.Array, config: LlamaConfig
) -> tuple[jax.Array, jax.Array]:
    q = rms_norm(q, *norm_of(block["q_norm"], config))
    return q, rms_norm(k, *norm_of(block["k_norm"], config))


def mlp(
    weights: LayerParams, x: jax.Array, *, config: LlamaConfig, axes: Axes = ONE
) -> jax.Array:
    """down(act(gate(h)) * up(h)), h = norm(x)."""
    inner = gated(weights, x, config)
    return linear(weights["mlp"]["down_proj"], inner, axes=axes)


def gated(weights: LayerParams, x: jax.Array, config: LlamaConfig) -> jax.Array:
    """What `down_proj` is given, act(gate(h)) * up(h): [B, T, F]."""
    pre = config.norm_at == "pre"
    name = "post_attention_layernorm" if pre else "pre_feedforward_layernorm"
    norm = norm_before(weights, config, name)
    sizes = (config.intermediate_size, config.intermediate_size)
    gate, up = linears(weights["mlp"], "mlp", x, norm, sizes)
    return ACTIVATIONS[config.hidden_act](gate) * up


@partial(
    jax.jit,
    static_argnames=(
        "config",
        "capacity",
        "window",
        "rotary",
        "local",
        "cache_dtype",
        "attention",
        "mlp",
        "axes",
    ),
)
def decoder_layer(
    weights: LayerParams,
    x: jax.Array,
    step: Step,
    *,
    config: LlamaConfig,
    capacity: int,
    window: int | None = None,
    rotary: bool = True,
    local: bool = False,
    cache_dtype: CacheDtype | None = None,
    attention: Callable[..., tuple[jax.Array, Slots]] = attention,
    mlp: Callable[..., jax.Array] = mlp,
    axes: Axes = ONE,
) -> tuple[jax.Array, Slots]:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)), norms as configured.

    Args:
      weights: the layer's subtree.
      x: [B, T, D].
      step: rotary tables, cache and segments.
      config: the model's.
      capacity: S.
      window: a query sees this many keys up to its own; None: all of them.  Where S is
        not less, the layer has so many slots, see `rolling`.
      rotary: whether queries and keys are rotated.
      local: whether by `config.local_rope`.
      cache_dtype: of the slots that are made where none are given.
      attention, mlp: what computes the two halves, called as those of this module.
      axes: of the mesh, where this is a device's share of the layer.

    Returns:
      x [B, T, D], and keys and values [B, S, K, H] with the new tokens in them.
    """
    weights = gathered(weights, axes)
    with jax.named_scope("attention"):
        how = {"capacity": capacity, "window": window, "rotary": rotary}
        how |= {"local": True} if local else {}
        how |= {} if cache_dtype is None else {"cache_dtype": cache_dtype}
        y, slots = attention(weights, x, step, config=config, axes=axes, **how)
        y = _after(weights, y, config, "post_attention_layernorm")
        x = x + times(y, config.residual_multiplier)
    with jax.named_scope("mlp"):
        y = mlp(weights, x, config=config, axes=axes)
        y = _after(weights, y, config, "post_feedforward_layernorm")
        x = x + times(y, config.residual_multiplier)
    if x.shape[1] > 1:
        # Without it XLA (GPU, jax 0.11) puts the cache writes of all layers off to the
        # end of a prompt, and keeps their inputs until then.
        x, slots = jax.lax.optimization_barrier((x, slots))
    return x, slots


def layer_kind(config: LlamaConfig, layer: int, capacity: int) -> dict[str, Any]:
    """What `decoder_layer` is told of a layer where it is not LLaMA's.

    A window that S slots do not exceed is none: programs and caches are then shared.
    """
    window = None if config.windows is None else config.windows[layer]
    kind: dict[str, Any]
    kind = {} if window is None or window > capacity else {"window": window}
    if config.rotary is not None and not config.rotary[layer]:
        kind["rotary"] = False
    if config.local_rope is not None and config.windows and config.windows[layer]:
        kind["local"] = True
    return kind


def local_table(
    config: LlamaConfig, positions: jax.Array
) -> tuple[jax.Array, jax.Array] | None:
    """cos and sin of `local_rope`, where there is one."""
    local = config.local_rope
    return None if local is None else table(local, positions)


def times(x: jax.Array, factor: float) -> jax.Array:
    """x times a number, multiplied in float32 and rounded to x's dtype."""
    if factor == 1:
        return x
    return (x.astype(jnp.float32) * np.float32(factor)).astype(x.dtype)


def gathered(weights: Params, axes: Axes) -> Params:
    """A subtree's share of parameters as its functions take them."""
    if axes == ONE:
        return weights
    return nest({n: axes.gathered(n, x) for n, x in flatten(weights).items()})


def norm_before(weights: LayerParams, config: LlamaConfig, name: str) -> Norm | None:
    """The norm of a block's input, where there is one."""
    return None if config.norm_at == "post" else norm_of(weights[name], config)


def norm_of(leaves: LinearParams, config: LlamaConfig) -> Norm:
    """A norm's weight, what it adds to the mean square, and its arithmetic."""
    return leaves["weight"], config.rms_norm_eps, config.norm


def _after(
    weights: LayerParams, y: jax.Array, config: LlamaConfig, name: str
) -> jax.Array:
    """What a block gives, normed where norms stand behind blocks."""
    pre = config.norm_at == "pre"
    return y if pre else rms_norm(y, *norm_of(weights[name], config))


def rms_norm(
    x: jax.Array, weight: jax.Array, eps: float, kind: NormKind = "llama"
) -> jax.Array:
    """weight * x / sqrt(mean(x^2) + eps), float32 inside; `kind` as in LlamaConfig."""
    normed = x.astype(jnp.float32) * _inverse_rms(x, eps)
    if kind == "llama":
        return normed.astype(x.dtype) * with_rank(weight, x.ndim)
    wide = with_rank(weight, x.ndim).astype(jnp.float32)
    return (normed * (1 + wide if kind == "gemma" else wide)).astype(x.dtype)


def linears(
    weights: Params,
    block: str,
    x: jax.Array,
    norm: Norm | None,
    sizes: Sequence[int],
) -> list[jax.Array]:
    """The block's projections of norm(x), in one product where `fuse` joined them.

    Without a norm they are those of x.

    For a single token in bfloat16 the factor 1 / rms comes after the sum, where it is
    free: a kernel less and a rounding less than the norm by itself.  (In float16 the
    input without the factor might overflow.)
    """
    joined, names = FUSED[block]
    parts = [weights[name] for name in ([joined] if joined in weights else names)]
    if any(leaf.ndim > 2 for leaf in parts[0].values()):
        hint = "`unfuse` them on that mesh before you take them off it"
        raise JropeError(f"{joined}: joined in shares, for a mesh; {hint}")
    factor = None
    if norm is None:
        pass
    elif (
        norm[2] == "llama"
        and x.dtype == jnp.bfloat16
        and all(is_row(part, x) for part in parts)
    ):
        x, factor = x * with_rank(norm[0], x.ndim), _inverse_rms(x, norm[1])
    else:
        x = rms_norm(x, *norm)
    ys = [linear(part, x, factor=factor) for part in parts]
    if joined not in weights:
        return ys
    ends = np.cumsum(sizes).tolist()
    return [ys[0][..., e - size : e] for e, size in zip(ends, sizes, strict=True)]


def _inverse_rms(x: jax.Array, eps: float) -> jax.Array:
    """1 / sqrt(mean(x^2) + eps) over the last axis: float32 [..., 1]."""
    square = jnp.square(x.astype(jnp.float32))
    mean = jnp.mean(square, axis=-1, keepdims=True)
    return jax.lax.rsqrt(mean + np.float32(eps))
