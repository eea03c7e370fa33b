"""Weights that are loaded in a thread: they arrive, fail, or are no longer wanted."""

import dataclasses
import io
import json
import sys
import threading
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cli_helpers import model as model

from jrope.cli import loading, main
from jrope.cli.loading import Loading
from jrope.errors import JropeError
from jrope.hf.checkpoint import Tensors, load, load_shapes, save
from jrope.weights.fuse import fuse


class Terminal(io.StringIO):
    """Says that somebody looks."""

    def isatty(self) -> bool:
        return True


def kinds(tree: Any) -> Any:
    return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_what_arrives(model: Path, dtype: str | None) -> None:
    expected, _ = load(model, dtype)
    with Loading(model, dtype) as weights:
        assert kinds(weights.shapes) == kinds(expected)
        params, timing = weights.wait()
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert timing.load > 0


@pytest.mark.parametrize(
    ("rows", "quantize", "backend", "order"),
    [
        (1, None, "gpu", "out_in"),
        (4, None, "gpu", "in_out"),
        (4, None, "cpu", "out_in"),
        (4, "int8", "gpu", "out_in"),
    ],
)
def test_what_arrives_is_arranged_for_so_many_rows(
    model: Path, rows: int, quantize: Any, backend: str, order: Any, monkeypatch: Any
) -> None:
    expected = fuse(load(model, quantize=quantize)[0], order)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    with Loading(model, None, quantize, rows=rows) as weights:
        assert kinds(weights.shapes) == kinds(expected)
        params, _ = weights.wait()
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("command", ["generate", "batch"])
def test_commands_arrange_them(
    model: Path, tmp_path: Path, command: str, monkeypatch: Any
) -> None:
    """One prompt's as one row is decoded fastest, a file's as several are."""
    asked = list[Any]()
    monkeypatch.setattr(loading, "order_for", lambda _, rows: asked.append(rows) or "")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a"}')
    files = ["--input", str(rows), "--output", str(tmp_path / "out")]
    words = ["a"] if command == "generate" else files
    assert main([command, str(model), *words]) == 2  # no order
    assert asked == [1 if command == "generate" else 2]


def test_an_error_of_the_thread(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shorter(*_: Any, **__: Any) -> Any:
        raise JropeError("it became shorter")

    monkeypatch.setattr(loading, "load", shorter)
    with pytest.raises(JropeError, match="became shorter"), Loading(model, None) as w:
        w.wait()


def test_commands_refuse_weights_that_are_not_finite(
    model: Path, tmp_path: Path
) -> None:
    params, config = load(model)
    norm = params["model"]["norm"]
    norm["weight"] = norm["weight"].at[3].set(np.nan)
    save(tmp_path / "bad", params, config)
    message = "NaN or infinity in 1 of [0-9]+ tensors: model.norm.weight"
    for quantize in (None, "int8"):
        loading = Loading(tmp_path / "bad", None, quantize)
        with pytest.raises(JropeError, match=message), loading as weights:
            weights.wait()


def test_leaving_early(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread ends with the tensor at hand, not with the folder."""
    left, arrived = threading.Event(), []

    def slow(*_: Any, progress: Any, **__: Any) -> Any:
        for name in "abc":
            left.wait(10)
            arrived.append(name)
            progress(name, 1)

    monkeypatch.setattr(loading, "load", slow)
    threading.Timer(0.5, left.set).start()  # long after the context is left
    with pytest.raises(JropeError, match="prompt"), Loading(model, None):
        raise JropeError("prompt: it is empty")
    assert arrived == ["a"]


def test_a_failed_load_is_told_before_anything_is_compiled(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shorter(*_: Any, **__: Any) -> Any:
        raise JropeError("it became shorter")

    monkeypatch.setattr(loading, "load", shorter)
    with Loading(model, None) as weights:
        wait([weights._future])
        with pytest.raises(JropeError, match="became shorter"):
            weights.show()


def test_shapes_come_from_headers_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tied checkpoint that stores its head too, the data is compared once."""
    params, config = load(model)
    params["lm_head"] = params["model"]["embed_tokens"]
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    save(tmp_path / "tied", params, untied)
    fields = json.loads((tmp_path / "tied" / "config.json").read_text())
    fields["tie_word_embeddings"] = True
    (tmp_path / "tied" / "config.json").write_text(json.dumps(fields))
    same, compared = Tensors.same, []

    def spy(self: Tensors, *names: str) -> bool:
        compared.append(names)
        return same(self, *names)

    monkeypatch.setattr(Tensors, "same", spy)
    assert "lm_head" not in load_shapes(tmp_path / "tied")[0]
    assert compared == []
    with Loading(tmp_path / "tied", None) as weights:
        weights.wait()
    assert len(compared) == 1


def test_int8(model: Path) -> None:
    """Shapes of what is kept, progress in bytes of what arrives."""
    expected, _ = load(model, quantize="int8")
    with Loading(model, None, "int8") as weights:
        assert kinds(weights.shapes) == kinds(expected)
        params, _ = weights.wait()
        jax.tree.map(np.testing.assert_array_equal, params, expected)
        assert weights._bar.done == weights._bar.total


def test_the_bar_begins_when_it_may(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What arrived before counts; what is printed before `show` stays whole."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    go = threading.Event()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(load(model)[0]))

    def slow(*_: Any, progress: Any, **__: Any) -> Any:
        progress("a", total // 2)
        first.set()
        go.wait(10)
        progress("b", total - total // 2)
        return None, None

    first = threading.Event()
    monkeypatch.setattr(loading, "load", slow)
    with Loading(model, None) as weights:
        first.wait(10)
        assert sys.stderr.getvalue() == ""
        weights.show()
        go.set()
        weights.wait()
    assert "100%" in sys.stderr.getvalue()
    assert sys.stderr.getvalue().endswith("\r\x1b[K")
