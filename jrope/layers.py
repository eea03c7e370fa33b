"""One decoder layer, as functions of its subtree of the parameters.

Sources: RMSNorm, Zhang and Sennrich 2019 (arXiv:1910.07467); SwiGLU, Shazeer 2020
(arXiv:2002.05202); grouped queries, Ainslie et al. 2023 (arXiv:2305.13245).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.activations import ACTIVATIONS
from jrope.attention import attend, matmul_precision
from jrope.cache import grow, write
from jrope.config import LlamaConfig
from jrope.growing import attend_growing
from jrope.rope import rotate

BLOCK = 1024  # rows of int8 weights that a CPU widens at a time
PAIRED = 2**25  # int8 weights from which a GPU reads two rows at a time
# block: (name when joined by `fuse`, the projections in it)
FUSED: dict[str, tuple[str, tuple[str, ...]]] = {
    "self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")),
    "mlp": ("gate_up_proj", ("gate_proj", "up_proj")),
}


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
      cos, sin: float32 [B, T, R]; for growing lengths of the slots, see `growing`.
      slots: keys and values [B, S, K, H] to write into; None: there are none yet.
      starts: int32 [B], filled slots of each row, given with `slots`.
      config: the model's.
      capacity: S.

    Returns:
      x [B, T, D], and keys and values with the new tokens in them.
    """
    with jax.named_scope("attention"):
        y, filled = attention(weights, x, cos, sin, slots, starts, config, capacity)
        x = x + y
    with jax.named_scope("mlp"):
        x = x + mlp(weights, x, config)
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
    turn = partial(
        rotate,
        cos=cos,
        sin=sin,
        layout=config.rope.layout,
        precision=config.rope.precision,
    )
    if config.rope.lengths == "growing":  # keys are cached as they are
        see = partial(attend_growing, cos=cos, sin=sin, rope=config.rope)
    else:
        q, k, see = turn(q), turn(k), attend
    if slots is None or starts is None:
        y = see(q, k, v)
        slots = grow(k, capacity), grow(v, capacity)
    else:
        slots = (write(slots[0], k, starts), write(slots[1], v, starts))
        y = see(q, *slots, starts)
    y = y.reshape(batch, count, -1)
    return linear(weights["self_attn"]["o_proj"], y), slots


def mlp(weights: Mapping[str, Any], x: jax.Array, config: LlamaConfig) -> jax.Array:
    """down(act(gate(h)) * up(h)), h = norm(x)."""
    norm = weights["post_attention_layernorm"]["weight"], config.rms_norm_eps
    sizes = (config.intermediate_size, config.intermediate_size)
    gate, up = linears(weights["mlp"], "mlp", x, norm, sizes)
    inner = ACTIVATIONS[config.hidden_act](gate) * up
    return linear(weights["mlp"]["down_proj"], inner)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """weight * x / sqrt(mean(x^2) + eps), float32 inside, rounded before the weight."""
    normed = (x.astype(jnp.float32) * _inverse_rms(x, eps)).astype(x.dtype)
    return normed * _like(weight, x)


def linears(
    weights: Mapping[str, Any],
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
    if x.dtype == jnp.bfloat16 and all(_is_row(part, x) for part in parts):
        x, factor = x * _like(norm[0], x), _inverse_rms(x, norm[1])
    else:
        x, factor = rms_norm(x, *norm), None
    ys = [linear(part, x, factor=factor) for part in parts]
    if joined not in weights:
        return ys
    ends = np.cumsum(sizes).tolist()
    return [ys[0][..., e - size : e] for e, size in zip(ends, sizes, strict=True)]


def linear(
    weights: Mapping[str, jax.Array],
    x: jax.Array,
    *,
    factor: jax.Array | None = None,
    dtype: Any = None,
) -> jax.Array:
    """factor * x W^T + b for W [out, in], summed in float32, rounded once to `dtype`.

    A single token that meets 8- or 16-bit weights is a multiply and a reduction: on GPU
    and CPU it streams them faster than a matrix product of one row.  `fuse` may hold W
    as a `kernel` [in, out] instead, which suits larger batches; `quantize` holds it as
    integers, whose `scale` [out] comes after the sum.
    """
    bias, scale = weights.get("bias"), weights.get("scale")
    dtype = x.dtype if dtype is None else dtype
    plain = bias is None and factor is None and scale is None
    exact = dtype if plain else jnp.float32
    if _is_row(weights, x):
        y = _row_product(x, weights["weight"])
    elif "kernel" in weights:
        y = _product(x, weights["kernel"], 0, exact)
    else:
        y = _product(x, weights["weight"], 1, exact)
    if scale is not None:
        y = y * _like(scale, y)
    if factor is not None:
        y = y * factor
    if bias is not None:
        y = y + _like(bias, y).astype(jnp.float32)
    return y.astype(dtype)


def _is_row(weights: Mapping[str, jax.Array], x: jax.Array) -> bool:
    """Whether x is a single token to meet 8- or 16-bit weights [out, in]."""
    single = x.size == x.shape[-1] and "weight" in weights
    return single and jnp.dtype(weights["weight"].dtype).itemsize <= 2


def _inverse_rms(x: jax.Array, eps: float) -> jax.Array:
    """1 / sqrt(mean(x^2) + eps) over the last axis: float32 [..., 1]."""
    square = jnp.square(x.astype(jnp.float32))
    mean = jnp.mean(square, axis=-1, keepdims=True)
    return jax.lax.rsqrt(mean + np.float32(eps))


def _like(weight: jax.Array, x: jax.Array) -> jax.Array:
    """[D] to the rank of x [..., D]."""
    return weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def _product(x: jax.Array, w: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """x [..., in] times w, whose `axis` is `in`; float32 sums on every backend."""
    # A GPU rounds its float32 sums to a 16-bit result for free; XLA's CPU backend is
    # three times faster when asked for float32 and rounded after.
    asked = jnp.float32 if jax.default_backend() == "cpu" else dtype
    if jax.default_backend() == "cpu" and axis == 1 and w.dtype.itemsize <= 2:
        # XLA's CPU backend would transpose all weights once, ahead of a decode loop.
        w, x = jax.lax.optimization_barrier((w, x))
    if w.dtype == jnp.int8:
        if jax.default_backend() == "cpu":
            return _product_in_blocks(x, w)
        w = w.astype(x.dtype)  # exact; a GPU does it on the way to its tensor cores
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    precision = matmul_precision(x.dtype)
    return jax.lax.dot_general(
        x, w, contract, precision=precision, preferred_element_type=asked
    )


def _product_in_blocks(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., in] times int8 w [out, in]: float32 [..., out].

    XLA's CPU backend widens integers before a product, and outside a loop it widens
    those of all layers before the first: here it holds one block of them.
    """
    out = w.shape[0]
    size = min(BLOCK, -(-out // 2))  # a loop of one step would be no loop

    def block(i: jax.Array, y: jax.Array) -> jax.Array:
        start = jnp.minimum(i * size, out - size)  # the last may overlap another
        part = jax.lax.dynamic_slice_in_dim(w, start, size).astype(x.dtype)
        return jax.lax.dynamic_update_slice_in_dim(
            y, _product(x, part, 1, jnp.float32), start, axis=-1
        )

    # All is overwritten.  Of x, since XLA would make constants of all layers at once.
    y = jnp.broadcast_to(x.reshape(-1)[0].astype(jnp.float32), (*x.shape[:-1], out))
    return jax.lax.fori_loop(0, -(-out // size), block, y)


def _row_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., in] of one row times w [out, in]: float32 [..., out]."""
    if jax.default_backend() == "cpu":
        # XLA's CPU backend would widen all weights once, ahead of a decode loop.
        w, x = jax.lax.optimization_barrier((w, x))
    row = x.reshape(1, -1).astype(jnp.float32)
    many = w.dtype == jnp.int8 and w.size >= PAIRED and w.shape[0] % 2 == 0
    # XLA gives a row to a block of threads, whose loads of bytes are too few in flight;
    # sums of one shape share a kernel, and a block takes a row of each half.
    halves = 2 if many and jax.default_backend() == "gpu" else 1
    sums = [
        jnp.sum(part.astype(jnp.float32) * row, axis=1) for part in jnp.split(w, halves)
    ]
    return jnp.concatenate(sums).reshape(*x.shape[:-1], -1)
