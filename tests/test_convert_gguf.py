"""gguf_to_hf: numbers, several files, and the tokenizer."""

from collections.abc import Callable

import gguf
import numpy as np
import pytest
from convert_helpers import _as_a_script as _as_a_script
from convert_helpers import assert_holds, assert_logits, bfloat16, write_gguf
from convert_helpers import refuse as refuse
from convert_helpers import run as run

import jrope
from jrope.hf.checkpoint import read_config


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
        ({"keys": {"vocab_size": 62}}, "found (61, 64), want (62, 64)"),
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
