"""What every package needs of arrays: roundings that compilers keep, precision, rank.

A cast to a narrower type and back is no rounding to XLA, which may drop the pair; what
has to be rounded to a narrower type and held in a wider one goes through here.
"""

import functools
import operator
from functools import partial
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

Tree = TypeVar("Tree")
Float: TypeAlias = type[np.float32] | type[np.float64]


def round_to(x: Any, dtype: Float) -> Any:
    """float64 numbers rounded to `dtype`, still held in float64.

    Not by casts: for a GPU, XLA (seen in jax 0.11) drops one there and back, and LLVM
    makes a quotient that is cast a float32 division, which is approximate.  For a TPU,
    whose compiler emulates float64 by pairs of float32 and cannot reduce its precision
    (libtpu 0.0.42), by casts that a barrier keeps apart.
    """
    if isinstance(x, np.ndarray | np.generic):
        return x.astype(dtype).astype(np.float64)
    if dtype is np.float64:
        return x
    reduced = partial(jax.lax.reduce_precision, exponent_bits=8, mantissa_bits=23)
    return jax.lax.platform_dependent(x, tpu=_cast_there_and_back, default=reduced)


def _cast_there_and_back(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(x.astype(np.float32)).astype(np.float64)


def rounded(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """x rounded to `dtype` but held in float32: XLA may not skip it, unlike a cast."""
    if jnp.dtype(dtype) == jnp.float32:
        return x
    kind = jnp.finfo(dtype)
    short = jax.lax.reduce_precision(x, kind.nexp, kind.nmant)
    if kind.nexp == 8:  # bfloat16 has float32's range
        return short
    step = float(kind.smallest_subnormal)  # reduce_precision flushes these to zero
    return jnp.where(jnp.abs(x) < float(kind.tiny), jnp.round(x / step) * step, short)


def absmax(x: jax.Array) -> jax.Array:
    """The largest magnitude along the last axis; NaN where one is not finite."""
    # Bits of positive floats are in their order, NaN last: XLA's float maximum may be
    # a finite one beside a NaN on a CPU.
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), f"int{8 * x.dtype.itemsize}")
    most = jax.lax.bitcast_convert_type(jnp.max(bits, axis=-1), x.dtype)
    return jnp.where(jnp.isfinite(most), most, jnp.nan)


def with_rank(x: Any, ndim: int) -> Any:
    """x [...] with axes of size 1 in front, to broadcast against `ndim` dimensions."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def matmul_precision(dtype: DTypeLike) -> jax.lax.Precision:
    """float32 means float32 on every device: no TF32, no bfloat16 passes."""
    wide = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT


def cpu_barrier(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays behind an optimisation barrier, where the program is for a CPU.

    XLA's CPU backend computes what depends on weights or cache alone once, ahead of a
    loop: it would hold a float32 copy of 16-bit weights, or a transposed cache (jax
    0.10 and 0.11).  The platform is the one that the program is lowered for, which need
    not be this machine's.
    """
    return jax.lax.platform_dependent(
        *arrays, cpu=lambda *xs: jax.lax.optimization_barrier(xs), default=_as_given
    )


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The arrays, each varying over the axes that any of them varies over.

    Where `jax.shard_map` checks it, the carry of a loop and the branches of a condition
    have to agree in that.  For what is small: XLA may copy what it chooses.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return arrays
    firsts = (x.reshape(-1)[0] > 0 for x in arrays)
    either = functools.reduce(operator.or_, firsts)
    return tuple(jax.lax.select(either, x, x) for x in arrays)


def computed_once(tables: Tree) -> Tree:
    """The same finite float32 arrays [..., R], which their readers do not compute anew.

    XLA's CPU backend fuses what tables are made of, cosines too, into every layer that
    reads them, and computes these for each head (jax 0.10).  It does not fuse products.
    """
    once = partial(jax.tree.map, _times_one)
    return jax.lax.platform_dependent(tables, cpu=once, default=lambda x: x)


def _times_one(x: jax.Array) -> jax.Array:
    one = np.eye(x.shape[-1], dtype=np.float32)
    return jnp.matmul(x, one, precision=jax.lax.Precision.HIGHEST)


def _as_given(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return arrays
