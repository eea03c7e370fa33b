"""pytorch_bin_to_hf: shards, bfloat16, old pickles, damage, and code in pickles."""

import json
import os
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import _as_a_script as _as_a_script
from convert_helpers import (
    assert_holds,
    assert_logits,
    bfloat16,
    bin_folder,
    torch_tensors,
    write_json,
)
from convert_helpers import refuse as refuse
from convert_helpers import run as run

from jrope.hf.checkpoint import read_config


@pytest.mark.parametrize("shards", [False, True])
def test_pytorch_bin(shards, tiny_hf, tmp_path, run):
    tiny = tiny_hf(bias=True)
    src = bin_folder(tmp_path / "src", tiny, shards=shards)
    out = run("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", tiny.weights)
    assert_logits(tmp_path / "dst", tiny.model)
    assert f"{len(tiny.weights)} tensors" in out
    assert out.rstrip().endswith("float32")
    assert (tmp_path / "dst" / "tokenizer.json").read_text() == "{}"


def test_pytorch_bin_keeps_bfloat16_and_drops_frequencies(tiny_hf, tmp_path, run):
    tiny = tiny_hf()
    weights = bfloat16(tiny.weights)
    tables = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")
    names = [f"model.layers.0.self_attn.rotary_emb.{table}" for table in tables]
    frequencies = dict.fromkeys(names, torch.ones(8))
    tensors = torch_tensors(weights) | frequencies
    src = bin_folder(tmp_path / "src", tiny, tensors)
    run("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", weights)
    assert read_config(tmp_path / "dst")["dtype"] == "bfloat16"


def test_pytorch_bin_with_tied_and_transposed_tensors(tiny_hf, tmp_path, run, refuse):
    tiny = tiny_hf(tied=True)
    tensors = torch_tensors(tiny.weights)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    up = "model.layers.0.mlp.up_proj.weight"
    tensors[up] = tensors[up].T.contiguous().T  # same values, other strides
    src = bin_folder(tmp_path / "src", tiny, tensors)
    run("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", tiny.weights)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    src = bin_folder(tmp_path / "other", tiny, tensors)
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "no")
    assert "lm_head.weight differs from" in line
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].double()
    src = bin_folder(tmp_path / "double", tiny, tensors)
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "no")
    assert "lm_head.weight is float64 [61, 64] and model.embed_tokens.weight fl" in line


def test_pytorch_bin_of_the_old_kind(tiny_hf, tmp_path, run):
    tiny = tiny_hf()
    src = bin_folder(tmp_path / "src", tiny)
    torch.save(
        {n: torch.nn.Parameter(t) for n, t in torch_tensors(tiny.weights).items()},
        src / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    run("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", tiny.weights)


class Evil:
    """Unpickled, it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("how", ["zip", "pickle", "old"])
def test_pickles_with_code_are_refused(how, tiny_hf, tmp_path, refuse):
    tiny, victim = tiny_hf(), tmp_path / "victim"
    src = bin_folder(tmp_path / "src", tiny)
    state = torch_tensors(tiny.weights) | {"evil": Evil(victim)}
    file = src / "pytorch_model.bin"
    if how == "pickle":
        file.write_bytes(pickle.dumps({"evil": Evil(victim)}, protocol=2))
    else:
        torch.save(state, file, _use_new_zipfile_serialization=how == "zip")
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert not victim.exists()
    assert "pytorch_model.bin: refused" in line
    assert f"{os.mkdir.__module__}.mkdir" in line


def test_pytorch_bin_lists_all_that_is_wrong(tiny_hf, tmp_path, refuse):
    tiny = tiny_hf()
    tensors = torch_tensors(tiny.weights)
    del tensors["model.norm.weight"], tensors["lm_head.weight"]
    tensors["extra"] = torch.zeros(2)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 3)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    src = bin_folder(tmp_path / "src", tiny, tensors)
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "dst", "--dtype", "float32")
    for text in (
        *("2 missing: ", "model.norm.weight", "lm_head.weight", "extra"),
        *("found (2, 3), want (96, 64)", f"{name} (int8)"),
    ):
        assert text in line


def damage(src: Path, kind: str) -> None:
    """Spoil a sharded folder of pickles."""
    index = src / "pytorch_model.bin.index.json"
    first, second = sorted(src.glob("*.bin"))
    places = json.loads(index.read_text())["weight_map"]
    some = next(iter(places))
    if kind == "truncated":
        first.write_bytes(first.read_bytes()[:5000])
    elif kind == "empty":
        first.write_bytes(b"")
    elif kind == "pointer":
        first.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    elif kind == "missing":
        second.unlink()
    elif kind == "outside":
        second.rename(src.parent / second.name)
        moved = {n: f"../{f}" if f == second.name else f for n, f in places.items()}
        write_json(index, {"weight_map": moved})
    elif kind == "misplaced":
        write_json(index, {"weight_map": places | {some: second.name}})
    elif kind == "both":
        first.rename(src / "pytorch_model.bin")
    elif kind == "index":
        write_json(index, {"weight_map": [1]})
    elif kind == "nested":
        torch.save({"state_dict": torch.load(first)}, first)
    elif kind == "list":
        torch.save([torch.zeros(1)], first)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", r"-00001-of-00002.bin cannot be read as PyTorch weights: dam"),
        ("empty", r"-00001-of-00002.bin is empty"),
        ("pointer", r"git lfs pull"),
        ("missing", r"'pytorch_model-00002-of-00002.bin' is missing"),
        ("outside", r"'../pytorch_model-00002-of-00002.bin' leads out of the folder"),
        ("misplaced", r"listed in \S+-00002-of-00002.bin, found in \S+-00001-of-00002"),
        ("both", r"remove the stale one"),
        ("index", r"weight_map must map tensor names to file names"),
        ("nested", r"state_dict \(dict\); save the model's state_dict"),
        ("list", r"holds a list, want a dictionary of tensors"),
    ],
)
def test_damaged_pytorch_bin(kind, message, tiny_hf, tmp_path, refuse):
    src = bin_folder(tmp_path / "src", tiny_hf(), shards=True)
    damage(src, kind)
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert re.search(message, line), line


def test_casts_round_once_and_never_overflow(tiny_hf, tmp_path, run, refuse):
    tiny = tiny_hf()
    tensors = {n: t.double() for n, t in torch_tensors(tiny.weights).items()}
    src = bin_folder(tmp_path / "src", tiny, tensors)
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert "model.embed_tokens.weight (float64)" in line
    run("pytorch_bin_to_hf", src, tmp_path / "dst", "--dtype", "bfloat16")
    assert_holds(tmp_path / "dst", bfloat16(tiny.weights))
    tensors["model.norm.weight"][3] = 1e6
    src = bin_folder(tmp_path / "large", tiny, tensors)
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "no", "--dtype", "float16")
    assert "model.norm.weight: 1000000.0 is too large for float16" in line


def test_torch_is_named_when_absent(tiny_hf, tmp_path, refuse, monkeypatch):
    src = bin_folder(tmp_path / "src", tiny_hf())
    monkeypatch.setitem(sys.modules, "torch", None)
    line = refuse("pytorch_bin_to_hf", src, tmp_path / "dst")
    assert "needs the package torch: pip install torch" in line
