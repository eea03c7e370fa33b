"""meta_to_hf: Meta's shards, made here, by rows and by columns."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_helpers import (
    LLAMA3,
    assert_holds,
    assert_logits,
    bfloat16,
    torch_tensors,
    write_json,
)
from convert_helpers import _as_a_script as _as_a_script
from convert_helpers import refuse as refuse
from convert_helpers import run as run

import jrope
from jrope.hf.checkpoint import read_config
from jrope.rope import half_to_interleaved
from jrope.rope.methods import Llama3

HIDDEN = 192  # what Meta's formula gives for dim 64 and multiple_of 32


def meta_name(name: str) -> str:
    """Hugging Face's name of a tensor to Meta's, written out independently."""
    table = {
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
        "model.layers": "layers",
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for theirs, metas in table.items():
        name = name.replace(theirs, metas)
    return name


def meta_tensors(weights: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Any:
    """The whole state dict, wq and wk in interleaved order."""
    heads = {
        "wq": config["num_attention_heads"],
        "wk": config["num_key_value_heads"],
    }
    renamed = {meta_name(name): array for name, array in weights.items()}
    for name, array in renamed.items():
        kind = name.split(".")[-2]
        if kind in heads:
            renamed[name] = half_to_interleaved(array, heads[kind])
    return torch_tensors(renamed)


def meta_folder(
    folder: Path,
    weights: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    *,
    ranks: int = 1,
    rows_of_embedding: bool = False,
    **params: Any,
) -> Path:
    """A folder as Meta publishes them, `ranks` model-parallel files."""
    folder.mkdir()
    whole = meta_tensors(weights, config)
    whole.setdefault("output.weight", whole["tok_embeddings.weight"].clone())
    kv_heads = config["num_key_value_heads"]
    for rank in range(ranks):
        part = {"rope.freqs": torch.ones(8)}
        for name, tensor in whole.items():
            kind = name.split(".")[-2]
            axis = 1 if kind in ("wo", "w2", "tok_embeddings") else 0
            if kind == "tok_embeddings" and rows_of_embedding:
                axis = 0
            if tensor.ndim == 1:
                part[name] = tensor
            elif kind in ("wk", "wv") and ranks > kv_heads:
                part[name] = tensor.chunk(kv_heads)[rank * kv_heads // ranks].clone()
            else:
                part[name] = tensor.chunk(ranks, axis)[rank].clone()
        torch.save(part, folder / f"consolidated.{rank:02}.pth")
    known = {
        "dim": 64,
        "n_layers": config["num_hidden_layers"],
        "n_heads": config["num_attention_heads"],
        "n_kv_heads": kv_heads,
        "vocab_size": -1,
        "multiple_of": 32,
        "norm_eps": config["rms_norm_eps"],
    }
    params = {key: value for key, value in (known | params).items() if value != "drop"}
    write_json(folder / "params.json", params)
    return folder


@pytest.mark.parametrize(
    ("ranks", "rows", "kv_heads"),
    [(1, False, 2), (2, False, 2), (2, True, 4), (2, False, 1), (4, True, 2)],
)
def test_meta(ranks, rows, kv_heads, tiny_hf, tmp_path, run):
    tiny = tiny_hf(kv_heads=kv_heads, intermediate_size=HIDDEN, vocab_size=64)
    weights = bfloat16(tiny.weights)
    src = meta_folder(
        tmp_path / "src", weights, tiny.config, ranks=ranks, rows_of_embedding=rows
    )
    (src / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    out = run("meta_to_hf", src, tmp_path / "dst", "--max-position", 2048)
    assert_holds(tmp_path / "dst", weights)
    assert (tmp_path / "dst" / "tokenizer.model").is_file()
    assert "rope_theta 10000: params.json has none" in out
    assert "bos_token_id 1 and eos_token_id [2]" in out
    config = jrope.hf.config_from_hf(read_config(tmp_path / "dst"))
    assert config.max_position_embeddings == 2048
    if ranks == 4:
        for name, tensor in tiny.model.named_parameters():
            tensor.copy_(torch_tensors(weights)[name].float())
        assert_logits(tmp_path / "dst", tiny.model)


def test_meta_llama3(tiny_hf, tmp_path, run):
    rope = LLAMA3 | {"factor": 32.0}
    tiny = tiny_hf(
        tied=True,
        intermediate_size=HIDDEN,
        vocab_size=64,
        max_position_embeddings=131072,
        rope_parameters=rope,
    )
    src = meta_folder(
        tmp_path / "src",
        tiny.weights,
        tiny.config,
        ranks=2,
        rows_of_embedding=True,
        rope_theta=500000.0,
        use_scaled_rope=True,
        vocab_size=64,
    )
    (src / "tokenizer.model").write_bytes(b"IQ== 0\n")
    out = run("meta_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", tiny.weights)
    assert_logits(tmp_path / "dst", tiny.model)
    for text in ("written as tied", "rope factor 32", "131072", "copy tokenizer.json"):
        assert text in out
    out = run("meta_to_hf", src, tmp_path / "b", "--rope-factor=8", "--eos", 5, 6)
    config = jrope.hf.config_from_hf(read_config(tmp_path / "b"))
    assert config.eos_token_id == (5, 6)
    assert config.rope.scaling == Llama3(
        factor=8.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0
    )
    assert "rope factor" not in out


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"window": 3, "moe": {}}, "unknown window, moe"),
        ({"dim": "drop", "n_heads": "drop"}, "missing dim, n_heads"),
        ({"n_heads": 5}, "dim is not a multiple of n_heads"),
        ({"n_layers": True}, "n_layers is true, want a positive integer"),
        ({"norm_eps": "1e-5"}, "norm_eps is"),
        ({"vocab_size": 65}, "vocab_size 65, the embedding 64 rows"),
        ({"multiple_of": 256}, "give 256 hidden units, but w1 has 192"),
        ({"ffn_dim_multiplier": 1.3}, "give 224 hidden units, but w1 has 192"),
        ({}, "give --max-position (LLaMA 1: 2048, Llama 2: 4096)"),
        ({"dim": 96, "n_heads": 4}, "tok_embeddings.weight has 64 columns"),
        ({"n_layers": 3, "rope_theta": 5e5}, "9 missing: model.layers.2.self_attn"),
        ({"n_kv_heads": 4, "rope_theta": 5e5}, "found (32, 64), want (64, 64)"),
        ({"rope_theta": 5e5, "--rope-factor": 8}, "use_scaled_rope is not true"),
    ],
)
def test_meta_refuses(params, message, tiny_hf, tmp_path, refuse):
    tiny = tiny_hf(intermediate_size=HIDDEN, vocab_size=64)
    params = dict(params)
    options = [f"{k}={params.pop(k)}" for k in [*params] if k.startswith("--")]
    src = meta_folder(tmp_path / "src", tiny.weights, tiny.config, **params)
    assert message in refuse("meta_to_hf", src, tmp_path / "dst", *options)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("gap", "has consolidated.00.pth, consolidated.02.pth; want consolidated.00"),
        ("names", "differ in extra; they are not ranks of one checkpoint"),
        ("unknown", "1 unexpected: extra"),
        ("shape", "layers.0.feed_forward.w1.weight differs between the ranks"),
        ("copies", "ranks that share a head do not hold the same rows"),
        ("none", "no consolidated.*.pth"),
        ("output", "missing output.weight"),
    ],
)
def test_meta_ranks_must_agree(kind, message, tiny_hf, tmp_path, refuse):
    tiny = tiny_hf(kv_heads=1, intermediate_size=HIDDEN, vocab_size=64)
    src = meta_folder(tmp_path / "src", tiny.weights, tiny.config, ranks=2)
    files = [src / f"consolidated.{rank:02}.pth" for rank in range(2)]
    parts = [torch.load(file) for file in files]
    if kind in ("names", "unknown"):
        for part in parts[: 1 if kind == "names" else 2]:
            part["extra"] = torch.zeros(3)
    elif kind == "shape":
        parts[1]["layers.0.feed_forward.w1.weight"] = torch.zeros(95, 64)
    elif kind == "copies":
        parts[1]["layers.0.attention.wv.weight"] += 1
    elif kind == "output":
        for part in parts:
            del part["output.weight"]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, file)
    if kind == "gap":
        files[1].rename(src / "consolidated.02.pth")
    elif kind == "none":
        for file in files:
            file.unlink()
    line = refuse("meta_to_hf", src, tmp_path / "dst", "--max-position=2048")
    assert message in line
