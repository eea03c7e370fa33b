"""Weights as 8-bit integers: half of bfloat16's bytes, to hold and to read.

A matrix W [out, in] becomes integers q and one scale for each row, which is an output:

    m[o] = max_i |W[o, i]|,  s[o] = m[o] / 127,  q[o, i] = round(W[o, i] (127 / m[o]))

in float32, halves to even; s q is W to within s / 2.  Activations stay what they are,
so that (W x)[o] is s[o] sum_i q[o, i] x[i]: a factor after the sum.

Source: absmax quantisation, a scale for each output of W, Dettmers et al. 2022
(arXiv:2208.07339, sections 2.1 and 3.1), here of the weights alone.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jrope.errors import JropeError
from jrope.model.config import EMBEDDING, HEAD, LlamaConfig, parameter_shapes
from jrope.numerics import round_to
from jrope.sharding.meshes import layout_of, stand
from jrope.tree import Params, Tree, flatten, nest

Quantization = Literal["int8"]
LIMIT = np.float32(127)


def quantize(params: Params) -> Tree:
    """Projections and head as int8; the given tree stays as it is.

    `forward`, `generate`, `stream`, `score` and `fuse` take either tree (`Llama` takes
    plain ones).  `load` with quantize="int8" does the same to each tensor as it
    arrives, and never holds both.  A row with a NaN or an infinity gives NaN outputs.

    Args:
      params: a parameter tree, plain or of `fuse` in its order out_in.

    Returns:
      The tree with every matrix but an embedding beside a head of its own as `weight`
      int8 [out, in] and `scale` float32 [out].  A tied embedding is the head, with a
      scale for each entry of the vocabulary.  Norms and biases stay.

    Raises:
      JropeError: the tree is quantised already, or its matrices are kernels [in, out].
    """
    flat = flatten(params)
    if is_quantized(params):
        raise JropeError("quantize: the parameters are quantised already")
    if any(name.endswith(".kernel") for name in flat):
        raise JropeError(
            "quantize: got kernels [in, out], which have no row for each output; "
            "quantise before `fuse`, or fuse in its order out_in"
        )
    chosen = matrices({name: np.shape(array) for name, array in flat.items()})
    found: dict[str, Any] = {}
    for name, array in flat.items():
        found |= quantize_tensor(name, array) if name in chosen else {name: array}
    return stand(nest(found), layout_of(params))


def dequantize(params: Params, dtype: Any = None) -> Tree:
    """The plain tree that a quantised one stands for, scale times integers.

    It is not what was quantised: half a scale of each element is lost.

    Args:
      params: a tree of `quantize`.
      dtype: of every array; None: that of the norms.

    Raises:
      JropeError: the tree is not quantised, or `dtype` is none of a float.
    """
    if not is_quantized(params):
        raise JropeError("dequantize: the parameters are not quantised")
    dtype = params["model"]["norm"]["weight"].dtype if dtype is None else dtype
    flat, wide = flatten(params), _float(dtype)
    plain = {
        name: _widen(array, flat.get(scale_name(name)), wide)
        for name, array in flat.items()
        if not name.endswith(".scale")
    }
    return stand(nest(plain), layout_of(params))


def is_quantized(params: Params) -> bool:
    """Whether the tree, or a part of one, holds scales."""
    return any(name.split(".")[-1] == "scale" for name in flatten(params))


def matrices(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The names that are quantised: all matrices but an embedding that is no head."""
    names = {n for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2}
    return names - {EMBEDDING} if HEAD in names else names


def scale_name(name: str) -> str:
    """Of the scale that stands beside a weight; nothing stands under other names."""
    return name.removesuffix(".weight") + ".scale"


def quantize_tensor(name: str, array: Any) -> dict[str, jax.Array]:
    """One matrix [out, in] as its integers and its scales [out], by name."""
    weight, scale = _quantize(jnp.asarray(array))
    return {name: weight, scale_name(name): scale}


def keeper(
    config: LlamaConfig, quantize: Quantization | None
) -> Callable[[str, jax.Array], dict[str, jax.Array]]:
    """What `load` keeps of each tensor that arrives: a function of name and array.

    Raises:
      JropeError: `quantize` is neither None nor "int8".
    """
    if quantize not in (None, "int8"):
        raise JropeError(f"quantize is {quantize!r}, want None or 'int8'")
    chosen = set[str]() if quantize is None else matrices(parameter_shapes(config))

    def keep(name: str, array: jax.Array) -> dict[str, jax.Array]:
        if name not in chosen:
            return {name: array}
        return jax.block_until_ready(quantize_tensor(name, array))

    return keep


def weight_bytes(
    config: LlamaConfig, itemsize: int, quantize: Quantization | None = None
) -> dict[str, int]:
    """Bytes of every weight, with the scales of those that are quantised."""
    shapes = parameter_shapes(config)
    chosen = set[str]() if quantize is None else matrices(shapes)
    return {
        name: math.prod(shape) + 4 * shape[0]
        if name in chosen
        else math.prod(shape) * itemsize
        for name, shape in shapes.items()
    }


@jax.jit
def _quantize(w: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Bits of positive floats are in their order, NaN last: XLA's float maximum may be
    # a finite one beside a NaN on a CPU.
    bits = jax.lax.bitcast_convert_type(jnp.abs(w), f"int{8 * w.dtype.itemsize}")
    most = jax.lax.bitcast_convert_type(jnp.max(bits, axis=1), w.dtype)
    w, most = jax.lax.optimization_barrier((w, most))  # else all of w is widened first
    most = jnp.where(jnp.isfinite(most), most, jnp.nan).astype(jnp.float32)
    nothing = most < 127 * jnp.finfo(jnp.float32).tiny  # not so a row that has NaN
    # XLA multiplies by a constant's inverse, and GPUs divide approximately; a float64
    # quotient is off far behind the bits that stay.
    with jax.enable_x64(True):
        wide, limit = most.astype(jnp.float64), np.float64(LIMIT)
        both = round_to(jnp.stack((limit / wide, wide / limit)), np.float32)
        steps, scale = both.astype(jnp.float32)
    steps = jnp.where(nothing, 0, steps)[:, None]
    whole = jnp.clip(jnp.round(w.astype(jnp.float32) * steps), -LIMIT, LIMIT)
    return whole.astype(jnp.int8), jnp.where(nothing, 0, scale)


@partial(jax.jit, static_argnames=("dtype",))
def _widen(array: jax.Array, scale: jax.Array | None, dtype: Any) -> jax.Array:
    if scale is None:
        return array.astype(dtype)
    return (array.astype(jnp.float32) * scale[:, None]).astype(dtype)


def _float(dtype: Any) -> np.dtype[Any]:
    try:
        wide = jnp.dtype(dtype)
    except TypeError:
        wide = jnp.dtype(bool)
    if not jnp.issubdtype(wide, jnp.floating):
        raise JropeError(f"dtype is {dtype!r}, want a float's, such as 'bfloat16'")
    return wide
