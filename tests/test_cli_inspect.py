"""`jrope inspect`: what is in a folder, and what a method makes of it."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import (
    CONFIG,
    SIZE,
    VOCAB,
    _raise,
    describe,
    fail,
    make_weights,
    succeed,
)
from cli_helpers import _no_compile_cache as _no_compile_cache
from cli_helpers import copy as copy
from cli_helpers import model as model


def test_inspect_tells_what_is_there(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, model: Path
):
    monkeypatch.setattr("jrope.hf.tensors._pieces", _raise(AssertionError()))
    facts = describe(capsys, model)
    weights = make_weights()
    count = sum(array.size for array in weights.values())
    file = model / "model.safetensors"
    assert facts["folder"] == str(model)
    assert facts["weights"] == {
        "parameters": count,
        "tensors": len(weights),
        "dtypes": ["float32"],
        "bytes": 4 * count,
        "files": {file.name: file.stat().st_size},
    }
    assert facts["kv_cache_bytes_per_token"] == 2 * 1 * 1 * 8 * 4
    shown = {"vocab_size": SIZE, "head_dim": 8, "eos_token_id": [VOCAB["</s>"]]}
    assert shown.items() <= facts["config"].items()
    out, _ = succeed(capsys, "inspect", model)
    assert f"{count:,}" in out and "rope        default, theta 10000\n" in out
    assert "pairs       4: 4 kept\n" in out and "64 bytes a token" in out


def test_inspect_describes_plain_rope(capsys: Any, model: Path):
    rope = describe(capsys, model)["rope"]
    assert rope["method"] == "default" and rope["trained_length"] == 64
    assert (rope["pairs"], rope["pairs_kept"], rope["pairs_still"]) == (4, 4, 0)
    assert rope["stretched_by"] is None and rope["attention_scaling"] == 1
    waves = [2 * math.pi, 2 * math.pi * 10000 ** (3 / 4)]
    np.testing.assert_allclose(rope["wavelengths"], waves, rtol=1e-12)


@pytest.mark.parametrize(
    ("words", "kept", "stretch", "still", "attention"),
    [
        ("--rope linear:4", 0, [4, 4], 0, 1),
        ("--condense 3", 0, [3, 3], 0, 1),
        ("--rope linear:2 --condense 3", 0, [6, 6], 0, 1),
        ("--rope ntk:8", 1, [8 ** (1 / 3), 8], 0, 1),
        ("--rope dynamic:2", 1, [3 ** (1 / 3), 3], 0, 1),
        ("--rope dynamic:2 --length 64", 4, None, 0, 1),
        ("--rope yarn:4", 1, None, 0, 0.1 * math.log(4) + 1),
        ("--rope dynamic-yarn", 1, None, 0, 0.1 * math.log(2) + 1),
        ("--rope dynamic-yarn --length 64", 4, None, 0, 1),
        ("--rope dynamic-yarn:4 --length 192", 1, None, 0, 0.1 * math.log(4) + 1),
        ("--rope yarn:4,attention_factor=1.5", 1, None, 0, 1.5),
        ("--rope proportional:partial_rotary_factor=0.5", 2, None, 2, 1),
        (
            "--rope longrope:short=1:1:1:2,long=1:2:3:4,original=32",
            1,
            [2, 4],
            0,
            math.sqrt(1 + math.log(2) / math.log(32)),
        ),
        (
            "--rope longrope:short=1:1:1:2,long=1:2:3:5,original=32,attention_factor=3",
            1,
            [2, 5],
            0,
            3,
        ),
        (
            "--rope longrope:short=1:1:1:2,long=1:2:3:4,original=32,factor=1 "
            "--length 32",
            3,
            [2, 2],
            0,
            1,
        ),
    ],
)
def test_inspect_describes_methods(
    capsys: Any,
    model: Path,
    words: str,
    kept: int,
    stretch: list[float] | None,
    still: int,
    attention: float,
):
    rope = describe(capsys, model, *words.split())["rope"]
    assert (rope["pairs_kept"], rope["pairs_still"]) == (kept, still)
    assert rope["pairs_stretched"] == 4 - kept - still
    if stretch is not None:
        np.testing.assert_allclose(rope["stretched_by"], stretch, rtol=1e-9)
    assert rope["attention_scaling"] == pytest.approx(attention, rel=1e-12)
    out, _ = succeed(capsys, "inspect", model, *words.split())
    assert f"rope        {rope['method']}, theta 10000\n" in out
    assert f"4: {kept} kept" in out


def test_inspect_finds_missing_and_left_over_tensors(
    capsys: Any, model: Path, copy: Path
):
    tied = {**CONFIG, "num_hidden_layers": 2}
    (copy / "config.json").write_text(json.dumps(tied))
    error = fail(capsys, "inspect", copy)
    assert "9 missing: model.layers.1.self_attn.q_proj.weight" in error
