"""Folders that transformers wrote, and ways to read and to edit them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

BF16 = np.dtype(ml_dtypes.bfloat16)
KEY = "model.layers.0.self_attn.k_proj.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def tiny(tiny_hf: Callable[..., Any]) -> Any:
    return tiny_hf()


@pytest.fixture(scope="module")
def made(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that transformers wrote: one file, and many."""
    root = tmp_path_factory.mktemp("made")
    tiny.model.save_pretrained(root / "single")
    tiny.model.save_pretrained(root / "sharded", max_shard_size="40KB")
    return {"single": root / "single", "sharded": root / "sharded"}


@pytest.fixture
def folder(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["single"], tmp_path / "model"))


@pytest.fixture
def sharded(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["sharded"], tmp_path / "sharded"))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor by the reference implementation, bfloat16 as ml_dtypes'."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        for name, value in safetensors.deserialize(data):
            dtype = {"F32": np.float32, "F16": np.float16, "BF16": BF16}[value["dtype"]]
            array = np.frombuffer(bytes(value["data"]), dtype)
            found[name] = array.reshape(value["shape"])
    return found


def assert_same_tensors(got: dict[str, Any], want: dict[str, np.ndarray]) -> None:
    assert set(got) == set(want)
    for name, array in want.items():
        mine = np.asarray(got[name])
        assert mine.dtype == array.dtype and mine.shape == array.shape
        assert mine.tobytes() == array.tobytes(), name


def change(folder: Path, edit: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Rewrite model.safetensors after `edit` changed its tensors in place."""
    tensors = tensors_of(folder)
    edit(tensors)
    safetensors.numpy.save_file(tensors, folder / SINGLE)


def set_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
