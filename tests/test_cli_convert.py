"""`jrope convert`: dtypes, shards and the rope, in a new folder."""

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cli_helpers import CONFIG, fail, make_weights, succeed
from cli_helpers import _no_compile_cache as _no_compile_cache
from cli_helpers import copy as copy
from cli_helpers import model as model

import jrope
import jrope.cli
from jrope.cli import common
from jrope.hf import config_from_hf
from jrope.hf.checkpoint import open_tensors


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    tensors = open_tensors(folder)
    return {name: tensors.read(name) for name in tensors.names}


def test_convert_casts_and_splits(capsys: Any, model: Path, tmp_path: Path):
    target = tmp_path / "new" / "folder"
    words = ("--dtype", "bfloat16", "--max-shard-size", "200kB")
    out, err = succeed(capsys, "convert", model, target, *words)
    assert out.startswith(f"wrote {target}: 12 tensors, ") and err == ""
    assert "bfloat16, 2 files, rope default; copied tokenizer.json, " in out
    assert len([*target.glob("*.safetensors")]) == 2
    for name, array in tensors_of(target).items():
        expected = make_weights()[name].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(array, expected, strict=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (target / name).read_bytes() == (model / name).read_bytes()
    written = json.loads((target / "config.json").read_text())
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"


def test_convert_names_the_rope_in_full(capsys: Any, copy: Path, tmp_path: Path):
    scaling = {"rope_type": "linear", "factor": 4.0}
    (copy / "config.json").write_text(json.dumps({**CONFIG, "rope_scaling": scaling}))
    out, _ = succeed(capsys, "convert", copy, tmp_path / "a")
    assert ", rope linear:factor=4; copied" in out
    words = ("--rope", "default", "--condense", "8")
    out, _ = succeed(capsys, "convert", copy, tmp_path / "b", *words)
    assert ", rope default of positions / 8; copied" in out


def test_convert_knows_before_it_writes_that_the_disk_is_full(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
):
    """As bfloat16 it would fit, as the float32 that will be written it does not."""
    free = sum(array.nbytes for array in make_weights().values()) * 3 // 2
    monkeypatch.setattr(
        "jrope.hf.replacing.shutil.disk_usage", lambda _: SimpleNamespace(free=free)
    )
    error = fail(capsys, "convert", model, tmp_path / "out")
    assert f"{free:,} bytes are free; make room" in error
    assert [*tmp_path.iterdir()] == []


def test_convert_keeps_what_it_is_not_told_to_change(
    capsys: Any, model: Path, tmp_path: Path
):
    succeed(capsys, "convert", model, tmp_path / "out")
    old, new = tensors_of(model), tensors_of(tmp_path / "out")
    assert [*old] == [*new] and all((old[name] == new[name]).all() for name in old)
    assert jrope.load(tmp_path / "out")[1] == jrope.load(model)[1]


@pytest.mark.parametrize(
    "words",
    ["--rope yarn:factor=4,original=32", "--condense 2", "--rope dynamic:2"],
)
def test_convert_exports_the_rope(capsys: Any, model: Path, tmp_path: Path, words: str):
    succeed(capsys, "convert", model, tmp_path / "out", *words.split())
    option, value = words.split()
    spec = value if option == "--rope" else f"condense:{value}"
    args = Namespace(rope=spec, condense=None)
    expected = common.apply_rope(config_from_hf(CONFIG), args)
    assert jrope.load(tmp_path / "out")[1].rope == expected.rope
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["rope_scaling"] and written["rope_parameters"]


def test_convert_replaces_only_when_told(capsys: Any, model: Path, copy: Path):
    before = (copy / "config.json").read_bytes()
    assert "is not empty; --force" in fail(capsys, "convert", model, copy)
    assert (copy / "config.json").read_bytes() == before
    (copy / "notes.txt").touch()
    assert "notes.txt" in fail(capsys, "convert", model, copy, "--force")
    (copy / "notes.txt").unlink()
    succeed(capsys, "convert", model, copy, "--force", "--dtype", "float16")
    assert {array.dtype.name for array in tensors_of(copy).values()} == {"float16"}


def test_convert_errors(capsys: Any, model: Path, copy: Path, tmp_path: Path):
    same = copy.parent / "." / copy.name
    assert "are the same folder" in fail(capsys, "convert", copy, same, "--force")
    words = ("convert", model, tmp_path / "out", "--rope", "yarn:4", "--condense", "2")
    assert "config.json has no field for it beside" in fail(capsys, *words)
    tensors = {**make_weights(), "model.layers.0.extra": np.zeros(1, np.float32)}
    from safetensors.numpy import save_file

    save_file(tensors, copy / "model.safetensors")
    error = fail(capsys, "convert", copy, tmp_path / "out")
    assert "1 unexpected: model.layers.0.extra" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "script"),
    [
        ("model.gguf", "gguf_to_hf.py"),
        ("consolidated.00.pth", "meta_to_hf.py"),
        ("pytorch_model.bin", "pytorch_bin_to_hf.py"),
        ("flax_model.msgpack", "flax_msgpack_to_hf.py"),
        ("streaming_params", "flax_msgpack_to_hf.py"),
    ],
)
@pytest.mark.parametrize("whole", ["file", "folder", "folder with config"])
def test_convert_names_the_script_for_other_formats(
    capsys: Any, tmp_path: Path, file: str, script: str, whole: str
):
    source = tmp_path / "source"
    source.mkdir()
    (source / file).touch()
    if whole == "folder with config":
        (source / "config.json").write_text(json.dumps(CONFIG))
    given = source / file if whole == "file" else source
    error = fail(capsys, "convert", given, tmp_path / "out")
    assert f"convert/{script}" in error and file in error
