"""`jrope parity`: tables, JSON, thresholds and text."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from parity_helpers import folder as folder

from jrope import cli
from jrope.parity import compare, comparison


def command(*words: str) -> int:
    return cli.main(["parity", *words, "--no-compile-cache"])


def test_command_prints_tables(folder: Path, capsys: Any) -> None:
    status = command(str(folder), "--tokens", "32", "--dtype", "float32", "bfloat16")
    out = capsys.readouterr().out
    assert status == 0
    assert out.count("\nok: ") == 2 and "layer 0" in out and "16..47 at" in out


def test_command_prints_json(folder: Path, capsys: Any) -> None:
    words = ["--rope", "yarn:factor=4,original=16", "--condense", "2", "--json"]
    words += ["--positions", "0,trained-2", "--tokens", "4", "--dtype", "float32"]
    assert command(str(folder), *words) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert [(s["first"], s["last"]) for s in report["segments"]] == [(0, 3), (14, 17)]
    expected = "yarn:factor=4,original_length=16 of positions / 2, theta 10000"
    assert report["rope"] == expected


def test_command_fails_past_the_threshold(folder: Path, capsys: Any) -> None:
    words = ["--dtype", "float32", "--tokens", "8", "--threshold", "1e-12"]
    assert command(str(folder), *words) == 1
    assert "FAILED: error of a logit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--positions", "here"], "positions: got 'here'"),
        (["--rope", "yarn:factor=oops"], "--rope"),
        (["--tokens", "0"], "0"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_command_says_what_is_wrong(
    folder: Path, capsys: Any, words: list[str], message: str
) -> None:
    assert command(str(folder), *words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_command_tells_nan_in_one_line(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = comparison.jrope_stages

    def spoilt(*args: Any) -> Any:
        return {name: x * float("nan") for name, x in run(*args).items()}

    monkeypatch.setattr(comparison, "jrope_stages", spoilt)
    words = ["--tokens", "4", "--positions", "0", "--dtype", "float32"]
    assert command(str(folder), *words) == 1
    out = capsys.readouterr().out
    assert "\nFAILED: NaN or infinity: jrope from embeddings on (PyTorch is" in out
    assert " nan" not in out and out.strip().count("\n") == 1


def test_commands_keep_transformers_notices_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads this when it is imported, unless the user has set another level."""
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    command(str(tmp_path))
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY")
    command(str(tmp_path))
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"


def test_command_without_torch(folder: Path) -> None:
    """One line on what to install, and not transformers' own notice before it."""
    script = (
        "import sys; sys.modules['torch'] = None; from jrope import cli; "
        f"sys.exit(cli.main(['parity', {str(folder)!r}, '--no-compile-cache']))"
    )
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("jrope: error: parity needs torch (")
    assert done.stderr.endswith("): pip install torch transformers\n")
    assert done.stderr.count("\n") == 1


def test_command_reads_text(folder: Path, tmp_path: Path, capsys: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"a": 3, "b": 7, "[UNK]": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    tokenizer.save(str(copy / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (copy / "tokenizer_config.json").write_text(json.dumps(kind), "utf-8")
    text = tmp_path / "text.txt"
    text.write_text("a b b\n", "utf-8")
    words = ["--tokens", "3", "--positions", "0", "--dtype", "float32", "--json"]
    assert command(str(copy), "--text", str(text), *words) == 0
    (report,) = json.loads(capsys.readouterr().out)
    same = compare(copy, tokens=[3, 7, 7], count=3, positions=[0])
    assert report["figure"] == same.figure
    text.write_bytes(b"\xff")
    assert command(str(copy), "--text", str(text)) == 2
    assert "not UTF-8" in capsys.readouterr().err
