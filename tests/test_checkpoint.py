"""Folders in and out: bit-equal, bounded in memory, whole or not at all, or refused."""

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from jrope.checkpoint import (
    Tensors,
    load,
    open_tensors,
    read_config,
    save,
    write_folder,
)
from jrope.config import flatten, nest, parameter_shapes
from jrope.errors import JropeError
from jrope.hf import config_from_hf

BF16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": BF16}
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


def set_index(folder: Path, edit: Callable[[dict[str, str]], Any]) -> None:
    path = folder / INDEX
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def set_header(path: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Edit a file's header and leave its data."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(edit(header) or header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


# Loading


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_reads_what_transformers_wrote(
    made: dict[str, Path], tiny: Any, kind: str
) -> None:
    params, config = load(made[kind])
    assert_same_tensors(flatten(params), tiny.weights)
    assert {n: a.shape for n, a in tiny.weights.items()} == parameter_shapes(config)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert len(list(made["sharded"].glob("*.safetensors"))) > 3


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, BF16], ids=repr)
def test_casts_to_any_spelling_of_a_dtype(folder: Path, tiny: Any, dtype: Any) -> None:
    params = flatten(load(folder, dtype)[0])
    want = {name: array.astype(BF16) for name, array in tiny.weights.items()}
    assert_same_tensors(params, want)


@pytest.mark.parametrize(
    "dtype", ["float64", "int8", "nonsense", jnp.int32, 7], ids=str
)
def test_other_dtypes_are_refused(folder: Path, dtype: Any) -> None:
    with pytest.raises(JropeError, match="want None or one of float32, float16, bf"):
        load(folder, dtype)


def test_a_cast_that_overflows_is_refused(folder: Path) -> None:
    change(folder, lambda t: t.update({KEY: t[KEY] * np.float32(1e8)}))
    load(folder, "bfloat16")
    with pytest.raises(JropeError, match=f"{KEY}: .* too large for float16"):
        load(folder, "float16")


def test_nan_and_infinity_pass(folder: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        tensors[KEY] = tensors[KEY].copy()
        tensors[KEY][0, :2] = np.nan, np.inf

    change(folder, spoil)
    for dtype in (None, "float16", "bfloat16"):
        row = np.asarray(flatten(load(folder, dtype)[0])[KEY][0, :2], np.float32)
        assert np.isnan(row[0]) and np.isposinf(row[1])


def test_frequency_tables_are_ignored(folder: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(folder, lambda t: t.update({name: np.zeros(8, np.float16)}))
    assert name not in flatten(load(folder)[0])


def test_a_head_that_repeats_a_tied_embedding_is_accepted(
    tiny_hf: Callable[..., Any], tmp_path: Path
) -> None:
    tied = tiny_hf(tied=True)
    tied.model.save_pretrained(tmp_path)
    table = tied.weights["model.embed_tokens.weight"]
    assert "lm_head" not in load(tmp_path)[0]
    change(tmp_path, lambda t: t.update({"lm_head.weight": table}))
    assert "lm_head" not in load(tmp_path)[0]
    change(tmp_path, lambda t: t.update({"lm_head.weight": np.nextafter(table, 9)}))
    with pytest.raises(JropeError, match=r"tie_word_embeddings is true but lm_head"):
        load(tmp_path)


def test_generation_config_decides_the_stop_ids(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text('{"eos_token_id": [5, 7]}')
    assert load(folder)[1].eos_token_id == (5, 7)
    path.write_text('{"eos_token_id": null}')
    assert load(folder)[1].eos_token_id == (2,)
    path.write_text("[1]")
    with pytest.raises(JropeError, match=r"generation_config.json holds a JSON list"):
        load(folder)


def test_progress_counts_every_tensor(folder: Path, tmp_path: Path, tiny: Any) -> None:
    sizes = {name: array.nbytes for name, array in tiny.weights.items()}
    for act in (
        lambda call: load(folder, progress=call),
        lambda call: save(tmp_path / "out", *load(folder), progress=call),
    ):
        seen: list[tuple[str, int]] = []
        act(lambda name, size, seen=seen: seen.append((name, size)))
        assert sorted(seen) == sorted(sizes.items())


def test_tensors_are_read_one_by_one(sharded: Path, tiny: Any) -> None:
    tensors = open_tensors(sharded)
    assert set(tensors.names) == set(tiny.weights)
    assert tensors.shapes[KEY] == (32, 64) and tensors.dtypes[KEY] == "F32"
    for path in sharded.glob("*.safetensors"):  # only one file's data is touched
        if path != tensors.slots[KEY].path:
            path.unlink()
    assert np.array_equal(tensors.read(KEY), tiny.weights[KEY])
    tensors.slots[KEY].path.write_bytes(b"")
    with pytest.raises(JropeError, match="became shorter while it was read"):
        tensors.read(KEY)


def test_reading_ahead_of_an_accelerator_changes_nothing(
    sharded: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    told: list[str] = []
    params, _ = load(sharded, progress=lambda name, _: told.append(name))
    assert_same_tensors(flatten(params), tiny.weights)
    assert sorted(told) == sorted(flatten(params))


def test_reading_ahead_tells_of_a_file_that_shrinks(
    sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")

    def shrink(*_: object) -> None:
        for path in sharded.glob("*.safetensors"):
            path.write_bytes(b"")

    with pytest.raises(JropeError, match="became shorter while it was read"):
        load(sharded, progress=shrink)


# The hub


def test_hub_ids_are_downloaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **kwargs: Any) -> str:
        asked.update(repo=repo, **kwargs)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    params, _ = load("owner/name", revision="v1")
    assert KEY in flatten(params)
    assert (asked["repo"], asked["revision"]) == ("owner/name", "v1")
    assert not any("bin" in pattern for pattern in asked["allow_patterns"])


def test_a_hub_that_does_not_answer_is_one_clear_error() -> None:
    with pytest.raises(JropeError, match=r"no folder 'owner/name'.*hub.*v9"):
        load("owner/name", revision="v9")  # the tests run with HF_HUB_OFFLINE


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "../x"])
def test_paths_that_do_not_exist(name: str) -> None:
    with pytest.raises(JropeError, match=r"no folder .* is not a hub id"):
        load(name)


def test_a_file_or_a_revision_of_a_folder(folder: Path) -> None:
    with pytest.raises(JropeError, match=r"model.safetensors is a file; give the fol"):
        load(folder / SINGLE)
    with pytest.raises(JropeError, match="revision is for hub ids"):
        load(folder, revision="main")


def test_the_hub_cache_links_to_its_blobs(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "hub" / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        shutil.copy(path, blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-{path.name}")
    assert KEY in flatten(load(snapshot)[0])
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(folder / SINGLE)
    with pytest.raises(JropeError, match="leads out of the folder"):
        load(snapshot)


# Damaged and foreign folders


def truncate(folder: Path, size: int) -> None:
    os.truncate(folder / SINGLE, size)


def foreign(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / SINGLE).rename(folder / name) and None


def data(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / SINGLE).write_bytes(content) and None


def drop(*names: str) -> Callable[[Path], None]:
    return lambda f: change(f, lambda t: [t.pop(name) for name in names])


def put(**tensors: np.ndarray) -> Callable[[Path], None]:
    return lambda f: change(f, lambda t: t.update(tensors))


def entry(**fields: Any) -> Callable[[Path], None]:
    return lambda f: set_header(f / SINGLE, lambda h: h[KEY].update(fields))


ODD = np.zeros((3, 3), np.float32)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (drop(KEY), rf"1 missing: {KEY}"),
    "several missing": (
        lambda f: change(f, lambda t: [t.pop(n) for n in [*t] if "layers.1" in n]),
        r"12 tensors, config.json asks for 21; 9 missing: .*\.\.\. \(9 in all\)",
    ),
    "fewer layers": (lambda f: set_config(f, num_hidden_layers=3), "9 missing: .*s.2"),
    "more layers": (
        lambda f: set_config(f, num_hidden_layers=1),
        "9 unexpected: .*s.1",
    ),
    "unexpected": (put(foo=ODD), "1 unexpected: foo"),
    "wrong shape": (put(**{KEY: ODD}), rf"{KEY} \(found \(3, 3\), want \(32, 64\)\)"),
    "integers": (put(**{KEY: np.zeros((32, 64), np.int8)}), rf"{KEY} \(I8\)"),
    "float64": (put(**{KEY: np.zeros((32, 64))}), rf"is not float32, .*{KEY} \(F64\)"),
    "no head": (drop("lm_head.weight"), "tie_word_embeddings is false, so lm_head"),
    "bias": (
        put(**{"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}),
        "q_proj.bias; attention_bias or mlp_bias is false",
    ),
    "fused": (put(**{"model.layers.0.self_attn.qkv_proj.weight": ODD}), "fused"),
    "quantized": (put(**{"model.layers.0.mlp.up_proj.qweight": ODD}), "dequantize"),
    "adapter": (put(**{"a.lora_A.weight": ODD}), "merge the adapter"),
    "base model": (put(**{"layers.0.mlp.up_proj.weight": ODD}), "names lack 'model.'"),
    "everything": (
        lambda f: (drop(KEY)(f), put(foo=ODD)(f)),
        "1 missing: .*1 unexpected: foo",
    ),
    "truncated": (lambda f: truncate(f, 5000), r"model.safetensors is truncated: its"),
    "header cut": (lambda f: truncate(f, 100), r"model.safetensors is truncated: its"),
    "seven bytes": (lambda f: truncate(f, 7), "its header is garbage"),
    "empty": (data(b""), "model.safetensors is empty"),
    "pointer": (data(POINTER), "model.safetensors is a git-lfs pointer; run 'git lfs"),
    "garbage": (data(bytes(range(1, 200))), "its header is garbage"),
    "huge header": (data(b"\xff" * 7 + b"\x00{}"), "its header is garbage"),
    "zip": (data(b"PK\x03\x04" + bytes(99)), "zip or PyTorch pickle.*pytorch_bin_to"),
    "pickle": (data(b"\x80\x02}q\x00." + bytes(99)), "is a pickle.*pytorch_bin_to_hf"),
    "gguf inside": (data(b"GGUF" + bytes(99)), "is GGUF.*gguf_to_hf.py"),
    "not json": (
        data(struct.pack("<Q", 4) + b"{abc"),
        "header of .* is not valid JSON",
    ),
    "twice": (
        data(struct.pack("<Q", 13) + b'{"a":1,"a":1}'),
        "header of .* gives a twice",
    ),
    "no dtype": (lambda f: set_header(f / SINGLE, lambda h: {"x": {}}), "entry for x"),
    "no object": (lambda f: set_header(f / SINGLE, lambda h: {"x": 3}), "entry for x"),
    "negative": (entry(shape=[-32, -64]), f"entry for {KEY} is garbage"),
    "odd shape": (entry(shape=[32, 63]), f"{KEY} has 8192 bytes, want 8064 for F32"),
    "backwards": (entry(data_offsets=[8, 0]), f"entry for {KEY} is garbage"),
    "overlap": (entry(data_offsets=[0, 8192]), "overlaps .*; the file is damaged"),
    "gap": (
        lambda f: set_header(f / SINGLE, lambda h: h.pop(KEY) and None),
        "leaves a gap after",
    ),
    "tail": (
        lambda f: (f / SINGLE).write_bytes((f / SINGLE).read_bytes() + b"123"),
        "3 bytes follow the last tensor",
    ),
    "no weights": (lambda f: (f / SINGLE).unlink(), "no model.safetensors in "),
    "bin": (foreign("pytorch_model.bin"), "only pytorch_model.bin.*pytorch_bin_to_hf"),
    "pth": (foreign("consolidated.00.pth"), "only consolidated.00.pth.*meta_to_hf.py"),
    "gguf": (foreign("model.gguf"), "only model.gguf.*convert/gguf_to_hf.py"),
    "flax": (foreign("flax_model.msgpack"), "flax_msgpack_to_hf.py"),
    "variant": (foreign("model.fp16.safetensors"), "only model.fp16.safetensors; want"),
    "link out": (
        lambda f: (
            shutil.move(f / SINGLE, f.parent / "elsewhere"),
            (f / SINGLE).symlink_to(f.parent / "elsewhere"),
        ),
        "'model.safetensors' leads out of the folder",
    ),
    "dead link": (
        lambda f: ((f / SINGLE).unlink(), (f / SINGLE).symlink_to("nothing")),
        "'model.safetensors' is missing",
    ),
    "stale index": (
        lambda f: (f / INDEX).write_text("{}"),
        "has both model.safetensors and .*index.json; remove the stale one",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json in .*model$"),
    "gguf alone": (
        lambda f: (foreign("m.gguf")(f), (f / "config.json").unlink()),
        "no config.json in .*, only m.gguf; convert it with convert/gguf_to_hf.py",
    ),
    "config no json": (
        lambda f: (f / "config.json").write_text("{'a': 1}"),
        "config.json is not valid JSON: .*line 1 column 2",
    ),
    "config list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json holds a JSON list, want an object",
    ),
    "config twice": (
        lambda f: (f / "config.json").write_text('{"vocab_size": 1, "vocab_size": 2}'),
        "config.json gives vocab_size twice",
    ),
    "config binary": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe\xfd"),
        "config.json is not valid JSON",
    ),
    "config unknown": (
        lambda f: set_config(f, foo=1),
        "model/config.json: unknown 'foo'",
    ),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_folder(folder: Path, case: str) -> None:
    spoil, message = BAD_FOLDERS[case]
    spoil(folder)
    with pytest.raises(JropeError, match=message):
        load(folder)


FIRST = "model-00001-of-"
BAD_INDEXES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "lacks": (
        lambda f: set_index(f, lambda m: m.update(extra=next(iter(m.values())))),
        "lacks extra, which model.safetensors.index.json lists there",
    ),
    "unlisted": (lambda f: set_index(f, lambda m: m.pop(KEY)), "holds .*lists nowhere"),
    "twice": (
        lambda f: set_index(f, lambda m: m.update({KEY: other(m)})),
        f"holds {KEY}, which .* lists in model-0",
    ),
    "absolute": (
        lambda f: set_index(f, lambda m: m.update(x="/etc/passwd")),
        "'/etc/passwd' leads out of the folder",
    ),
    "upwards": (
        lambda f: set_index(f, lambda m: m.update(x="../x.safetensors")),
        "'../x.safetensors' leads out of the folder",
    ),
    "link": (
        lambda f: (
            (f / "x.safetensors").symlink_to("/etc/passwd"),
            set_index(f, lambda m: m.update(x="x.safetensors")),
        ),
        "'x.safetensors' leads out of the folder, to /etc/passwd",
    ),
    "missing shard": (
        lambda f: next(iter(f.glob(f"{FIRST}*"))).unlink(),
        f"index.json: '{FIRST}.*' is missing",
    ),
    "truncated shard": (
        lambda f: os.truncate(next(iter(f.glob(f"{FIRST}*"))), 3000),
        f"{FIRST}.* is truncated",
    ),
    "no map": (lambda f: (f / INDEX).write_text("{}"), "weight_map must map tensor"),
    "map list": (
        lambda f: (f / INDEX).write_text('{"weight_map": ["a"]}'),
        "weight_map must map tensor",
    ),
    "map numbers": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": 1}}'),
        "weight_map must map tensor",
    ),
    "not json": (lambda f: (f / INDEX).write_text("{"), "index.json is not valid JSON"),
    "no index": (lambda f: (f / INDEX).unlink(), "want model.safetensors, or shards"),
}


def other(places: dict[str, str]) -> str:
    return next(file for file in places.values() if file != places[KEY])


@pytest.mark.parametrize("case", BAD_INDEXES)
def test_bad_index(sharded: Path, case: str) -> None:
    spoil, message = BAD_INDEXES[case]
    spoil(sharded)
    with pytest.raises(JropeError, match=message):
        load(sharded)


def test_nothing_is_read_before_the_headers_agree(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jrope.safetensors_read._pieces", pytest.fail)
    set_config(folder, num_hidden_layers=1)
    with pytest.raises(JropeError, match="unexpected"):
        load(folder)


# Saving


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


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", ".git", "x.bin"])
def test_foreign_files_are_not_lost(folder: Path, name: str) -> None:
    (folder / name).write_text("precious")
    with pytest.raises(JropeError, match=f"holds .*{name}.*would be lost"):
        save(folder, *load(folder))
    assert (folder / name).read_text() == "precious"


def test_a_folder_of_weights_without_config_is_not_ours(folder: Path) -> None:
    params, config = load(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").unlink()
    with pytest.raises(JropeError, match=r"holds model.safetensors, which would be"):
        save(folder, params, config)


def test_a_file_is_not_a_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JropeError, match="file is a file; give a folder's name"):
        save(tmp_path / "file", *load(folder))


def test_extra_files_even_of_the_folder_itself(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("words")
    extras = [p for p in folder.iterdir() if p.name not in ("config.json", SINGLE)]
    save(folder, *load(folder), extra_files=extras)
    assert (folder / "tokenizer.json").read_text() == "words"
    load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.json", "absent.json is not a file"),
        ("config.json", "would be written twice"),
        (SINGLE, "would be written twice"),
    ],
)
def test_bad_extra_files(folder: Path, tmp_path: Path, name: str, message: str) -> None:
    params, config = load(folder)
    with pytest.raises(JropeError, match=message):
        save(tmp_path / "out", params, config, extra_files=[folder / name])


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


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_rename_that_fails_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    params, config = load(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    before, count, replace = tensors_of(folder), 0, os.replace

    def flaky(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == failing:
            raise OSError("disk on fire")
        replace(*args)

    monkeypatch.setattr(os, "replace", flaky)
    with pytest.raises(OSError, match="disk on fire"):
        save(folder, jax.tree.map(lambda leaf: leaf + 1, params), config)
    assert_same_tensors(tensors_of(folder), before)
    load(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


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


# Memory

MEMORY = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jrope.checkpoint import load, save

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(key)) * 1024

jnp.zeros(8).block_until_ready()
load(sys.argv[3])  # libraries and code, once
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
params, config = load(sys.argv[1], sys.argv[2] or None)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(status("VmHWM") - before - size)
before = status("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
save(sys.argv[1] + "-out", params, config)
print(status("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def big(
    made: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A checkpoint of 300 MB in bfloat16, most of it one tensor."""
    sizes = {"vocab_size": 120_000, "hidden_size": 768, "intermediate_size": 12_000}
    config = {**read_config(made["single"]), **sizes, "tie_word_embeddings": True}
    shapes = parameter_shapes(config_from_hf(config))
    stream = ((name, np.full(shape, 0.5, BF16)) for name, shape in shapes.items())
    folder = tmp_path_factory.mktemp("big") / "model"
    yield write_folder(folder, config, stream)
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("dtype", ["", "float32"], ids=["kept", "cast"])
def test_host_memory_stays_bounded(
    big: Path, made: dict[str, Path], dtype: str
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", MEMORY, str(big), dtype, str(made["single"])],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    loading, saving = map(int, result.stdout.split())
    print(f"beyond the arrays: load {loading >> 20} MiB, save {saving >> 20} MiB")
    assert loading < 64 * 2**20  # JAX on a CPU takes the array as it was read
    assert saving < 64 * 2**20


def test_a_copied_host_buffer_is_dropped_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    buffers: list[weakref.ref[np.ndarray]] = []
    read = Tensors.read

    def misaligned(self: Tensors, *args: Any) -> np.ndarray:
        assert not any(buffer() is not None for buffer in buffers)
        array = read(self, *args)
        memory = np.empty(array.nbytes + 65, np.uint8)
        start = -memory.ctypes.data % 64 + 1  # no backend can take this over
        copy = memory[start : start + array.nbytes].view(array.dtype)
        copy[:] = array.reshape(-1)
        buffers.append(weakref.ref(memory))
        return copy.reshape(array.shape)

    monkeypatch.setattr(Tensors, "read", misaligned)
    load(folder)
    assert len(buffers) == 21
