"""Folders of quantised checkpoints, and the weights that they should give.

fp8 is of transformers and compressed-tensors of its package; gptq and awq are loops
that are written from the formats' descriptions.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from jrope.tree import flatten

pytest.importorskip("torch")
import torch

Stored = dict[str, Any]
Make = Callable[[Any], tuple[Stored, Any]]
HALF = torch.bfloat16
RNG = np.random.default_rng(5)


def fp8(weight: Any, dtype: Any = torch.float32) -> tuple[Stored, Any]:
    """Blocks of 32 rows and 16 columns; transformers' own dequantisation."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    out, width = weight.shape
    blocks = weight.reshape(out // 32, 32, width // 16, 16)
    scale = blocks.abs().amax(dim=(1, 3)) / 448
    q = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    q, scale = q.reshape(out, width), scale.to(HALF)
    want = Fp8Dequantize(None)._dequantize_one(q, scale, output_dtype=dtype)
    return {"weight": q, "weight_scale_inv": scale}, want


def compressed(
    weights: Mapping[str, Any], form: str, scale_dtype: Any = HALF
) -> tuple[dict[str, Any], Make]:
    """The package's quantization_config, and its compression and decompression."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=weights, format=form)
    library: Any = BaseCompressor.get_value_from_registry(form)

    def make(weight: Any) -> tuple[Stored, Any]:
        out = weight.shape[0]
        rows = weight.reshape(out, -1, weights.get("group_size") or weight.shape[1])
        rows = rows.reshape(1, 1, -1) if weights["strategy"] == "tensor" else rows
        low, high = rows.amin(-1), rows.amax(-1)
        scale, zero = calculate_qparams(low, high, scheme.weights)
        if weights["strategy"] == "tensor":
            scale, zero = scale.reshape(1), zero.reshape(1)
        given = {"weight": weight, "weight_scale": scale.to(scale_dtype)}
        stored = library.compress({**given, "weight_zero_point": zero}, scheme)
        stored = {k: v.contiguous() for k, v in stored.items() if v is not None}
        return stored, library.decompress(stored, scheme)["weight"]

    group = {"targets": ["Linear"], "weights": dict(weights)}
    fields = {
        "config_groups": {"group_0": group},
        "format": form,
        "ignore": ["lm_head"],
    }
    return {"quant_method": "compressed-tensors", **fields}, make


def words(values: np.ndarray, order: tuple[int, ...] = tuple(range(8))) -> Any:
    """int32 [n, m / 8] of integers [n, m]: nibble i holds column order[i] of eight."""
    out = np.zeros((values.shape[0], values.shape[1] // 8), np.uint64)
    for nibble, column in enumerate(order):
        out |= values[:, column::8].astype(np.uint64) << np.uint64(4 * nibble)
    return torch.from_numpy(out.astype(np.uint32).view(np.int32).copy())


def integers(
    weight: Any, zeros: tuple[int, int], dtype: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random q [in, out], and for groups of 32 zeros of a range and scales."""
    out, width = weight.shape
    zero = RNG.integers(*zeros, (width // 32, out))
    scale = RNG.uniform(1e-3, 4e-2, zero.shape).astype(dtype)
    return RNG.integers(0, 16, (width, out)), zero, scale


def product(q: np.ndarray, zero: np.ndarray, scale: np.ndarray) -> Any:
    """[out, in] in float64, rounded once to the scale's dtype."""
    rows = [
        (q[i].astype(np.float64) - zero[i // 32]) * scale[i // 32].astype(np.float64)
        for i in range(len(q))
    ]
    return torch.from_numpy(np.stack(rows, axis=1).astype(scale.dtype))


def gptq(
    weight: Any,
    version: int = 1,
    zeros: tuple[int, int] = (1, 16),
    dtype: Any = np.float16,
) -> tuple[Stored, Any]:
    q, zero, scale = integers(weight, zeros, dtype)
    stored = {
        "qweight": words(q.T).T.contiguous(),
        "qzeros": words(zero - (version == 1)),
        "scales": torch.from_numpy(scale),
        "g_idx": torch.arange(len(q), dtype=torch.int32) // 32,
    }
    return stored, product(q, zero, scale)


def awq(weight: Any, dtype: Any = np.float16) -> tuple[Stored, Any]:
    q, zero, scale = integers(weight, (0, 16), dtype)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    stored = {"qweight": words(q, order), "qzeros": words(zero, order)}
    return {**stored, "scales": torch.from_numpy(scale)}, product(q, zero, scale)


def weights(bits: int, kind: str, strategy: str, symmetric: bool = True) -> Stored:
    group = {"group_size": 32} if strategy == "group" else {}
    return {"num_bits": bits, "type": kind, "strategy": strategy, **group} | {
        "symmetric": symmetric
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FP8 |= {"weight_block_size": [32, 16], "modules_to_not_convert": ["lm_head"]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
FORMATS: dict[str, tuple[Stored, Make]] = {
    "fp8": (FP8, fp8),
    "int4-group": compressed(weights(4, "int", "group"), "pack-quantized"),
    "int4-group-zero": compressed(weights(4, "int", "group", False), "pack-quantized"),
    "int4-channel": compressed(weights(4, "int", "channel"), "pack-quantized"),
    "int4-channel-zero": compressed(
        weights(4, "int", "channel", False), "pack-quantized", torch.float32
    ),
    "fp8-tensor": compressed(weights(8, "float", "tensor"), "float-quantized"),
    "fp8-channel": compressed(weights(8, "float", "channel"), "float-quantized"),
    "int8-channel": compressed(weights(8, "int", "channel"), "int-quantized"),
    "int8-float16": compressed(
        weights(8, "int", "channel"), "int-quantized", torch.float16
    ),
    "gptq": (GPTQ, gptq),
    "gptq_v2": (
        {**GPTQ, "checkpoint_format": "gptq_v2", "desc_act": True},
        lambda weight: gptq(weight, 2),
    ),
    "gptq-sym": ({**GPTQ, "sym": True}, partial(gptq, zeros=(8, 9))),
    "awq": ({**AWQ, "version": "gemm"}, awq),
}


def write_folder(
    tiny: Any, where: Path, fields: Stored, make: Make, **changes: Any
) -> tuple[Path, Stored]:
    """Write a folder of a format; returns it, and the weights there should be."""
    folder, stored, want = where / "model", dict[str, Any](), dict[str, Any]()
    for name, array in tiny.weights.items():
        want[name] = stored[name] = torch.from_numpy(np.array(array)).to(HALF)
        if "_proj.weight" in name:
            parts, want[name] = make(torch.from_numpy(np.array(array)))
            del stored[name]
            module = name.removesuffix(".weight")
            stored |= {f"{module}.{leaf}": x for leaf, x in parts.items()}
    folder.mkdir()
    for name in changes.pop("without", ()):
        del stored[name]
    stored |= changes.pop("tensors", {})
    save_file(stored, folder / "model.safetensors")
    config = {**tiny.model.config.to_dict(), "quantization_config": fields}
    config = {**config, "dtype": "bfloat16", **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, want


def assert_equal(got: Any, want: Mapping[str, Any], dtype: Any = None) -> None:
    flat = flatten(got)
    assert {*flat} == {*want}
    for name, array in want.items():
        theirs = array if dtype is None else array.to(dtype)
        assert str(theirs.dtype) == f"torch.{flat[name].dtype}", name
        wide = theirs.float().numpy()
        assert np.array_equal(np.asarray(flat[name], np.float32), wide), name
