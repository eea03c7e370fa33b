"""How quantised checkpoints store a matrix: quantization_config, and the sums.

Every format is (q - zero) scale, with one zero and scale for a row, a block, or a group
of columns; they differ in names, in how integers lie in words, and in which tensors are
transposed.  4-bit integers lie in words of 32 bits, low bits first.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias, cast

import numpy as np

from jrope.errors import JropeError
from jrope.hf.tensors import DTYPES

Fields: TypeAlias = Mapping[str, Any]
Arrays: TypeAlias = Mapping[str, np.ndarray]
Parts: TypeAlias = Mapping[str, tuple[tuple[str, ...], list[tuple[int, ...]]]]
"""Last word of a tensor's name -> dtype codes and shapes, any of which will do."""

KEY = "quantization_config"
HINT = "dequantize the weights with the library that made them and save those"
_FLOATS = tuple(DTYPES)
_COLUMNS = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of an AWQ word that holds each column


@dataclass(frozen=True)
class Scheme:
    """How one matrix [out, in] is stored.

    Attributes:
      main: last word of the name of the tensor that holds the integers.
      scale: of that which holds the scales.
      parts: of (out, in), the tensors there must be.
      make: their arrays, and (out, in), to float32 [out, in].
      rounds: whether to the scale's dtype, before the cast to the one asked for.
      unread: last words of tensors that are for activations, or repeat a shape.
    """

    main: str
    scale: str
    parts: Callable[[int, int], Parts]
    make: Callable[[Arrays, tuple[int, int]], np.ndarray]
    rounds: bool = True
    unread: tuple[str, ...] = ()


def scheme_of(fields: Any) -> Scheme:
    """How a quantization_config stores matrices.

    Raises:
      JropeError: it is none that is read; says which fields.
    """
    method = _objects(KEY, [fields])[0].get("quant_method")
    if not isinstance(method, str) or method not in _SCHEMES:
        names = ", ".join(_SCHEMES)
        raise JropeError(f"{KEY}: quant_method is {method!r}, want {names}; {HINT}")
    known = _KNOWN[method].split()
    unknown = [key for key in fields if key not in known and key != "quant_method"]
    try:
        if unknown:
            raise JropeError(f"unknown {', '.join(map(repr, unknown))}")
        return _SCHEMES[method](cast(Fields, fields))
    except JropeError as error:
        raise JropeError(f"{KEY} of {method}: {error}; {HINT}") from None


def _want(fields: Fields, **values: tuple[Any, ...]) -> None:
    """Raise for fields that have none of some values; null is as good as absent."""
    bad = [
        f"{key} is {fields.get(key)!r}, want {' or '.join(map(repr, good))}"
        for key, good in values.items()
        if not any(
            type(fields.get(key)) is type(v) and fields.get(key) == v for v in good
        )
    ]
    if bad:
        raise JropeError("; ".join(bad))


def _objects(name: str, values: list[Any]) -> list[Fields]:
    if not values or not all(isinstance(value, dict) for value in values):
        raise JropeError(f"{name} is {repr(values)[:80]}, want JSON objects")
    return cast(list[Fields], values)


def _fp8(fields: Fields) -> Scheme:
    _want(fields, activation_scheme=("dynamic", None), fmt=("e4m3", None))
    block = fields.get("weight_block_size", [128, 128])
    if not (isinstance(block, list) and len(cast(list[Any], block)) == 2):
        raise JropeError(f"weight_block_size is {block!r}, want two numbers")
    rows, columns = (_positive("weight_block_size", n) for n in cast(list[Any], block))

    def parts(out: int, width: int) -> Parts:
        grid = (-(-out // rows), -(-width // columns))
        return {
            "weight": (("F8_E4M3",), [(out, width)]),
            "weight_scale_inv": (_FLOATS, [grid]),
        }

    def make(arrays: Arrays, shape: tuple[int, int]) -> np.ndarray:
        scale = np.repeat(_float(arrays["weight_scale_inv"]), rows, axis=0)[: shape[0]]
        return _affine(arrays["weight"], None, scale, np.arange(shape[1]) // columns)

    return Scheme("weight", "weight_scale_inv", parts, make, rounds=False)


def _compressed(fields: Fields) -> Scheme:
    _want(fields, kv_cache_scheme=(None,), quantization_status=("compressed", None))
    _want(fields, transform_config=({}, None))
    sparse = _objects("sparsity_config", [fields.get("sparsity_config") or {}])[0]
    _want(sparse, format=("dense", None))
    groups = _objects("config_groups", [fields.get("config_groups")])[0]
    own = _objects("config_groups", [*groups.values()])
    for group in own:
        _want(group, output_activations=(None,))
    given = _objects(
        "weights of config_groups", [group.get("weights") for group in own]
    )
    keys = ("num_bits", "type", "symmetric", "strategy", "group_size", "actorder")
    weights = [{key: each.get(key) for key in keys} for each in given]
    if any(other != weights[0] for other in weights):
        raise JropeError("config_groups store weights in more than one way, want one")
    layout = {group.get("format") or fields.get("format") for group in own}
    return _compressed_weights(weights[0], *layout)


def _compressed_weights(weights: Fields, layout: Any, *more: Any) -> Scheme:
    """One way to store weights, in one of the library's formats."""
    naive = ("float-quantized", "int-quantized", "naive-quantized")
    _want({"format": "mixed" if more else layout}, format=("pack-quantized", *naive))
    packed = layout == "pack-quantized"
    _want(weights, symmetric=(True, False, None))
    _want(weights, num_bits=(4 if packed else 8,), actorder=(None, "weight", "static"))
    kinds = ("int",) if packed else ("float", "int")
    spans = ("group", "channel") if packed else ("channel", "tensor")
    _want(weights, type=kinds, strategy=spans)
    kind, span = weights["type"], weights["strategy"]
    asymmetric = weights["symmetric"] is False
    if asymmetric and (kind == "float" or span == "tensor"):
        _want(weights, symmetric=(True,))
    group = _positive("group_size", weights["group_size"]) if span == "group" else 0
    main = "weight_packed" if packed else "weight"

    def parts(out: int, width: int) -> Parts:
        groups = _groups(width, group)
        scales = [(1,), (), (1, 1)] if span == "tensor" else [(out, groups)]
        found: dict[str, Any] = {"weight_scale": (_FLOATS, scales)}
        if packed:
            found[main] = (("I32",), [(out, -(-width // 8))])
        else:
            found[main] = (("F8_E4M3" if kind == "float" else "I8",), [(out, width)])
        if asymmetric:
            zeros = [(-(-out // 8), groups)] if packed else scales
            found["weight_zero_point"] = (("I32" if packed else "I8",), zeros)
        return found

    def make(arrays: Arrays, shape: tuple[int, int]) -> np.ndarray:
        out, width = shape
        q, zero = arrays[main], arrays.get("weight_zero_point")
        if packed:
            q = _nibbles(q)[:, :width]
            zero = None if zero is None else _nibbles(zero.T)[:, :out].T
            zero = np.full((1, 1), 8) if zero is None else zero
        scale = (
            np.broadcast_to(_float(arrays["weight_scale"]), (out, 1))
            if not group
            else arrays["weight_scale"]
        )
        return _affine(q, zero, scale, np.arange(width) // (group or width))

    unread = ("weight_shape", "input_scale", "input_zero_point")
    return Scheme(main, "weight_scale", parts, make, unread=unread)


def _gptq(fields: Fields) -> Scheme:
    _want(fields, bits=(4,), pack_dtype=("int32", None), dynamic=(None, {}))
    _want(fields, lm_head=(False, None), desc_act=(True, False, None))
    versions = ("gptq", "gptq_v2", None)
    _want(fields, checkpoint_format=versions, format=versions)
    version = fields.get("checkpoint_format") or fields.get("format") or "gptq"
    group = _group_size(fields)

    def make(arrays: Arrays, shape: tuple[int, int]) -> np.ndarray:
        out, width = shape
        index, scale = arrays["g_idx"], arrays["scales"].T
        if (np.diff(index, prepend=0, append=scale.shape[1] - 1) < 0).any():
            raise JropeError(f"g_idx (desc_act) is not ascending over groups; {HINT}")
        zero = _nibbles(arrays["qzeros"])[:, :out].T
        if version == "gptq" and (zero == 15).any():
            raise JropeError(
                f"a zero is stored as 15: readers take it for 0 or 16; {HINT}"
            )
        zero = zero + np.uint8(version == "gptq")
        return _affine(_nibbles(arrays["qweight"].T)[:, :width], zero, scale, index)

    def parts(out: int, width: int) -> Parts:
        n = _groups(width, group)
        return {
            "qweight": (("I32",), [(-(-width // 8), out)]),
            "qzeros": (("I32",), [(n, -(-out // 8))]),
            "scales": (_FLOATS, [(n, out)]),
            "g_idx": (("I32",), [(width,)]),
        }

    return Scheme("qweight", "scales", parts, make)


def _awq(fields: Fields) -> Scheme:
    _want(fields, bits=(4,), zero_point=(True,), version=("gemm", "GEMM", None))
    group = _group_size(fields)
    nibbles = partial(_nibbles, order=_COLUMNS)

    def make(arrays: Arrays, shape: tuple[int, int]) -> np.ndarray:
        out, width = shape
        q, zero = (nibbles(arrays[x])[:, :out].T for x in ("qweight", "qzeros"))
        index = np.arange(width) // (group or width)
        return _affine(q, zero, arrays["scales"].T, index)

    def parts(out: int, width: int) -> Parts:
        n = _groups(width, group)
        return {
            "qweight": (("I32",), [(width, -(-out // 8))]),
            "qzeros": (("I32",), [(n, -(-out // 8))]),
            "scales": (_FLOATS, [(n, out)]),
        }

    return Scheme("qweight", "scales", parts, make)


def _affine(
    q: np.ndarray, zero: np.ndarray | None, scale: np.ndarray, index: np.ndarray
) -> np.ndarray:
    """(q - zero) scale in float32, of q [out, in] and the others [out, groups].

    Args:
      index: [in], the group of each column.
    """
    values = np.array(q, np.float32, order="C")
    if zero is not None:
        values -= _float(zero)[:, index if zero.shape[1] > 1 else index * 0]
    values *= _float(scale)[:, index]
    return values


def _nibbles(words: np.ndarray, order: tuple[int, ...] = ()) -> np.ndarray:
    """Integers [n, 8 m] of words [n, m], low bits first, or each eight in an order."""
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    values = np.stack([octets & 15, octets >> 4], axis=-1)
    values = values.reshape(*words.shape, 8)
    return (values[..., list(order)] if order else values).reshape(len(words), -1)


def _float(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32, copy=False)


def _groups(width: int, group: int) -> int:
    """How many groups a row has; a group of 0 is the whole row."""
    return -(-width // group) if group else 1


def _group_size(fields: Fields) -> int:
    size = fields.get("group_size")
    return 0 if size == -1 else _positive("group_size", size)


def _positive(name: str, value: Any) -> int:
    if type(value) is not int or value < 1:
        raise JropeError(f"{name} is {value!r}, want whole numbers, at least 1")
    return value


_SCHEMES: dict[str, Callable[[Fields], Scheme]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed,
    "gptq": _gptq,
    "awq": _awq,
}
_KNOWN = {  # which are read, are the same in the tensors, or tell how they were made
    "fp8": "activation_scheme fmt weight_block_size modules_to_not_convert "
    "ignored_layers modules_to_convert scale_fmt expert_dtype dequantize",
    "compressed-tensors": "config_groups format ignore kv_cache_scheme version "
    "quantization_status global_compression_ratio sparsity_config transform_config "
    "run_compressed",
    "gptq": "bits group_size desc_act sym checkpoint_format format pack_dtype dynamic "
    "lm_head damp_percent damp_auto_increment static_groups true_sequential mse "
    "model_name_or_path model_file_base_name dataset tokenizer backend meta version "
    "block_name_to_quantize modules_in_block_to_quantize cache_block_outputs "
    "module_name_preceding_first_block model_seqlen batch_size pad_token_id "
    "max_input_length use_cuda_fp16 use_exllama disable_exllama exllama_config "
    "act_group_aware hyb_act",
    "awq": "bits group_size zero_point version modules_to_not_convert backend do_fuse "
    "fuse_max_seq_len modules_to_fuse exllama_config",
}
