"""Weights that are loaded in a thread: they arrive, fail, or are no longer wanted."""

import io
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cli_helpers import model as model

from jrope.checkpoint import load
from jrope.cli import loading
from jrope.cli.loading import Loading
from jrope.errors import JropeError


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


def test_an_error_of_the_thread(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shorter(*_: Any, **__: Any) -> Any:
        raise JropeError("it became shorter")

    monkeypatch.setattr(loading, "load", shorter)
    with pytest.raises(JropeError, match="became shorter"), Loading(model, None) as w:
        w.wait()


def test_leaving_early(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread ends with the tensor at hand, not with the folder."""
    left, arrived = threading.Event(), []

    def slow(*_: Any, progress: Any, **__: Any) -> Any:
        for name in "abc":
            left.wait(10)
            arrived.append(name)
            progress(name, 1)

    monkeypatch.setattr(loading, "load", slow)
    with pytest.raises(JropeError, match="prompt"), Loading(model, None) as weights:
        weights._unwanted = True  # as leaving sets it, but before the tensor arrives
        left.set()
        raise JropeError("prompt: it is empty")
    assert arrived == ["a"]


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
