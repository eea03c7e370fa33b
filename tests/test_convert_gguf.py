"""gguf_to_hf: numbers, scaling, several files, and the tokenizer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from convert_helpers import LLAMA3, assert_holds, assert_logits, bfloat16
from convert_helpers import _as_a_script as _as_a_script
from convert_helpers import refuse as refuse
from convert_helpers import run as run

import jrope
from jrope.hf.checkpoint import read_config
from jrope.rope import half_to_interleaved
from jrope.rope.methods import Linear, Yarn


def gguf_name(name: str) -> str:
    """Hugging Face's name of a tensor to llama.cpp's."""
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 9)
    found = mapping.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None
    return found


def write_gguf(
    path: Path,
    tiny: Any,
    *,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    weights: Mapping[str, np.ndarray] | None = None,
    keys: Mapping[str, Any] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    arch: str = "llama",
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
    **split: int,
) -> Path:
    """A GGUF file as llama.cpp's converter writes them."""
    config = tiny.config
    writer = gguf.GGUFWriter(path, arch, **split)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in (keys or {}).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add = writer.add_string if isinstance(value, str) else add
        add = writer.add_array if isinstance(value, list) else add
        add(f"llama.{key}", value)
    if tokenizer is not None:
        tokenizer(writer)
    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config["num_key_value_heads"],
    }
    for name, array in (tiny.weights if weights is None else weights).items():
        part = name.split(".")[-2]
        if part in heads:
            array = half_to_interleaved(array, heads[part])
        if array.ndim == 1:
            writer.add_tensor(gguf_name(name), array)
        else:
            packed = gguf.quants.quantize(array, kind)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_float32(tiny_hf, tmp_path, run):
    tiny = tiny_hf(bias=True, rms_norm_eps=1e-5)
    src = write_gguf(tmp_path / "m.gguf", tiny, keys={"expert_count": 0})
    out = run("gguf_to_hf", src, tmp_path / "dst", "--dtype", "float32")
    assert_holds(tmp_path / "dst", tiny.weights)
    assert_logits(tmp_path / "dst", tiny.model)
    assert "m.gguf holds no tokenizer" in out
    config = jrope.hf.config_from_hf(read_config(tmp_path / "dst"))
    wanted = jrope.hf.config_from_hf(tiny.config)
    assert config.rms_norm_eps == 1e-5  # not 9.99999974e-06
    assert config == wanted


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_gguf_dequantizes_and_rounds_once(name, tiny_hf, tmp_path, run):
    tiny, kind = tiny_hf(tied=True), gguf.GGMLQuantizationType[name]
    src = write_gguf(tmp_path / "m.gguf", tiny, kind=kind)

    def there_and_back(name: str, array: np.ndarray) -> np.ndarray:
        if array.ndim == 1:
            return array
        packed = gguf.quants.quantize(array, kind)
        return gguf.quants.dequantize(packed, kind)  # row by row, so order is free

    weights = {n: there_and_back(n, a) for n, a in tiny.weights.items()}
    run("gguf_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", bfloat16(weights))
    run("gguf_to_hf", src, tmp_path / "exact", "--dtype", "float32")
    assert_holds(tmp_path / "exact", weights)


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """llama.cpp's rope_freqs: what frequencies are divided by, pair by pair."""
    turn = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    ratio = rope["original_max_position_embeddings"] / turn
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((ratio - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_llama3(factor, tiny_hf, tmp_path, run):
    rope = LLAMA3 | {"factor": factor}
    tiny = tiny_hf(rope_parameters=rope, max_position_embeddings=131072)
    extra = {"rope_freqs.weight": llama3_factors(rope, tiny.config["head_dim"])}
    src = write_gguf(tmp_path / "m.gguf", tiny, extra=extra)
    run("gguf_to_hf", src, tmp_path / "dst", "--dtype=float32", "--no-tokenizer")
    config = jrope.hf.config_from_hf(read_config(tmp_path / "dst"))
    assert config.rope == jrope.hf.config_from_hf(tiny.config).rope
    assert_logits(tmp_path / "dst", tiny.model)


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"scaling.type": "none"}, None),
        ({"scaling.type": "linear", "scaling.factor": 1.0}, None),
        ({"scaling.type": "linear", "scaling.factor": 2.5}, Linear(factor=2.5)),
        (
            {
                "scaling.type": "yarn",
                "scaling.factor": 4.0,
                "scaling.original_context_length": 16,
                "scaling.yarn_beta_fast": 24.0,
            },
            Yarn(factor=4.0, original_length=16, beta_fast=24.0),
        ),
    ],
)
def test_gguf_scaling(keys, scaling, tiny_hf, tmp_path, run):
    keys = {f"rope.{key}": value for key, value in keys.items()}
    src = write_gguf(tmp_path / "m.gguf", tiny_hf(), keys=keys)
    run("gguf_to_hf", src, tmp_path / "dst")
    config = jrope.hf.config_from_hf(read_config(tmp_path / "dst"))
    assert config.rope.scaling == scaling


def test_gguf_in_several_files(tiny_hf, tmp_path, run, refuse):
    tiny = tiny_hf()
    write_gguf(tmp_path / "m.gguf", tiny, split_max_tensors=8)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) == 3
    run("gguf_to_hf", parts[0], tmp_path / "dst", "--dtype", "float32")
    assert_holds(tmp_path / "dst", tiny.weights)
    assert "not the first of 3" in refuse("gguf_to_hf", parts[1], tmp_path / "no")
    parts[2].unlink()
    assert "no file" in refuse("gguf_to_hf", parts[0], tmp_path / "no")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "qwen2"}, "architecture 'qwen2', want a model of 'llama'"),
        ({"keys": {"logit_scale": 2.0, "foo": 1}}, "llama.logit_scale = 2.0, llama.fo"),
        ({"keys": {"expert_count": 8}}, "unknown llama.expert_count = 8"),
        ({"keys": {"attention.value_length": 8}}, "value_length is 8, but heads have"),
        ({"keys": {"attention.key_length": [1, 2]}}, "key_length = [1, 2] (want a"),
        ({"keys": {"rope.scaling.type": "su"}}, "rope scaling 'su' with no fields"),
        ({"keys": {"rope.scaling.type": "yarn"}}, "original_context_length"),
        ({"keys": {"rope.scaling.attn_factor": 2.0}}, "attn_factor must be 1"),
        ({"keys": {"vocab_size": 62}}, "found (61, 64), want (62, 64)"),
        ({"extra": {"rope_freqs.weight": np.arange(8.0)}}, "is not of Llama 3's kind"),
        ({"extra": {"blk.0.foo.weight": np.ones(8)}}, "1 unexpected: blk.0.foo.weight"),
        ({"extra": {"x": np.ones(8, np.int8)}}, "x (I8)"),
        ({"weights": {}}, "missing token_embd.weight"),
    ],
)
def test_gguf_refuses(change, message, tiny_hf, tmp_path, refuse):
    extra = change.get("extra", {})
    for name, array in extra.items():
        extra[name] = array if array.dtype == np.int8 else array.astype(np.float32)
    src = write_gguf(tmp_path / "m.gguf", tiny_hf(), **change)
    assert message in refuse("gguf_to_hf", src, tmp_path / "dst")


@pytest.mark.parametrize("keep", [2, 500, -2000])
def test_truncated_gguf(keep, tiny_hf, tmp_path, refuse):
    src = write_gguf(tmp_path / "m.gguf", tiny_hf())
    src.write_bytes(src.read_bytes()[:keep])
    line = refuse("gguf_to_hf", src, tmp_path / "dst")
    assert "m.gguf cannot be read as GGUF: damaged, or another format" in line


def byte_level_vocabulary(pre: str) -> Callable[[gguf.GGUFWriter], None]:
    """A byte-level BPE tokenizer that can merge digits."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    def add(writer: gguf.GGUFWriter) -> None:
        letters = sorted({*bytes_to_unicode().values()})
        tokens = ["<s>", "</s>", *letters, "12", "34", "1234", "Ġ1"]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
        writer.add_token_merges(["1 2", "3 4", "12 34", "Ġ 1"])

    return add


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["Ġ", "1", "2", "3", "4"]),
        ("llama-bpe", ["Ġ", "12", "3", "4"]),
        ("gpt-2", ["Ġ", "1234"]),
        ("viking", None),
    ],
)
def test_gguf_tokenizer_splits_as_the_file_says(pre, pieces, tiny_hf, tmp_path, run):
    tiny = tiny_hf(vocab_size=262)
    src = write_gguf(tmp_path / "m.gguf", tiny, tokenizer=byte_level_vocabulary(pre))
    out = run("gguf_to_hf", src, tmp_path / "dst")
    if pieces is None:
        assert "tokenizer not written" in out
        assert "'viking' is unknown" in out
        assert not (tmp_path / "dst" / "tokenizer.json").exists()
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dst")
    assert tokenizer.tokenize(" 1234") == pieces
