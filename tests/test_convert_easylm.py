"""flax_msgpack_to_hf: the streams that EasyLM writes (OpenLLaMA, LWM)."""

import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.serialization
import msgpack
import numpy as np
import pytest
from convert_helpers import _as_a_script as _as_a_script
from convert_helpers import assert_holds, assert_logits, bfloat16, write_json
from convert_helpers import refuse as refuse
from convert_helpers import run as run

import jrope
from jrope.hf.checkpoint import read_config

TOP = {
    "model.embed_tokens.weight": "wte/embedding",
    "model.norm.weight": "ln_f/kernel",
    "self_attn.q_proj": "attention/wq",
    "self_attn.k_proj": "attention/wk",
    "self_attn.v_proj": "attention/wv",
    "self_attn.o_proj": "attention/wo",
    "mlp.gate_proj": "feed_forward/w1",
    "mlp.down_proj": "feed_forward/w2",
    "mlp.up_proj": "feed_forward/w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


def easylm_arrays(
    weights: Mapping[str, np.ndarray], heads: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Hugging Face's tensors as EasyLM's FlaxLLaMAForCausalLM names and stores them."""
    arrays = {}
    for name, array in weights.items():
        if name == "lm_head.weight":
            arrays["lm_head/kernel"] = array.T
        elif name in TOP:
            arrays[f"transformer/{TOP[name]}"] = array
        else:
            _, _, layer, kind = name.removesuffix(".weight").split(".", 3)
            if kind in heads:  # channels r and r + R of a head become 2 r and 2 r + 1
                pairs = array.reshape(heads[kind], 2, -1, array.shape[1])
                array = pairs.swapaxes(1, 2).reshape(array.shape)
            arrays[f"transformer/h/{layer}/{TOP[kind]}/kernel"] = array.T
    return arrays


def stacked(arrays: Mapping[str, np.ndarray], axis: int) -> dict[str, np.ndarray]:
    """The same arrays with all layers in one, as flax's scan over layers has them."""
    layers: dict[str, list[np.ndarray]] = {}
    for name, array in arrays.items():
        parts = name.split("/")
        if parts[:2] == ["transformer", "h"]:
            parts[2] = "scan_decoder"
        layers.setdefault("/".join(parts), []).append(array)
    return {
        name: np.stack(group, axis) if "scan_decoder" in name else group[0]
        for name, group in layers.items()
    }


def packed(array: np.ndarray) -> bytes:
    """An array in flax's msgpack: extension 1, shape, dtype and data inside."""
    inner = msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
    return msgpack.packb(msgpack.ExtType(1, inner))


def record(name: str, content: object) -> bytes:
    return msgpack.packb((tuple(name.split("/")), content))


def easylm_file(
    folder: Path,
    tiny: Any,
    weights: Mapping[str, np.ndarray] | None = None,
    *,
    axis: int | None = None,
    prefix: str = "params/",
    pack: Any = packed,
    **config: Any,
) -> Path:
    """streaming_params as EasyLM writes it, and the config.json that it lacks."""
    folder.mkdir()
    write_json(folder / "config.json", tiny.config | config)
    heads = {
        "self_attn.q_proj": tiny.config["num_attention_heads"],
        "self_attn.k_proj": tiny.config["num_key_value_heads"],
    }
    arrays = easylm_arrays(tiny.weights if weights is None else weights, heads)
    if axis is not None:
        arrays = stacked(arrays, axis)
    records = [record(prefix + name, pack(array)) for name, array in arrays.items()]
    (folder / "streaming_params").write_bytes(b"".join(records))
    return folder / "streaming_params"


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_easylm_stream(kv_heads, axis, tiny_hf, tmp_path, run):
    tiny = tiny_hf(kv_heads=kv_heads, layers=3)
    src = easylm_file(tmp_path / "src", tiny, axis=axis)
    (src.parent / "tokenizer.model").write_bytes(b"\n")
    out = run("flax_msgpack_to_hf", src, tmp_path / "dst")
    assert "note: rope_theta 10000 of config.json: the arrays hold none" in out
    assert_holds(tmp_path / "dst", tiny.weights)
    assert_logits(tmp_path / "dst", tiny.model)
    assert (tmp_path / "dst" / "tokenizer.model").exists()


def test_easylm_in_bfloat16_chunks_and_with_another_theta(
    tiny_hf, tmp_path, run, monkeypatch
):
    tiny = tiny_hf(rope_parameters={"rope_theta": 1e6})
    weights = bfloat16(tiny.weights)
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", 5000)
    src = easylm_file(tmp_path / "src", tiny, weights, pack=flax.serialization.to_bytes)
    assert b"__msgpack_chunked_array__" in src.read_bytes()
    run("flax_msgpack_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", weights)
    for choice, theta in ({"config": 1e6, "flax": 1e4}).items():
        run("flax_msgpack_to_hf", src, tmp_path / choice, "--rope", choice)
        config = jrope.hf.config_from_hf(read_config(tmp_path / choice))
        assert config.rope.theta == theta


def test_easylms_train_state_and_tied_tree(tiny_hf, tmp_path, run):
    tiny = tiny_hf(tied=True)
    src = easylm_file(tmp_path / "src", tiny, prefix="params/params/")
    step = flax.serialization.to_bytes(np.int32(7))
    more = record("step", step) + record("opt_state/0/count", packed(np.ones(3)))
    src.write_bytes(more + src.read_bytes())
    run("flax_msgpack_to_hf", src, tmp_path / "dst")
    assert_holds(tmp_path / "dst", tiny.weights)
    tree = {"/".join(names): value for names, value in stream(src)}
    flat = {tuple(n.split("/")[2:]): v for n, v in tree.items() if "params" in n}
    nested = flax.traverse_util.unflatten_dict(flat)
    (src.parent / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(nested))
    run("flax_msgpack_to_hf", src.parent, tmp_path / "tree")
    assert_holds(tmp_path / "tree", tiny.weights)


def stream(path: Path) -> list[tuple[list[str], Any]]:
    """What EasyLM's own loader reads."""
    with path.open("rb") as file:
        records = [*msgpack.Unpacker(file, max_buffer_size=0)]
    return [(names, flax.serialization.from_bytes(None, c)) for names, c in records]


def test_easylms_stream_is_read_one_tensor_at_a_time(tiny_hf, tmp_path):
    src = easylm_file(tmp_path / "src", tiny_hf(layers=24, vocab_size=16))
    import _msgpack

    tracemalloc.start()
    tensors = _msgpack.open_msgpack(_msgpack.Restored(), src)
    for lazy in tensors.values():
        lazy.read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < src.stat().st_size / 4


def test_easylm_without_config_says_what_is_needed(tiny_hf, tmp_path, refuse):
    src = easylm_file(tmp_path / "src", tiny_hf(layers=3), axis=0)
    (src.parent / "config.json").unlink()
    line = refuse("flax_msgpack_to_hf", src, tmp_path / "dst")
    assert f"no config.json beside {src}" in line
    assert (
        "with vocab_size 61, hidden_size 64, intermediate_size 96, num_hidden_layers 3,"
        " num_attention_heads" in line
    )
    line = refuse("flax_msgpack_to_hf", src.parent, tmp_path / "dst")
    assert "of another name give the file itself" in line


BAD = {
    "cut": (lambda data: data[:-100], "within the record of params/lm_head/kernel; do"),
    "cut in names": (lambda data: data[:8], "within the record of another array; down"),
    "no pair": (lambda data: data + b"\x93", "at byte"),
    "no bytes": (lambda data: data + record("a/b", 3), "is no record [names, bytes]"),
    "no array": (lambda data: data + record("a", b"\x03"), "a (int) are not arrays"),
    "extension": (
        lambda data: data + record("a", msgpack.packb(msgpack.ExtType(9, b"x"))),
        "extension type 9, want (1, 3), flax's arrays",
    ),
    "size": (
        lambda data: data.replace(b"float32", b"float16", 1),
        "float16[61, 64] has 15616 bytes, want 7808",
    ),
    "dtype": (lambda data: data.replace(b"float32", b"floaty2", 1), "floaty2"),
    "name": (
        lambda data: data + record("vte", packed(np.ones(2))),
        "1 unexpected: vte",
    ),
    "shape": (
        lambda data: data + record("lm_head/kernel", packed(np.ones(2, np.float32))),
        "lm_head.weight",
    ),
}


@pytest.mark.parametrize("case", [*BAD])
def test_easylm_refuses(case, tiny_hf, tmp_path, refuse):
    damage, message = BAD[case]
    src = easylm_file(tmp_path / "src", tiny_hf())
    src.write_bytes(damage(src.read_bytes()))
    assert message in refuse("flax_msgpack_to_hf", src, tmp_path / "dst")


def test_easylms_layers_are_those_of_the_config(tiny_hf, tmp_path, refuse):
    src = easylm_file(tmp_path / "src", tiny_hf(), axis=0, num_hidden_layers=5)
    line = refuse("flax_msgpack_to_hf", src, tmp_path / "dst")
    assert "has shape (2, 64, 64), want 5 layers" in line
