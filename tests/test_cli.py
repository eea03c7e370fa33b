"""`jrope` itself: its help, wrong usage, and errors in one line."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import _no_compile_cache as _no_compile_cache
from cli_helpers import _raise, fail, succeed
from cli_helpers import model as model

import jrope
import jrope.cli
from jrope.cli import main
from jrope.errors import JropeError


def test_help_names_every_command(capsys: Any):
    out, err = succeed(capsys, "--help")
    assert all(name in out for name in jrope.cli.COMMANDS) and not err
    out, err = succeed(capsys, status=2)
    assert all(name in err for name in jrope.cli.COMMANDS) and not out


def test_version(capsys: Any):
    assert succeed(capsys, "--version")[0] == f"jrope {jrope.__version__}\n"


@pytest.mark.parametrize("name", jrope.cli.COMMANDS)
def test_every_command_has_help(capsys: Any, name: str):
    out, _ = succeed(capsys, name, "--help")
    assert out.startswith(f"usage: jrope {name} ") and "folder" in out.lower()


def test_help_keeps_names(capsys: Any):
    assert "Compare a model with PyTorch" in succeed(capsys, "parity", "--help")[0]


def test_runs_as_a_module_and_imports_little():
    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "try: import runpy; runpy.run_module('jrope.cli', run_name='__main__')\n"
        "finally: print({'torch', 'transformers'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: jrope ") and done.stdout.endswith("set()\n")


def test_a_reader_that_goes_away_is_no_error(model: Path):
    words = [sys.executable, "-m", "jrope.cli", "inspect", str(model)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["frob"], "invalid choice: 'frob'"),
        (["--frob"], "unrecognized arguments: --frob (see 'jrope --help')"),
        (["inspect"], "required: FOLDER (see 'jrope inspect --help')"),
        (["inspect", "a", "--frob"], "unrecognized arguments: --frob"),
        (["inspect", "a", "--length", "0"], "'0' is not a whole number from 1"),
        (["generate", "a", "--top-k", "x"], "'x' is not a whole number from 0"),
        (["generate", "a", "--condense", "x"], "'x' is not a number"),
        (["convert", "a", "b", "--max-shard-size", "5XB"], "'5XB' is not a size"),
        (["convert", "a", "b", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_wrong_usage(capsys: Any, words: list[str], message: str):
    assert message in fail(capsys, *words)


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        (KeyboardInterrupt(), "interrupted", 130),
        (JropeError("a\nb\x1b[1m"), r"a b\x1b[1m", 2),
        (OSError(28, "No space left on device"), "No space left on device", 2),
        (FileNotFoundError(2, "No such file", "/x"), "/x: No such file", 2),
        (KeyError("x"), "unexpected KeyError: 'x' (JROPE_DEBUG=1 shows where)", 2),
    ],
)
def test_errors_are_one_line(
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    message: str,
    status: int,
):
    monkeypatch.setattr(jrope.cli, "_dispatch", _raise(error))
    assert fail(capsys, status=status) == f"jrope: error: {message}"
    monkeypatch.setenv("JROPE_DEBUG", "1")
    with pytest.raises(type(error)):
        main([])
