"""One decoder layer, as functions of its subtree of the parameters.

Sources: RMSNorm, Zhang and Sennrich 2019 (arXiv:1910.07467); SwiGLU, Shazeer 2020
(arXiv:2002.05202); grouped queries, Ainslie et al. 2023 (arXiv:2305.13245).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jrope.errors import JropeError
from jrope.model.activations import ACTIVATIONS
from jrope.model.attention import attend
from jrope.model.cache import Slots, grow, write
from jrope.model.config import LlamaConfig
from jrope.model.context import Share, attend_share, attend_share_growing, remember
from jrope.model.growing import attend_growing
from jrope.model.products import is_row, linear
from jrope.numerics import with_rank
from jrope.rope import rotate
from jrope.sharding.axes import ONE, Axes
from jrope.tree import LayerParams, Params, flatten, nest

# block: (name when joined by `fuse`, the projections in it)
FUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Step:
    """What a layer is given besides its weights and hidden states.

    Args:
      cos, sin: float32 [B, T, R]; for growing lengths of the slots, see `growing`.
      slots: this layer's keys and values [B, S, K, H] to write into; None: none yet.
      starts: int32 [B], filled slots of each row, given with `slots`.
      segments: int32 [B, T], equal for tokens of one sequence; None: a row is one.
      share: where a mesh splits the sequence, what this device computes of it.
    """

    cos: jax.Array
    sin: jax.Array
    slots: Slots | None = None
    starts: jax.Array | None = None
    segments: jax.Array | None = None
    share: Share | None = None


def attention(
    weights: LayerParams,
    x: jax.Array,
    step: Step,
    *,
    config: LlamaConfig,
    capacity: int,
    window: int | None,
    rotary: bool,
    axes: Axes = ONE,
) -> tuple[jax.Array, Slots]:
    """Norm, project, rotate, remember, attend, project back; see `decoder_layer`."""
    batch, count, _ = x.shape
    heads = (batch, count, -1, config.head_dim)
    width, kv_width = (
        n * config.head_dim
        for n in (config.num_attention_heads, config.num_key_value_heads)
    )
    sizes = (width, kv_width, kv_width)
    norm = weights["input_layernorm"]["weight"], config.rms_norm_eps
    projected = linears(weights["self_attn"], "self_attn", x, norm, sizes)
    q, k, v = (y.reshape(heads) for y in projected)
    rope, tables = config.rope, {"cos": step.cos, "sin": step.sin}
    see = partial(attend, window=window, segments=step.segments)
    if rotary and rope.lengths == "growing":  # keys are cached as they are
        see = partial(attend_growing, **tables, rope=rope, window=window)
    elif rotary:
        turn = partial(rotate, **tables, layout=rope.layout, precision=rope.precision)
        q, k = turn(q), turn(k)
    if step.share is not None:
        slots = remember(step.slots, (k, v), step.share, capacity)
        seen = (k, v) if step.slots is None else slots
        if rotary and rope.lengths == "growing":
            see = partial(attend_share_growing, **tables, rope=rope)
        else:
            see = partial(attend_share, segments=step.segments, config=config)
        y = see(q, seen, step.share, window=window)
    elif step.slots is None or step.starts is None:
        y = see(q, k, v)
        slots = grow(k, capacity), grow(v, capacity)
    else:
        keys, values = step.slots
        slots = write(keys, k, step.starts), write(values, v, step.starts)
        y = see(q, *slots, step.starts)
    y = y.reshape(batch, count, -1)
    return linear(weights["self_attn"]["o_proj"], y, axes=axes), slots


def mlp(
    weights: LayerParams, x: jax.Array, *, config: LlamaConfig, axes: Axes = ONE
) -> jax.Array:
    """down(act(gate(h)) * up(h)), h = norm(x)."""
    norm = weights["post_attention_layernorm"]["weight"], config.rms_norm_eps
    sizes = (config.intermediate_size, config.intermediate_size)
    gate, up = linears(weights["mlp"], "mlp", x, norm, sizes)
    inner = ACTIVATIONS[config.hidden_act](gate) * up
    return linear(weights["mlp"]["down_proj"], inner, axes=axes)


@partial(
    jax.jit,
    static_argnames=(
        "config",
        "capacity",
        "window",
        "rotary",
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
    attention: Callable[..., tuple[jax.Array, Slots]] = attention,
    mlp: Callable[..., jax.Array] = mlp,
    axes: Axes = ONE,
) -> tuple[jax.Array, Slots]:
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
      weights: the layer's subtree.
      x: [B, T, D].
      step: rotary tables, cache and segments.
      config: the model's.
      capacity: S.
      window: a query sees this many keys up to its own; None: all of them.
      rotary: whether queries and keys are rotated.
      attention, mlp: what computes the two halves, called as those of this module.
      axes: of the mesh, where this is a device's share of the layer.

    Returns:
      x [B, T, D], and keys and values [B, S, K, H] with the new tokens in them.
    """
    weights = gathered(weights, axes)
    with jax.named_scope("attention"):
        how = {"capacity": capacity, "window": window, "rotary": rotary}
        y, slots = attention(weights, x, step, config=config, axes=axes, **how)
        x = x + y
    with jax.named_scope("mlp"):
        x = x + mlp(weights, x, config=config, axes=axes)
    if x.shape[1] > 1:
        # Without it XLA (GPU, jax 0.11) puts the cache writes of all layers off to the
        # end of a prompt, and keeps their inputs until then.
        x, slots = jax.lax.optimization_barrier((x, slots))
    return x, slots


def gathered(weights: Params, axes: Axes) -> Params:
    """A subtree's share of parameters as its functions take them."""
    if axes == ONE:
        return weights
    return nest({n: axes.gathered(n, x) for n, x in flatten(weights).items()})


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """weight * x / sqrt(mean(x^2) + eps), float32 inside, rounded before the weight."""
    normed = (x.astype(jnp.float32) * _inverse_rms(x, eps)).astype(x.dtype)
    return normed * with_rank(weight, x.ndim)


def linears(
    weights: Params,
    block: str,
    x: jax.Array,
    norm: tuple[jax.Array, float],
    sizes: Sequence[int],
) -> list[jax.Array]:
    """The block's projections of norm(x), in one product where `fuse` joined them.

    For a single token in bfloat16 the factor 1 / rms comes after the sum, where it is
    free: a kernel less and a rounding less than the norm by itself.  (In float16 the
    input without the factor might overflow.)
    """
    joined, names = FUSED[block]
    parts = [weights[name] for name in ([joined] if joined in weights else names)]
    if any(leaf.ndim > 2 for leaf in parts[0].values()):
        hint = "`unfuse` them on that mesh before you take them off it"
        raise JropeError(f"{joined}: joined in shares, for a mesh; {hint}")
    if x.dtype == jnp.bfloat16 and all(is_row(part, x) for part in parts):
        x, factor = x * with_rank(norm[0], x.ndim), _inverse_rms(x, norm[1])
    else:
        x, factor = rms_norm(x, *norm), None
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
