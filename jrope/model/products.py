"""x W^T for every way that weights may lie, on every backend; sums are float32."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jrope.numerics import matmul_precision, with_rank

BLOCK = 1024  # rows of int8 weights that a CPU widens at a time
PAIRED = 2**25  # int8 weights from which a GPU reads two rows at a time


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
    if is_row(weights, x):
        y = _row_product(x, weights["weight"])
    elif "kernel" in weights:
        y = _product(x, weights["kernel"], 0, exact)
    else:
        y = _product(x, weights["weight"], 1, exact)
    if scale is not None:
        y = y * with_rank(scale, y.ndim)
    if factor is not None:
        y = y * factor
    if bias is not None:
        y = y + with_rank(bias, y.ndim).astype(jnp.float32)
    return y.astype(dtype)


def is_row(weights: Mapping[str, jax.Array], x: jax.Array) -> bool:
    """Whether x is a single token to meet 8- or 16-bit weights [out, in]."""
    single = x.size == x.shape[-1] and "weight" in weights
    return single and jnp.dtype(weights["weight"].dtype).itemsize <= 2


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
    # XLA gives a row to a block of threads, whose loads of bytes are too few in flight;
    # sums of one shape share a kernel, and a block takes a row of each half.
    many = w.dtype == jnp.int8 and w.size >= PAIRED and w.shape[0] % 2 == 0
    halves = 2 if many and jax.default_backend() == "gpu" else 1
    sums = [
        jnp.sum(part.astype(jnp.float32) * row, axis=1) for part in jnp.split(w, halves)
    ]
    return jnp.concatenate(sums).reshape(*x.shape[:-1], -1)
