"""Weights as integers of 8 or 4 bits: a half or a quarter of bfloat16's bytes.

With "int8" a matrix W [out, in] becomes integers q and one scale for each row, which is
an output:

    m[o] = max_i |W[o, i]|,  s[o] = m[o] / 127,  q[o, i] = round(W[o, i] (127 / m[o]))

in float32, halves to even; s q is W to within s / 2.  Activations stay what they are,
so that (W x)[o] is s[o] sum_i q[o, i] x[i]: a factor after the sum.

With "int4" each group of 128 elements of a row (64 or 32 if need be) has a scale:

    m = max |W[o, group]|,  s = m / 7 in bfloat16,  q = round(W[o, i] (1 / s))

in float32, q from -7 to 7.  Since q goes by the scale as it is held, bfloat16 loses
next to nothing beside float32, for 4.125 bits an element instead of 4.25.  4-bit
weights of a folder keep scales of their own, of any float, and where they have zeros
`zero` int8 [out, groups], see `hf.held`: W is (q - zero) s.

Source: absmax quantisation, a scale for each output of W, Dettmers et al. 2022
(arXiv:2208.07339, sections 2.1 and 3.1), here of the weights alone; for each block of
a row, Dettmers and Zettlemoyer 2023 (arXiv:2212.09720, section 2.3).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jrope.errors import JropeError
from jrope.model import packed
from jrope.model.config import EMBEDDING, HEAD, LlamaConfig, parameter_shapes
from jrope.numerics import absmax, round_to, rounded
from jrope.sharding.meshes import layout_of, stand
from jrope.tree import Params, Tree, flatten, nest

Quantization = Literal["int8", "int4"]
KINDS: tuple[Quantization, ...] = get_args(Quantization)


def quantize(params: Params, kind: Quantization = "int8") -> Tree:
    """Projections and head as integers; the given tree stays as it is.

    `forward`, `generate`, `stream`, `score` and `fuse` take either tree (`Llama` takes
    plain ones).  `load` with `quantize` does the same to each tensor as it arrives, and
    never holds both.  A row (or group) with a NaN or an infinity gives NaN outputs.

    Args:
      params: a parameter tree, plain or of `fuse` in its order out_in.
      kind: "int8", a scale for each output, or "int4", one for each 128 of its inputs.

    Returns:
      The tree with every matrix but an embedding beside a head of its own as `weight`
      int8 [out, in] and `scale` float32 [out], or as `weight` uint32 [out, in / 8], see
      `model.packed`, and `scale` bfloat16 [out, in / 128].  A tied embedding is the
      head, with scales for each entry of the vocabulary.  Norms and biases stay.

    Raises:
      JropeError: the tree is quantised already, or its matrices are kernels [in, out];
        another kind; int4 of inputs in no whole groups.
    """
    _check_kind(kind, KINDS)
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
        found |= quantize_tensor(name, array, kind) if name in chosen else {name: array}
    return stand(nest(found), layout_of(params))


def dequantize(params: Params, dtype: Any = None) -> Tree:
    """The plain tree that a quantised one stands for, scale times integers.

    It is not what was quantised: half a scale of each element is lost.  4-bit weights
    that a folder held as such are (q - zero) scale, rounded once.

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
        name: _widen(array, flat.get(scale_name(name)), flat.get(_zero(name)), wide)
        for name, array in flat.items()
        if name.split(".")[-1] not in ("scale", "zero")
    }
    return stand(nest(plain), layout_of(params))


def is_quantized(params: Params) -> bool:
    """Whether the tree, or a part of one, holds integers."""
    return quantization_of(params) is not None


def quantization_of(params: Params) -> Quantization | None:
    """How the tree, or a part of one, is quantised; None: it is not."""
    flat = flatten(params)
    for name in flat:
        if name.split(".")[-1] == "scale":
            held = flat[name.removesuffix("scale") + "weight"]
            return "int8" if held.dtype == jnp.int8 else "int4"
    return None


def matrices(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The names that are quantised: all matrices but an embedding that is no head."""
    names = {n for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2}
    return names - {EMBEDDING} if HEAD in names else names


def scale_name(name: str) -> str:
    """Of the scale that stands beside a weight; nothing stands under other names."""
    return name.removesuffix(".weight") + ".scale"


def _zero(name: str) -> str:
    return name.removesuffix(".weight") + ".zero"


def quantize_tensor(
    name: str, array: Any, kind: Quantization = "int8"
) -> dict[str, jax.Array]:
    """One matrix [out, in] as its integers and its scales, by name."""
    array = jnp.asarray(array)
    if kind == "int8":
        weight, scale = _quantize(array)
    else:
        weight, scale = _quantize_groups(array, packed.group_of(name, array.shape[1]))
    return {name: weight, scale_name(name): scale}


def keeper(
    config: LlamaConfig, quantize: Quantization | None
) -> Callable[[str, jax.Array], dict[str, jax.Array]]:
    """What `load` keeps of each tensor that arrives: a function of name and array.

    Raises:
      JropeError: `quantize` is neither None nor a kind; int4 of inputs in no whole
        groups.
    """
    _check_kind(quantize, (None, *KINDS))
    shapes = parameter_shapes(config)
    chosen = set[str]() if quantize is None else matrices(shapes)
    for name in chosen if quantize == "int4" else ():
        packed.group_of(name, shapes[name][1])

    def keep(name: str, array: jax.Array) -> dict[str, jax.Array]:
        if quantize is None or name not in chosen:
            return {name: array}
        return jax.block_until_ready(quantize_tensor(name, array, quantize))

    return keep


def weight_bytes(
    config: LlamaConfig, itemsize: int, quantize: Quantization | None = None
) -> dict[str, int]:
    """Bytes of every weight, with the scales of those that are quantised."""
    shapes = parameter_shapes(config)
    chosen = set[str]() if quantize is None else matrices(shapes)
    return {
        name: sum(held_bytes(name, shape, quantize))
        if quantize is not None and name in chosen
        else math.prod(shape) * itemsize
        for name, shape in shapes.items()
    }


def held_bytes(
    name: str, shape: tuple[int, ...], kind: Quantization
) -> tuple[int, int]:
    """Bytes of a matrix's integers, and of its scales."""
    out, width = shape
    if kind == "int8":
        return out * width, 4 * out
    return out * width // 2, 2 * out * (width // packed.group_of(name, width))


def _check_kind(kind: Any, known: tuple[Any, ...]) -> None:
    if kind not in known:
        wanted = " or ".join(map(repr, known))
        raise JropeError(f"quantize is {kind!r}, want {wanted}")


@partial(jax.jit, static_argnames=("group",))
def _quantize_groups(w: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    levels, scale = _quantize(w.reshape(len(w), -1, group), 7, jnp.bfloat16)
    return packed.pack(levels), scale


@partial(jax.jit, static_argnames=("limit", "held"))
def _quantize(
    w: jax.Array, limit: int = 127, held: Any = jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """Integers of w's last axis, and a scale for each of the others, as it is held."""
    # Without the barrier all of w is widened first.
    w, most = jax.lax.optimization_barrier((w, absmax(w)))
    most = most.astype(jnp.float32)
    nothing = most < limit * jnp.finfo(jnp.float32).tiny  # not so a row that has NaN
    # XLA multiplies by a constant's inverse, and GPUs divide approximately; a float64
    # quotient is off far behind the bits that stay.
    with jax.enable_x64(True):
        wide, top = most.astype(jnp.float64), np.float64(limit)
        scale = round_to(wide / top, np.float32).astype(jnp.float32)
        short = rounded(scale, held)
        steps = top / wide if held == jnp.float32 else 1 / short.astype(jnp.float64)
        steps = round_to(steps, np.float32).astype(jnp.float32)
    steps = jnp.where(nothing, 0, steps)[..., None]
    whole = jnp.clip(jnp.round(w.astype(jnp.float32) * steps), -limit, limit)
    return whole.astype(jnp.int8), jnp.where(nothing, 0, short).astype(held)


@partial(jax.jit, static_argnames=("dtype",))
def _widen(
    array: jax.Array, scale: jax.Array | None, zero: jax.Array | None, dtype: Any
) -> jax.Array:
    if scale is None:
        return array.astype(dtype)
    return packed.widen(array, scale, dtype, zero)


def _float(dtype: Any) -> np.dtype[Any]:
    try:
        wide = jnp.dtype(dtype)
    except TypeError:
        wide = jnp.dtype(bool)
    if not jnp.issubdtype(wide, jnp.floating):
        raise JropeError(f"dtype is {dtype!r}, want a float's, such as 'bfloat16'")
    return wide
