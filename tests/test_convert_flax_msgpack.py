"""flax_msgpack_to_hf: shards, bfloat16 in chunks, and the rope that was meant."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np
import pytest
from convert_helpers import (
    LLAMA3,
    assert_holds,
    assert_logits,
    bfloat16,
    halves,
    write_json,
)
from convert_helpers import _as_a_script as _as_a_script
from convert_helpers import refuse as refuse
from convert_helpers import run as run

import jrope
from jrope.hf.checkpoint import read_config
from jrope.tree import nest


def flax_tree(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """FlaxLlama's parameters, path by path: kernels are [in, out]."""
    flat = {}
    for name, array in weights.items():
        path = name.removesuffix(".weight").replace(".", "/")
        if "embed_tokens" in name:
            flat[f"{path}/embedding"] = array
        elif name.endswith(".bias"):
            flat[name.replace(".", "/")] = array
        elif array.ndim == 2:
            flat[f"{path}/kernel"] = np.ascontiguousarray(array.T)
        else:
            flat[f"{path}/weight"] = array
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    return nest({name.replace("/", "."): leaf for name, leaf in flat.items()})


def msgpack_folder(
    folder: Path, tiny: Any, weights: Mapping[str, np.ndarray], shards: bool = False
) -> Path:
    """A folder as transformers 4's FlaxLlamaForCausalLM wrote them."""
    folder.mkdir()
    write_json(folder / "config.json", tiny.config)
    flat = flax_tree(weights)
    pack = flax.serialization.to_bytes
    if not shards:
        (folder / "flax_model.msgpack").write_bytes(pack(nested(flat)))
        return folder
    places = {}
    for number, part in enumerate(halves(flat), 1):
        file = f"flax_model-{number:05}-of-00002.msgpack"
        (folder / file).write_bytes(pack(nested(part)))
        places |= dict.fromkeys(part, file)
    write_json(folder / "flax_model.msgpack.index.json", {"weight_map": places})
    return folder


@pytest.mark.parametrize("shards", [False, True])
def test_flax_msgpack(shards, tiny_hf, tmp_path, run):
    tiny = tiny_hf()
    src = msgpack_folder(tmp_path / "src", tiny, tiny.weights, shards)
    run("flax_msgpack_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", tiny.weights)
    assert_logits(tmp_path / "dst", tiny.model)


def test_flax_msgpack_in_bfloat16_and_chunks(tiny_hf, tmp_path, run, monkeypatch):
    tiny = tiny_hf(tied=True)
    weights = bfloat16(tiny.weights)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 5000)
    src = msgpack_folder(tmp_path / "src", tiny, weights)
    assert b"__msgpack_chunked_array__" in (src / "flax_model.msgpack").read_bytes()
    run("flax_msgpack_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", weights)


def test_flax_msgpack_asks_which_rope_was_meant(tiny_hf, tmp_path, run, refuse):
    tiny = tiny_hf(rope_parameters=LLAMA3, max_position_embeddings=131072)
    src = msgpack_folder(tmp_path / "src", tiny, tiny.weights)
    line = refuse("flax_msgpack_to_hf", src, tmp_path / "dst")
    assert "always rotated with theta 10000" in line
    run("flax_msgpack_to_hf", src, tmp_path / "config", "--rope", "config")
    assert_logits(tmp_path / "config", tiny.model)
    run("flax_msgpack_to_hf", src, tmp_path / "flax", "--rope", "flax")
    rope = jrope.hf.config_from_hf(read_config(tmp_path / "flax")).rope
    assert rope == jrope.Rope(theta=10000.0, rotary_dim=16)


def test_flax_msgpack_refuses(tiny_hf, tmp_path, refuse):
    tiny = tiny_hf()
    weights = dict(tiny.weights)
    del weights["model.norm.weight"]
    weights["model.layers.0.self_attn.rotary.weight"] = np.ones(3, np.int32)
    src = msgpack_folder(tmp_path / "src", tiny, weights)
    line = refuse("flax_msgpack_to_hf", src, tmp_path / "dst")
    for text in ("model.norm.weight", "self_attn.rotary.weight", "(int32)"):
        assert text in line
    file = src / "flax_model.msgpack"
    file.write_bytes(file.read_bytes()[:-100])
    line = refuse("flax_msgpack_to_hf", src, tmp_path / "dst")
    assert "flax_model.msgpack cannot be read as Flax parameters in msgpack" in line
    file.write_bytes(flax.serialization.msgpack_serialize({"a": {"b": 3, "c": "x"}}))
    assert "a/b (int), a/c (str) are not arrays; want arrays" in refuse(
        "flax_msgpack_to_hf", src, tmp_path / "dst"
    )
