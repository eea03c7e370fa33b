"""Saving: bit-equal for every reader, whole or not at all."""

# ruff: noqa: F402 (a test's own `folder`)

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_helpers import (
    BF16,
    INDEX,
    KEY,
    SINGLE,
    assert_same_tensors,
    set_config,
    tensors_of,
)
from checkpoint_helpers import folder as folder
from checkpoint_helpers import made as made
from checkpoint_helpers import sharded as sharded
from checkpoint_helpers import tiny as tiny

from jrope.errors import JropeError
from jrope.hf import config_from_hf
from jrope.hf.checkpoint import load, open_tensors, read_config, save, write_folder
from jrope.hf.shards import most_bytes
from jrope.model.config import parameter_shapes
from jrope.tree import flatten, nest

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": BF16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard", [5 * 2**30, 20_000], ids=["single", "sharded"])
def test_round_trip_is_bit_equal(
    folder: Path, tmp_path: Path, dtype: str, shard: int
) -> None:
    original = {name: a.astype(DTYPES[dtype]) for name, a in tensors_of(folder).items()}
    config = read_config(folder)
    first = write_folder(tmp_path / "a", config, original.items())
    assert_same_tensors(tensors_of(first), original)
    params, llama = load(first)
    assert_same_tensors(flatten(params), original)
    second = save(tmp_path / "b", params, llama, max_shard_size=shard)
    assert_same_tensors(tensors_of(second), original)
    again, same = load(second)
    assert same == llama
    assert_same_tensors(flatten(again), original)
    files = sorted(path.name for path in second.glob("*.safetensors"))
    assert (files == [SINGLE]) is (shard > 20_000)
    if files != [SINGLE]:
        index = json.loads((second / INDEX).read_text())
        total = sum(array.nbytes for array in original.values())
        assert index["metadata"]["total_size"] == total
        assert sorted(set(index["weight_map"].values())) == files
        assert files[0] == f"model-00001-of-{len(files):05}.safetensors"


@pytest.mark.parametrize("rope", ["default", "llama3", "condensed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_gives_the_same_logits(
    tiny_hf: Callable[..., Any], tmp_path: Path, rope: str, dtype: str
) -> None:
    import torch
    from transformers import LlamaForCausalLM

    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    parameters: dict[str, Any] = {
        "default": None,
        "llama3": {
            "rope_type": "llama3",
            "original_max_position_embeddings": 16,
            **llama3,
        },
        "condensed": {"rope_type": "linear", "factor": 4.0},
    }
    made = tiny_hf(rope_parameters=parameters[rope], bias=True).model
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    made.to(getattr(torch, dtype)).save_pretrained(theirs)  # rounds its tables too
    save(ours, *load(theirs), max_shard_size=50_000)
    logits: list[Any] = []
    for folder in (theirs, ours):
        model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert model.dtype == getattr(torch, dtype)
        with torch.no_grad():
            logits.append(model(torch.arange(60)[None]).logits)
    assert torch.equal(*logits)


def test_mixed_dtypes_stay_aligned_for_other_readers(
    folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    original = tensors_of(folder)
    for name in original:
        if "layers.0" in name or name == "model.norm.weight":  # an odd count of 2 bytes
            original[name] = original[name].astype(BF16)
    set_config(folder, vocab_size=61, hidden_size=63, head_dim=16)
    odd = {
        name: np.resize(original[name], shape).astype(original[name].dtype)
        for name, shape in parameter_shapes(config_from_hf(read_config(folder))).items()
    }
    out = write_folder(tmp_path / "out", read_config(folder), odd.items())
    params, config = load(out)
    assert_same_tensors(flatten(params), odd)
    header = open_tensors(out)
    for slot in header.slots.values():
        assert slot.start % (4 if slot.dtype == "F32" else 2) == 0
    assert len(load_file(out / SINGLE)) == len(odd)
    assert read_config(save(tmp_path / "two", params, config))["dtype"] == "float32"


def test_save_names_all_that_is_wrong(folder: Path, tmp_path: Path) -> None:
    params, config = load(folder)
    flat = flatten(params)
    shape = flat[KEY].shape
    del flat["model.norm.weight"]
    flat |= {"foo.weight": flat[KEY], KEY: flat[KEY].T}
    flat["lm_head.weight"] = flat["lm_head.weight"].astype(jnp.int8)
    with pytest.raises(JropeError) as error:
        save(tmp_path / "out", nest(flat), config)
    for part in (
        "1 missing: model.norm.weight",
        "1 unexpected: foo.weight",
        f"{KEY} (found {shape[::-1]}, want {shape})",
        "lm_head.weight (int8)",
    ):
        assert part in str(error.value)
    assert not list(tmp_path.glob("*out*"))


def test_write_folder_refuses_strange_streams(folder: Path, tmp_path: Path) -> None:
    config, tensors = read_config(folder), tensors_of(folder)
    out = tmp_path / "out"
    twice = [*tensors.items(), (KEY, tensors[KEY])]
    with pytest.raises(JropeError, match=f"{KEY} is given twice"):
        write_folder(out, config, twice)
    wide = {**tensors, KEY: tensors[KEY].astype(np.float64)}
    with pytest.raises(JropeError, match=f"{KEY}: dtype float64, want one of float32"):
        write_folder(out, config, wide.items())
    with pytest.raises(JropeError, match="21 missing"):
        write_folder(out, config, [])
    with pytest.raises(JropeError, match="unknown 'foo'"):
        write_folder(out, {**config, "foo": 1}, tensors.items())
    with pytest.raises(JropeError, match="max_shard_size is 0"):
        write_folder(out, config, tensors.items(), max_shard_size=0)
    assert not list(tmp_path.glob("*out*"))


def test_arrays_of_any_memory_order_are_written(folder: Path, tmp_path: Path) -> None:
    tensors = tensors_of(folder)
    config = read_config(folder)
    turned = ((name, np.asfortranarray(array)) for name, array in tensors.items())
    out = write_folder(tmp_path / "out", config, turned)
    assert_same_tensors(tensors_of(out), tensors)


def test_write_folder_holds_one_tensor(folder: Path, tmp_path: Path) -> None:
    import weakref

    tensors, last = tensors_of(folder), lambda: None

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        nonlocal last
        for name, array in tensors.items():
            assert last() is None
            fresh = array.copy()
            last = weakref.ref(fresh)
            yield name, fresh
            del fresh

    write_folder(tmp_path / "out", read_config(folder), stream(), max_shard_size=20_000)


def test_a_previous_checkpoint_is_replaced_whole(sharded: Path, folder: Path) -> None:
    params, config = load(folder)
    changed = jax.tree.map(lambda leaf: leaf + 1, params)
    (sharded / "generation_config.json").unlink(missing_ok=True)
    save(sharded, changed, config)
    assert sorted(path.name for path in sharded.iterdir()) == ["config.json", SINGLE]
    assert_same_tensors(
        flatten(load(sharded)[0]), jax.tree.map(np.asarray, flatten(changed))
    )
    assert sorted(path.name for path in sharded.parent.iterdir()) == [
        "model",
        "sharded",
    ]


def test_an_empty_folder_and_missing_parents_are_filled(
    folder: Path, tmp_path: Path
) -> None:
    params, config = load(folder)
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert save(out, params, config) == out
        load(out)


def test_an_interrupted_stream_leaves_the_old_one(folder: Path) -> None:
    before, tensors = tensors_of(folder), tensors_of(folder)
    config = read_config(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)

    def stream() -> Iterator[tuple[str, np.ndarray]]:
        for i, (name, array) in enumerate(tensors.items()):
            if i == 10:
                raise KeyboardInterrupt
            yield name, array + 1

    with pytest.raises(KeyboardInterrupt):
        write_folder(folder, config, stream(), max_shard_size=20_000)
    assert_same_tensors(tensors_of(folder), before)
    load(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_too_little_space_is_found_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a stream at least two bytes an element are known, of `save` all bytes."""
    params, config = load(folder)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    extra = folder.parent / "tokenizer.json"
    extra.write_text("words")
    free, out, asked = 10**9, folder.parent / "out", list[Any]()
    monkeypatch.setattr(
        "jrope.hf.replacing.shutil.disk_usage",
        lambda path: asked.append(path) or SimpleNamespace(free=free),
    )
    free = 2 * size + 4
    with pytest.raises(JropeError, match=f"out: .* needs {2 * size + 5:,} bytes, "):
        save(out, params, config, extra_files=[extra])
    save(out, params, config)
    tensors, free = tensors_of(folder), size - 1
    with pytest.raises(JropeError, match=f"needs {size:,} bytes, {size - 1:,} bytes"):
        write_folder(folder.parent / "x", read_config(folder), tensors.items())
    assert asked and sorted(p.name for p in folder.parent.iterdir()) == [
        "model",
        "out",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shard", [10_000, 50_000, 10**9])
def test_bytes_at_the_worst_moment(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dtype: str,
    shard: int,
) -> None:
    """Measured before each file is removed; shards end at tensors, hence the slack."""
    tensors = {n: a.astype(DTYPES[dtype]) for n, a in tensors_of(folder).items()}
    remove, most = os.remove, 0

    def measure(path: Any) -> None:
        nonlocal most
        files = Path(path).parent.iterdir()
        most = max(most, sum(file.stat().st_size for file in files))
        remove(path)

    monkeypatch.setattr(os, "remove", measure)
    config, total = read_config(folder), sum(a.nbytes for a in tensors.values())
    write_folder(tmp_path / "out", config, tensors.items(), max_shard_size=shard)
    largest = max(array.nbytes for array in tensors.values())
    headers = 200 * len(tensors)
    assert abs(most - most_bytes(total, shard)) <= 2 * largest + headers


def test_files_are_on_the_disk_before_the_rename(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(handle: int) -> None:
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def spy_replace(source: Any, target: Any) -> None:
        events.append(f"to {os.path.basename(target)}")
        replace(source, target)

    params, config = load(folder)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    save(tmp_path / "out", params, config)
    rename = events.index("to out")
    assert {"config.json", SINGLE} <= {*events[:rename]}
    assert events[rename + 1 :] == [tmp_path.name]
