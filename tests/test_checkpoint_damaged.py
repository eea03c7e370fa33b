"""Damaged and foreign folders are refused, and the message says why."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from checkpoint_helpers import INDEX, KEY, SINGLE, change, set_config
from checkpoint_helpers import folder as folder
from checkpoint_helpers import made as made
from checkpoint_helpers import sharded as sharded
from checkpoint_helpers import tiny as tiny
from flax.serialization import msgpack_serialize

from jrope.errors import JropeError
from jrope.hf.checkpoint import load, open_tensors


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
    "no head": (
        drop("lm_head.weight"),
        "1 missing: lm_head.weight; tie_word_embeddings is false, .* fit true",
    ),
    "bias": (
        put(**{"model.layers.0.self_attn.q_proj.bias": np.zeros(64, np.float32)}),
        "q_proj.bias; attention_bias or mlp_bias is false",
    ),
    "fused": (put(**{"model.layers.0.self_attn.qkv_proj.weight": ODD}), "fused"),
    "quantized": (put(**{"model.layers.0.mlp.up_proj.qweight": ODD}), "dequantize"),
    "adapter": (put(**{"a.lora_A.weight": ODD}), "give its folder as adapter="),
    "base model": (put(**{"layers.0.mlp.up_proj.weight": ODD}), "names lack 'model.'"),
    "everything": (
        lambda f: (drop(KEY)(f), put(foo=ODD)(f)),
        "1 missing: .*1 unexpected: foo",
    ),
    "truncated": (lambda f: truncate(f, 5000), r"model.safetensors is truncated: its"),
    "header cut": (lambda f: truncate(f, 100), r"model.safetensors is truncated: its"),
    "seven bytes": (lambda f: truncate(f, 7), "not a safetensors file, which begins"),
    "empty": (data(b""), "model.safetensors is empty"),
    "pointer": (data(POINTER), "model.safetensors is a git-lfs pointer; run 'git lfs"),
    "garbage": (data(bytes(range(1, 200))), "model.safetensors is not a safetensors"),
    "huge header": (data(b"\xff" * 7 + b"\x00{}"), "is not a safetensors file"),
    "html": (data(b"\n<!DOCTYPE html><html>" + bytes(99)), "is a page of HTML or XML"),
    "json": (data(b'{"error": "Entry not found"}'), "is JSON, not weights; download"),
    "gzip": (data(b"\x1f\x8b\x08" + bytes(range(1, 99))), "is compressed, .*unpack it"),
    "hdf5": (data(b"\x89HDF\r\n\x1a\n" + bytes(99)), "is HDF5.*nothing here reads it"),
    "ggml": (data(b"lmgg" + bytes(range(1, 99))), "is GGML, which came before GGUF"),
    "flax inside": (
        lambda f: data(msgpack_serialize({"params": {"a": ODD}}))(f),
        "is msgpack, such as Flax writes.*convert/flax_msgpack_to_hf.py",
    ),
    "many in flax": (
        data(msgpack_serialize({f"x{i}": ODD for i in range(20)})),
        "is msgpack, such as Flax writes",
    ),
    "easylm": (
        data(msgpack.packb((("params", "lm_head", "kernel"), msgpack_serialize(ODD)))),
        "is a msgpack stream, such as EasyLM writes",
    ),
    "later pickle": (
        data(b"\x80\x04\x95" + bytes(range(1, 99))),
        "is a pickle.*bin_",
    ),
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
    "stream": (
        foreign("streaming_params_7b"),
        "only streaming_params_7b; EasyLM wrote it",
    ),
    "adapter alone": (
        foreign("adapter_model.safetensors"),
        "only adapter_model.safetensors; give its folder as adapter=, beside",
    ),
    "meta's names": (
        foreign("consolidated.safetensors"),
        "only consolidated.safetensors; its tensors have Meta's names",
    ),
    "old ggml": (foreign("ggml-model-q4_0.bin"), "only ggml-.*; GGML came before GGUF"),
    "variant": (foreign("model.fp16.safetensors"), "only model.fp16.safetensors; want"),
    "link out": (
        lambda f: (
            shutil.move(f / SINGLE, f.parent / "elsewhere"),
            (f / SINGLE).symlink_to(f.parent / "elsewhere"),
        ),
        "'model.safetensors' leads out of the folder, to .*elsewhere; put the file "
        "itself there .a copy or a hard link., or give the folder that holds it",
    ),
    "dead link": (
        lambda f: ((f / SINGLE).unlink(), (f / SINGLE).symlink_to("nothing")),
        "'model.safetensors' is missing: it is a link to .*/nothing, which is not",
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


def test_a_header_whose_length_looks_like_a_pickle(folder: Path) -> None:
    """640 bytes are 80 02 in the file, as a pickle of protocol 2 begins."""
    header = {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}
    text = json.dumps(header).ljust(640).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", 640) + text + bytes(12))
    assert open_tensors(folder).shapes == {"a": (3,)}


def test_nothing_is_read_before_the_headers_agree(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jrope.hf.tensors._pieces", pytest.fail)
    set_config(folder, num_hidden_layers=1)
    with pytest.raises(JropeError, match="unexpected"):
        load(folder)
