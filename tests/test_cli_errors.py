"""What `generate` warns of, and what it and others refuse before any work."""

import json
import os
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_helpers import (
    CONFIG,
    SIZE,
    _raise,
    fail,
    pipe,
    succeed,
    write_tokenizer_config,
)
from cli_helpers import _no_compile_cache as _no_compile_cache
from cli_helpers import copy as copy
from cli_helpers import model as model

import jrope
from jrope.cli import common, generate
from jrope.cli.loading import Loading
from jrope.hf import config_from_hf


@pytest.mark.parametrize(
    ("known", "total", "spec", "message"),
    [
        (SIZE, 64, "default", ""),
        (SIZE, 65, "default", "--rope yarn:2 or dynamic:2"),
        (SIZE, 65, "linear:2", ""),
        (SIZE, 129, "linear:2", "meant for 128"),
        (SIZE, 10**6, "dynamic:2", ""),
        (SIZE + 1, 1, "default", f"the tokenizer has {SIZE + 1} ids, the model {SIZE}"),
        (SIZE // 2, 1, "default", "do they belong together?"),
        (SIZE - 8, 1, "default", ""),
    ],
)
def test_warnings(capsys: Any, known: int, total: int, spec: str, message: str):
    args = Namespace(rope=spec, condense=None)
    config = common.apply_rope(config_from_hf(CONFIG), args)
    tokenizer = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(known)})
    generate._warn(tokenizer, total, config)
    out, err = capsys.readouterr()
    assert out == "" and message in err and bool(message) == bool(err)
    assert not err or (err.startswith("jrope: warning: ") and err.count("\n") == 1)


def test_warns_past_the_trained_length(capsys: Any, model: Path):
    words = ("generate", model, "x", "--max-new-tokens")
    assert "may reach 65, the model is meant for 64" in succeed(capsys, *words, "64")[1]


def test_warns_of_filters_without_temperature(capsys: Any, model: Path):
    words = ("generate", model, "x", "--top-k", "3", "--seed", "1")
    _, err = succeed(capsys, *words)
    assert "warning: --top-k, --seed without --temperature above 0" in err


@pytest.fixture
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is cheap to check is checked before anybody waits for the weights."""
    monkeypatch.setattr(Loading, "wait", _raise(AssertionError("waited")))
    monkeypatch.setattr(generate, "compile_ahead", _raise(AssertionError("compiled")))


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--file", "f"], "as arguments or --file, not both"),
        (["--file", "/nonexistent"], "/nonexistent: No such file or directory"),
        (["--file", "/"], "/: Is a directory"),
        (["x", "--system", "s"], "needs a chat template, but this tokenizer has none"),
        (["x\udcff"], "prompt: it is not valid UTF-8"),
        (["x", "--temperature", "-1"], "temperature: got -1"),
        (["x", "--temperature", "1", "--top-p", "2"], "top_p: got 2"),
        (["x", "--max-new-tokens", "-1"], "'-1' is not a whole number from 0"),
        (["x", "--prefill-chunk", "0"], "'0' is not a whole number from 1"),
        (["x", "--rope", "nkt:2"], "unknown rope type 'nkt'"),
        (["x", "--condense", "-2"], "condense: got -2"),
    ],
)
def test_errors_before_loading(
    capsys: Any, model: Path, words: list[str], message: str
):
    assert message in fail(capsys, "generate", model, *words)


@pytest.mark.usefixtures("_no_weights")
def test_prompt_errors(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, model: Path, tmp_path: Path
):
    pipe(monkeypatch, b"ab\xff")
    assert "standard input is not UTF-8 text: byte 2" in fail(capsys, "generate", model)
    (tmp_path / "p").write_bytes(b"\xff")
    words = ("generate", model, "--file", tmp_path / "p")
    assert f"{tmp_path / 'p'} is not UTF-8 text: byte 0" in fail(capsys, *words)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert "no prompt: give it as an argument" in fail(capsys, "generate", model)


@pytest.mark.usefixtures("_no_weights")
def test_tokenizer_errors(capsys: Any, copy: Path):
    words = ("generate", copy, "x")
    write_tokenizer_config(copy, chat_template="{{ raise_exception('no roles') }}")
    error = fail(capsys, *words)
    assert "the chat template failed" in error and "no roles" in error
    assert "--system needs a chat template, but --raw" in fail(
        capsys, *words, "--raw", "--system", "s"
    )
    (copy / "tokenizer.json").write_text("{}")
    assert f"{copy}: the tokenizer cannot be read" in fail(capsys, *words)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    assert f"no tokenizer in {copy}: want one of tokenizer.json" in fail(capsys, *words)


@pytest.mark.usefixtures("_no_weights")
def test_a_tokenizer_of_another_model(capsys: Any, copy: Path, tmp_path: Path):
    params, config = jrope.load(copy)
    for block in (params["model"]["embed_tokens"], params["lm_head"]):
        block["weight"] = block["weight"][:20]
    fewer, beside = replace(config, vocab_size=20), sorted(copy.glob("tokenizer*"))
    jrope.save(tmp_path / "few", params, fewer, extra_files=beside)
    error = fail(capsys, "generate", tmp_path / "few", "xyz")
    assert "outside the vocabulary of 20" in error


@pytest.mark.usefixtures("_no_weights")
@pytest.mark.parametrize("command", ["generate", "inspect", "convert"])
def test_folder_errors(capsys: Any, copy: Path, tmp_path: Path, command: str):
    def error(folder: Path) -> str:
        last = tmp_path / "out" if command == "convert" else "x"
        words = (last,) if command != "inspect" else ()
        return fail(capsys, command, folder, *words)

    assert "is not a hub id" in error(tmp_path / "none")
    assert "config.json is a file" in error(copy / "config.json")
    (copy / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": -1.0}))
    assert "config.json: rope_theta: got -1.0" in error(copy)
    (copy / "config.json").write_text("{")
    assert "config.json is not valid JSON" in error(copy)
    (copy / "config.json").unlink()
    assert f"no config.json in {copy}" in error(copy)


@pytest.mark.parametrize("command", ["generate", "inspect", "convert"])
def test_truncated_weights(capsys: Any, copy: Path, tmp_path: Path, command: str):
    weights = copy / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    last = {"generate": ("x",), "convert": (tmp_path / "out",)}.get(command, ())
    error = fail(capsys, command, copy, *last)
    assert f"{weights} is truncated: its header promises" in error
    assert not (tmp_path / "out").exists()
