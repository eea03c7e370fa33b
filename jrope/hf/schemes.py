"""The quantization_config of a folder as a scheme: fp8 here, others by their files."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from jrope.errors import JropeError
from jrope.hf.compressed import compressed
from jrope.hf.gptq import awq, gptq
from jrope.hf.stored import (
    FLOATS,
    HINT,
    KEY,
    Fields,
    Parts,
    Read,
    Scheme,
    Shape,
    objects,
    positive,
    want,
)


def scheme_of(fields: Any) -> Scheme:
    """How a quantization_config stores matrices.

    Raises:
      JropeError: it is none that is read; says which fields.
    """
    method = objects(KEY, [fields])[0].get("quant_method")
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


def _fp8(fields: Fields) -> Scheme:
    want(fields, activation_scheme=("dynamic", None), fmt=("e4m3", None))
    block = fields.get("weight_block_size", [128, 128])
    if not (isinstance(block, list) and len(cast(list[Any], block)) == 2):
        raise JropeError(f"weight_block_size is {block!r}, want two numbers")
    rows, columns = (positive("weight_block_size", n) for n in cast(list[Any], block))

    def parts(out: int, width: int) -> Parts:
        grid = (-(-out // rows), -(-width // columns))
        return {
            "weight": (("F8_E4M3",), [(out, width)]),
            "weight_scale_inv": (FLOATS, [grid]),
        }

    def scales(read: Read, shape: Shape) -> np.ndarray:
        return np.repeat(read("weight_scale_inv"), rows, axis=0)[: shape[0]]

    return Scheme(
        main="weight",
        scale="weight_scale_inv",
        parts=parts,
        integers=lambda read, _: read("weight"),
        scales=scales,
        group=columns,
        rounds=False,
    )


_SCHEMES: dict[str, Callable[[Fields], Scheme]] = {
    "fp8": _fp8,
    "compressed-tensors": compressed,
    "gptq": gptq,
    "awq": awq,
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
