"""What several commands share: --rope, sizes, the compilation cache."""

import os
import subprocess
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import CONFIG, describe, fail, succeed
from cli_helpers import _no_compile_cache as _no_compile_cache
from cli_helpers import model as model
from rope_cases import CASES

from jrope import rope as ropes
from jrope.cli import common
from jrope.hf import config_from_hf
from jrope.model.with_rope import with_rope


@pytest.mark.parametrize(
    ("text", "name", "fields"),
    [
        ("default", "default", {}),
        ("linear:2", "linear", {"factor": 2}),
        ("condense:2.5", "condense", {"factor": 2.5}),
        ("yarn:4,original=8192", "yarn", {"factor": 4, "original_length": 8192}),
        ("yarn:factor=4.0,truncate=false", "yarn", {"factor": 4.0, "truncate": False}),
        (
            "longrope:short=1:1.5,long=2",
            "longrope",
            {"short_factor": (1, 1.5), "long_factor": (2,)},
        ),
    ],
)
def test_parse_rope(text: str, name: str, fields: dict[str, Any]):
    got = common.parse_rope(text)
    assert got == (name, fields)
    assert [type(x) for x in got[1].values()] == [type(x) for x in fields.values()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "want NAME or NAME:FIELD=VALUE"),
        ("yarn:", "want NAME or NAME:FIELD=VALUE"),
        ("yarn:factor=", "factor is '', want a number"),
        ("yarn:factor=4x", "factor is '4x', want a number"),
        ("yarn:4,factor=4", "factor is given twice"),
        ("yarn:4,original=1,original_length=2", "original_length is given twice"),
        ("yarn:4,condense=2", "condense is not a field; see --condense"),
        ("nkt:2", "unknown rope type 'nkt'"),
        ("nkt:2", "did you mean 'ntk'?"),
        ("yarn", "needs factor"),
        ("yarn:4,fac=1", r"has no field ['fac']"),
        ("linear:0", "--rope 'linear:0': factor: got 0, want a number, at least 1"),
        ("linear:nan", "factor: got nan"),
        ("linear:true", "factor: got True"),
        ("linear:1:2", "factor: got (1, 2)"),
        ("yarn:4,original=512.5", "original_length: got 512.5"),
        ("longrope:short=1:1,long=1:1:1:1,factor=2", "'2 numbers', want 4 numbers"),
    ],
)
def test_rope_errors(capsys: Any, model: Path, text: str, message: str):
    assert message in fail(capsys, "inspect", model, f"--rope={text}")


@pytest.mark.parametrize("method", [*CASES])
def test_a_rope_is_described_as_it_is_given(method: str):
    for rope in (case.rope() for case in CASES[method]):
        words = ropes.describe(rope)
        if "numbers" not in words:
            name, fields = common.parse_rope(words)
            given = None if name == "default" else ropes.ROPE_TYPES[name](**fields)
            assert name == method and given == rope.scaling


def test_apply_rope_is_with_rope():
    config = config_from_hf(CONFIG)
    args = Namespace(rope="yarn:4", condense=2, precision="accurate")
    expected = with_rope(config, "yarn", condense=2, precision="accurate", factor=4)
    assert common.apply_rope(config, args) == expected
    nothing = Namespace(rope=None, condense=None)
    assert common.apply_rope(config, nothing) == config
    condensed = common.apply_rope(config, Namespace(rope="condense:3", condense=None))
    assert condensed == with_rope(config, condense=3)


def test_rope_lengths(capsys: Any, model: Path):
    config = config_from_hf(CONFIG)
    args = Namespace(rope="dynamic:2", condense=None, rope_lengths="growing")
    expected = with_rope(config, "dynamic", factor=2, lengths="growing")
    assert common.apply_rope(config, args) == expected
    words = ("--rope", "dynamic:2", "--rope-lengths")
    assert describe(capsys, model, *words, "hf")["rope"]["lengths"] == "hf"
    assert describe(capsys, model)["rope"]["lengths"] is None
    out, _ = succeed(capsys, "inspect", model, *words, "growing")
    assert "original_length=64, growing lengths, theta" in out
    error = fail(capsys, "inspect", model, "--rope-lengths", "growing")
    assert "--rope-lengths growing: lengths: got 'growing', want 'planned'" in error
    error = fail(capsys, "inspect", model, "--rope", "dynamic:2,lengths=1")
    assert "lengths is not a field; see --rope-lengths" in error


def test_condense_errors(capsys: Any, model: Path):
    assert "condense: got 0" in fail(capsys, "inspect", model, "--condense", "0")
    words = ("inspect", model, "--rope", "condense:2", "--condense", "2")
    assert "give one" in fail(capsys, *words)


@pytest.mark.parametrize(
    ("spec", "longest"),
    [
        ("default", 64),
        ("linear:2", 128),
        ("ntk:2", 128),
        ("yarn:4", 256),
        ("yarn:4,original=32", 128),
        ("yarn:4,original=8", 64),
        ("condense:2.5", 160),
        ("dynamic:2", None),
        ("dynamic-yarn", None),
    ],
)
def test_reach(spec: str, longest: int | None):
    args = Namespace(rope=spec, condense=None)
    assert common.reach(common.apply_rope(config_from_hf(CONFIG), args)) == longest


@pytest.mark.parametrize(
    ("word", "count"),
    [("5GB", 5 * 10**9), ("1.5kb", 1500), ("2MiB", 2**21), ("70", 70), ("7B", 7)],
)
def test_size(word: str, count: int):
    assert common.size(word) == count


@pytest.mark.parametrize("word", ["", "GB", "0", "-1", "5XB", "nan", "inf", "1e400"])
def test_size_errors(word: str):
    with pytest.raises(ArgumentTypeError, match="is not a size such as"):
        common.size(word)


def test_compile_cache(tmp_path: Path):
    code = (
        "import sys, shutil, jax\n"
        "from jrope.cli.common import enable_compile_cache\n"
        "enable_compile_cache()\n"
        "jax.jit(lambda x: x + 1)(1.0)\n"
        "print(jax.config.jax_compilation_cache_dir)\n"
        "if sys.argv[1:]: shutil.rmtree(sys.argv[1])\n"
        "jax.jit(lambda x: x + 2)(1.0)\n"
    )

    def run(folder: str, *words: str, **more: str) -> str:
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "xdg"), **more}
        for name in ("JROPE_CACHE_DIR", "JAX_COMPILATION_CACHE_DIR"):
            environment.pop(name, None)
        if folder != "unset":
            environment["JROPE_CACHE_DIR"] = folder
        command = [sys.executable, "-c", code, *words]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=environment
        )
        assert done.stderr == ""
        return done.stdout.strip()

    assert run("unset") == str(tmp_path / "xdg" / "jrope")
    assert [*(tmp_path / "xdg" / "jrope").iterdir()]
    assert run("") == "None"
    assert run("/dev/null/x") == "None"  # cannot be made
    assert run(str(tmp_path / "own"), str(tmp_path / "own")) == str(tmp_path / "own")


def test_compile_cache_is_on_unless_told(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    calls: list[int] = []
    monkeypatch.setattr(common, "enable_compile_cache", lambda: calls.append(1))
    words = ("generate", tmp_path / "none", "x")
    fail(capsys, *words)
    assert len(calls) == 1
    fail(capsys, *words, "--no-compile-cache")
    fail(capsys, "inspect", tmp_path / "none")
    assert len(calls) == 1
