"""Quantised folders give the weights that their own libraries dequantise to.

fp8 is compared with transformers and compressed-tensors with its package; gptq and awq
with sums in float64 over loops that are written from the formats' descriptions.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_helpers import describe, fail, succeed
from quantized_helpers import (
    AWQ,
    FORMATS,
    FP8,
    GPTQ,
    HALF,
    Stored,
    assert_equal,
    write_folder,
)

from jrope.errors import JropeError
from jrope.hf.checkpoint import load, load_shapes, read_llama_config, save
from jrope.hf.quantized import open_dequantized
from jrope.hf.schemes import scheme_of
from jrope.model.llama import forward
from jrope.parity import compare
from jrope.sharding.meshes import mesh
from jrope.tree import nest

pytest.importorskip("torch")
import torch


@pytest.fixture(scope="module")
def tiny(tiny_hf: Any) -> Any:
    return tiny_hf(layers=1)


@pytest.fixture
def write(tiny: Any, tmp_path: Path) -> Callable[..., Any]:
    """Write a folder of a format; returns it, and the weights there should be."""
    return partial(write_folder, tiny, tmp_path)


@pytest.mark.parametrize("name", FORMATS)
def test_bit_equal(write: Any, name: str) -> None:
    fields, make = FORMATS[name]
    folder, want = write(fields, make)
    own = {n: x.to(HALF) for n, x in want.items()} if name == "fp8" else want
    for dtype, theirs in ((None, own), ("float32", want)):
        params, _ = load(folder, dtype)
        assert_equal(params, theirs, torch.float32 if dtype else None)
        shapes, _ = load_shapes(folder, dtype)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
            lambda x: (x.shape, x.dtype), shapes
        )


def test_logits_and_save(write: Any, tmp_path: Path) -> None:
    folder, want = write(*FORMATS["int4-group-zero"])
    params, config = load(folder, "float32")
    plain = {name: jnp.asarray(x.float().numpy()) for name, x in want.items()}
    saved = save(tmp_path / "plain", params, config)
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    again, _ = load(saved)
    ids = jnp.arange(12)[None]
    run = jax.jit(lambda tree: forward(tree, ids, config=config)[0])
    assert_equal(again, {name: x.float() for name, x in want.items()})
    assert np.array_equal(run(params), run(nest(plain)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_the_same_fp8(write: Any, dtype: str) -> None:
    from transformers import FineGrainedFP8Config, LlamaForCausalLM

    folder, _ = write(*FORMATS["fp8"])
    how = FineGrainedFP8Config(dequantize=True, weight_block_size=(32, 16))
    model = LlamaForCausalLM.from_pretrained(
        folder, quantization_config=how, dtype=getattr(torch, dtype)
    )
    assert_equal(load(folder, dtype)[0], model.state_dict())


def test_blocks_that_stand_over(write: Any) -> None:
    """The last block of a row and of a column may be cut off."""
    block = {**FP8, "weight_block_size": [40, 36]}

    def make(weight: Any) -> tuple[Stored, Any]:
        q = weight.to(torch.float8_e4m3fn)
        grid = [math.ceil(n / b) for n, b in zip(weight.shape, (40, 36), strict=True)]
        scale = torch.arange(1.0, 1 + math.prod(grid)).reshape(grid) / 7
        full = scale.repeat_interleave(40, 0).repeat_interleave(36, 1)
        want = q.float() * full[: weight.shape[0], : weight.shape[1]]
        return {"weight": q, "weight_scale_inv": scale}, want

    params, _ = load((made := write(block, make))[0], "float32")
    assert_equal(params, made[1], torch.float32)


def test_mesh(write: Any) -> None:
    folder, want = write(*FORMATS["gptq"])
    params, config = load(folder, mesh=mesh("model=1"))
    assert_equal(params, want)
    name, part = f"{NAME}.weight", (slice(8, 40), slice(16, 64))
    got = open_dequantized(folder, config).read(name, part=part)
    assert np.array_equal(got, want[name].numpy()[part])


NAME = "model.layers.0.self_attn.q_proj"
CT = FORMATS["int4-group"][0]


def in_group(**changes: Any) -> Stored:
    group = CT["config_groups"]["group_0"]
    changed = {**group, "weights": {**group["weights"], **changes}}
    return {**CT, "config_groups": {"group_0": changed}}


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes', want fp8"),
        ({"quant_method": "mxfp4"}, "quant_method is 'mxfp4', want fp8, .*dequantize"),
        ([4], r"quantization_config is \[\[4\]\], want JSON objects"),
        ({**GPTQ, "bits": 8}, "gptq: bits is 8, want 4; dequantize"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({**GPTQ, "dynamic": {"-:x": {}}}, "dynamic is"),
        ({**GPTQ, "group_size": 0}, "group_size is 0, want"),
        ({**GPTQ, "twist": 1}, "unknown 'twist'"),
        ({**AWQ, "version": "gemv"}, "awq: version is 'gemv', want 'gemm'"),
        ({**AWQ, "zero_point": False}, "zero_point is False"),
        ({**FP8, "activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({**FP8, "weight_block_size": None}, "weight_block_size is None"),
        ({**CT, "kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme is"),
        ({**CT, "sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        ({**CT, "format": "nvfp4-pack-quantized"}, "format is 'nvfp4"),
        ({**CT, "config_groups": {}}, "config_groups is"),
        (in_group(num_bits=8), "num_bits is 8, want 4"),
        (in_group(strategy="block"), "strategy is 'block', want 'group' or 'channel'"),
        (in_group(actorder="group"), "actorder is 'group'"),
    ],
)
def test_refused_schemes(tiny: Any, tmp_path: Path, fields: Stored, match: str) -> None:
    config = {**tiny.model.config.to_dict(), "quantization_config": fields}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(JropeError, match=match) as caught:
        read_llama_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_two_ways_in_one_folder(tiny: Any) -> None:
    one, other = (
        FORMATS[name][0]["config_groups"]["group_0"]
        for name in ("int4-group", "int4-channel")
    )
    with pytest.raises(JropeError, match="in more than one way"):
        scheme_of({**CT, "config_groups": {"a": one, "b": other}})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"without": [f"{NAME}.scales"]}, f"{NAME}.scales is missing"),
        (
            {"tensors": {f"{NAME}.weight": torch.zeros(64, 64)}},
            f"{NAME}.weight is there beside qweight, qzeros",
        ),
        (
            {"tensors": {f"{NAME}.scales": torch.ones(3, 3)}},
            r"q_proj.scales is F32 \[3, 3\], want .* \[2, 64\]",
        ),
        (
            {"tensors": {f"{NAME}.g_idx": torch.arange(64, dtype=torch.int32) % 2}},
            f"{NAME}.weight: g_idx .*not ascending",
        ),
        (
            {"tensors": {f"{NAME}.g_idx": torch.arange(64, dtype=torch.int32)}},
            f"{NAME}.weight: g_idx .*not ascending",
        ),
        (
            {"tensors": {f"{NAME}.qzeros": torch.full((2, 8), -1, dtype=torch.int32)}},
            "stored as 15: readers take it for 0 or 16",
        ),
        ({"tensors": {"model.norm.qweight": torch.ones(1)}}, "model.norm.qweight"),
    ],
)
def test_refused_tensors(write: Any, changes: Stored, match: str) -> None:
    folder, _ = write(*FORMATS["gptq"], **changes)
    with pytest.raises(JropeError, match=match):
        load(folder)


def test_too_large_for_float16(write: Any) -> None:
    tensors = {f"{NAME}.weight_scale_inv": torch.full((2, 4), 1e5)}
    folder, _ = write(*FORMATS["fp8"], tensors=tensors)
    with pytest.raises(JropeError, match=f"{NAME}.weight: .*too large for float16"):
        load(folder, "float16")


def test_joined_matrices_are_refused(write: Any) -> None:
    changes = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    folder, _ = write(*FORMATS["awq"], **changes)
    config = json.loads((folder / "config.json").read_text())
    for key in ("mlp_bias", "attention_bias", "pretraining_tp", "head_dim"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(JropeError, match="'phi3', which joins"):
        load(folder)


def test_commands(write: Any, tmp_path: Path, capsys: Any) -> None:
    """`inspect` tells, `convert` writes the float weights, `parity` asks for them."""
    folder, want = write(*FORMATS["awq"])
    assert describe(capsys, folder)["weights"]["quantized"] == 7
    assert "7 stored quantised" in succeed(capsys, "inspect", folder)[0]
    succeed(capsys, "convert", folder, tmp_path / "plain")
    assert "quantization_config" not in (tmp_path / "plain/config.json").read_text()
    assert_equal(load(tmp_path / "plain")[0], want)
    with pytest.raises(JropeError, match=r"quantised weights.*jrope convert"):
        compare(folder)
    assert "quantised" in fail(capsys, "parity", folder)
