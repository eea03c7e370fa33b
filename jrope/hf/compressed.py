"""compressed-tensors: packed 4-bit integers, 8-bit integers, and fp8."""

from typing import Any

import numpy as np

from jrope.errors import JropeError
from jrope.hf.stored import (
    FLOATS,
    Fields,
    Parts,
    Read,
    Scheme,
    Shape,
    groups,
    nibbles,
    objects,
    positive,
    want,
)

_ZERO = "weight_zero_point"


def compressed(fields: Fields) -> Scheme:
    """The scheme of compressed-tensors' fields, one for all groups of modules."""
    want(fields, kv_cache_scheme=(None,), quantization_status=("compressed", None))
    want(fields, transform_config=({}, None))
    sparse = objects("sparsity_config", [fields.get("sparsity_config") or {}])[0]
    want(sparse, format=("dense", None))
    found = objects("config_groups", [fields.get("config_groups")])[0]
    own = objects("config_groups", [*found.values()])
    for group in own:
        want(group, output_activations=(None,))
    given = objects("weights of config_groups", [group.get("weights") for group in own])
    keys = ("num_bits", "type", "symmetric", "strategy", "group_size", "actorder")
    weights = [{key: each.get(key) for key in keys} for each in given]
    if any(other != weights[0] for other in weights):
        raise JropeError("config_groups store weights in more than one way, want one")
    layout = {group.get("format") or fields.get("format") for group in own}
    return _scheme(weights[0], *layout)


def _scheme(weights: Fields, layout: Any, *more: Any) -> Scheme:
    """One way to store weights, in one of the library's formats."""
    naive = ("float-quantized", "int-quantized", "naive-quantized")
    want({"format": "mixed" if more else layout}, format=("pack-quantized", *naive))
    packed = layout == "pack-quantized"
    want(weights, symmetric=(True, False, None))
    want(weights, num_bits=(4 if packed else 8,), actorder=(None, "weight", "static"))
    kinds = ("int",) if packed else ("float", "int")
    spans = ("group", "channel") if packed else ("channel", "tensor")
    want(weights, type=kinds, strategy=spans)
    kind, span = weights["type"], weights["strategy"]
    asymmetric = weights["symmetric"] is False
    if asymmetric and (kind == "float" or span == "tensor"):
        want(weights, symmetric=(True,))
    group = positive("group_size", weights["group_size"]) if span == "group" else 0
    main = "weight_packed" if packed else "weight"
    code = "I32" if packed else "I8" if kind == "int" else "F8_E4M3"

    def parts(out: int, width: int) -> Parts:
        n = groups(width, group)
        scales = [(1,), (), (1, 1)] if span == "tensor" else [(out, n)]
        shape = (out, -(-width // 8)) if packed else (out, width)
        found: dict[str, Any] = {"weight_scale": (FLOATS, scales)}
        found[main] = ((code,), [shape])
        if asymmetric:
            found[_ZERO] = ((code,), [(-(-out // 8), n)] if packed else scales)
        return found

    def scales(read: Read, shape: Shape) -> np.ndarray:
        found = read("weight_scale")
        return found if group else np.broadcast_to(found, (shape[0], 1))

    integers, zeros = (_packed, _packed_zeros) if packed else (_plain, _plain_zeros)
    return Scheme(
        main=main,
        scale="weight_scale",
        parts=parts,
        integers=integers,
        scales=scales,
        zeros=zeros if asymmetric else None,
        group=group,
        bits=4 if packed else 8,
        unread=("weight_shape", "input_scale", "input_zero_point"),
    )


def _packed(read: Read, shape: Shape) -> np.ndarray:
    return nibbles(read("weight_packed"))[:, : shape[1]]


def _packed_zeros(read: Read, shape: Shape) -> np.ndarray:
    return nibbles(read(_ZERO).T)[:, : shape[0]].T


def _plain(read: Read, _: Shape) -> np.ndarray:
    return read("weight")


def _plain_zeros(read: Read, _: Shape) -> np.ndarray:
    return read(_ZERO)
