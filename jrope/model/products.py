"""x W^T for every way that weights may lie, on every backend; sums are float32."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from jrope.model import packed, packed_kernel
from jrope.model.decode_parts import on_cuda
from jrope.numerics import cpu_barrier, matmul_precision, with_rank
from jrope.sharding.axes import ONE, Axes
from jrope.tree import LinearParams

BLOCK = 1024  # rows of quantised weights that are widened at a time
PAIRED = 2**25  # int8 weights from which a GPU reads two rows at a time


def linear(
    weights: LinearParams,
    x: jax.Array,
    *,
    factor: jax.Array | None = None,
    dtype: DTypeLike | None = None,
    axes: Axes = ONE,
) -> jax.Array:
    """factor * x W^T + b for W [out, in], summed in float32, rounded once to `dtype`.

    A single token that meets weights of at most 16 bits is a multiply and a reduction:
    on GPU and CPU it streams them faster than a matrix product of one row.  `fuse` may
    hold W as a `kernel` [in, out] instead, which suits larger batches; `quantize` holds
    it as integers, whose `scale` [out] comes after the sum, or [out, groups] within it,
    with what a `zero` [out, groups] makes of the inputs' sums taken off.
    With `axes` the sum goes on over the shares of `in` that other devices hold.
    """
    bias, scale = weights.get("bias"), weights.get("scale")
    dtype = x.dtype if dtype is None else dtype
    plain = bias is None and factor is None and scale is None and not axes.tensor
    exact = dtype if plain else jnp.float32
    if scale is not None and scale.ndim > 1:
        y = _packed_product(x, weights["weight"], scale)
        if "zero" in weights:
            y = y - _zero_product(x, scale, weights["zero"])
        scale = None
    elif is_row(weights, x):
        y = _row_product(x, weights["weight"])
    elif "kernel" in weights:
        y = _product(x, weights["kernel"], 0, exact)
    else:
        y = _product(x, weights["weight"], 1, exact)
    if scale is not None:
        y = y * with_rank(scale, y.ndim)
    if axes.tensor:
        y = axes.product(y, dtype)
    if factor is not None:
        y = y * factor
    if bias is not None:
        y = y + with_rank(bias, y.ndim).astype(jnp.float32)
    return y.astype(dtype)


def is_row(weights: LinearParams, x: jax.Array) -> bool:
    """Whether x is a single token to meet weights [out, in] of at most 16 bits."""
    single = x.size == x.shape[-1] and "weight" in weights
    return single and (
        "scale" in weights or jnp.dtype(weights["weight"].dtype).itemsize <= 2
    )


def _product(x: jax.Array, w: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """x [..., in] times w, whose `axis` is `in`: [..., out], summed in float32."""
    if w.dtype == dtype == jnp.float32:
        return _dot(x, w, axis, dtype)
    how = {"axis": axis, "dtype": dtype}
    return jax.lax.platform_dependent(
        x, w, cpu=partial(_product_on_cpu, **how), default=partial(_dot, **how)
    )


def _dot(x: jax.Array, w: jax.Array, axis: int, dtype: Any) -> jax.Array:
    if w.dtype == jnp.int8:
        w = w.astype(x.dtype)  # exact; a GPU does it on the way to its tensor cores
    contract = (((x.ndim - 1,), (axis,)), ((), ()))
    precision = matmul_precision(x.dtype)
    return jax.lax.dot_general(
        x, w, contract, precision=precision, preferred_element_type=dtype
    )


def _product_on_cpu(x: jax.Array, w: jax.Array, axis: int, dtype: Any) -> jax.Array:
    """As XLA's CPU backend does it best (jax 0.10 and 0.11).

    It is three times faster when asked for float32 sums that are rounded after, and
    without a barrier it transposes all 16-bit weights once, ahead of a decode loop.
    """
    if axis == 1 and w.dtype.itemsize <= 2:
        w, x = jax.lax.optimization_barrier((w, x))
    y = _int8_in_blocks(x, w) if w.dtype == jnp.int8 else _dot(x, w, axis, jnp.float32)
    return y.astype(dtype)


def _int8_in_blocks(x: jax.Array, w: jax.Array) -> jax.Array:
    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return _product_on_cpu(x, w.astype(x.dtype), 1, jnp.float32)

    return _in_blocks(product, x, w)


def _in_blocks(
    product: Callable[..., jax.Array], x: jax.Array, *arrays: jax.Array
) -> jax.Array:
    """A product of x [..., in] and arrays [out, ...], block by block of these.

    XLA's CPU backend widens integers before a product, and outside a loop it widens
    those of all layers before the first: here it holds one block of them.  So does a
    TPU of 4-bit weights, in its nearer memory.
    """
    out = arrays[0].shape[0]
    size = min(BLOCK, -(-out // 2))  # a loop of one step would be no loop

    def block(i: jax.Array, y: jax.Array) -> jax.Array:
        start = jnp.minimum(i * size, out - size)  # the last may overlap another
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        part = product(x, *map(cut, arrays))
        return jax.lax.dynamic_update_slice_in_dim(y, part, start, axis=-1)

    # All is overwritten.  Of x, since XLA would make constants of all layers at once.
    y = jnp.broadcast_to(x.reshape(-1)[0].astype(jnp.float32), (*x.shape[:-1], out))
    return jax.lax.fori_loop(0, -(-out // size), block, y)


def _packed_product(x: jax.Array, words: jax.Array, scale: jax.Array) -> jax.Array:
    """x [..., in] times 4-bit weights, see `packed`: float32 [..., out]."""
    if packed_kernel.kernel_takes(x, words, scale):
        return on_cuda(packed_kernel.times_packed, _packed_plain)(x, words, scale)
    return _packed_plain(x, words, scale)


def _packed_plain(x: jax.Array, words: jax.Array, scale: jax.Array) -> jax.Array:
    row = x.size == x.shape[-1]
    x = x.astype(jnp.float32) if row else x
    return jax.lax.platform_dependent(
        x,
        words,
        scale,
        cpu=partial(_packed_in_blocks, _packed_on_cpu),
        cuda=_packed_row if row else _packed_dot,
        tpu=partial(_packed_in_blocks, _packed_on_tpu),
        default=_packed_dot,
    )


def _zero_product(x: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
    """What the zeros [out, groups] of 4-bit weights take off their product with x.

    A group's scale times zero times the sum of its inputs: float32 [..., out].
    """
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], zero.shape[1], -1)
    steps = scale.astype(jnp.float32) * zero.astype(jnp.float32)
    return _dot(jnp.sum(groups, axis=-1), steps, 1, jnp.float32)


def _packed_in_blocks(
    product: Callable[..., jax.Array], x: jax.Array, words: jax.Array, scale: jax.Array
) -> jax.Array:
    # Else what a step makes of all words is made, and held, ahead of a decode loop.
    return _in_blocks(product, *jax.lax.optimization_barrier((x, words, scale)))


def _packed_on_cpu(x: jax.Array, words: jax.Array, scale: jax.Array) -> jax.Array:
    return _product_on_cpu(x, packed.widen(words, scale, x.dtype), 1, jnp.float32)


def _packed_on_tpu(x: jax.Array, words: jax.Array, scale: jax.Array) -> jax.Array:
    # Else XLA wants all words in another order, and copies them ahead of a decode loop.
    words = with_layout_constraint(words, Layout(major_to_minor=(0, 1)))
    return _packed_dot(x, words, scale)


def _packed_dot(x: jax.Array, words: jax.Array, scale: jax.Array) -> jax.Array:
    return _dot(x, packed.widen(words, scale, x.dtype), 1, jnp.float32)


def _packed_row(x: jax.Array, words: jax.Array, scale: jax.Array) -> jax.Array:
    return packed.row_sums(words, scale, x.reshape(-1)).reshape(*x.shape[:-1], -1)


def _row_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., in] of one row times w [out, in]: float32 [..., out]."""
    w, x = cpu_barrier(w, x)  # else a CPU holds all weights in float32 as well
    row = x.reshape(1, -1).astype(jnp.float32)
    if w.dtype == jnp.int8 and w.size >= PAIRED and w.shape[0] % 2 == 0:
        sums = jax.lax.platform_dependent(
            w, row, cuda=partial(_row_sums, parts=2), default=_row_sums
        )
    else:
        sums = _row_sums(w, row)
    return sums.reshape(*x.shape[:-1], -1)


def _row_sums(w: jax.Array, row: jax.Array, parts: int = 1) -> jax.Array:
    """w [out, in] times row [1, in] as sums along the rows: float32 [out].

    XLA gives a row to a block of threads, whose loads of bytes are too few in flight on
    a GPU; sums of one shape share a kernel, and a block takes a row of each part.
    """
    halves = [part.astype(jnp.float32) for part in jnp.split(w, parts)]
    return jnp.concatenate([jnp.sum(half * row, axis=1) for half in halves])
