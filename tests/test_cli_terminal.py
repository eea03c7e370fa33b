"""Progress and sizes on a terminal."""

import sys
from typing import Any

import pytest

from jrope.cli import terminal


def test_progress_draws_on_terminals_only(capsys: Any, monkeypatch: pytest.MonkeyPatch):
    with terminal.Progress("loading", 10) as progress:
        progress("a", 5)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with terminal.Progress("loading", 10) as progress:
        progress("a", 5)
    err = capsys.readouterr().err
    assert "loading [" in err and " 50% of 10 bytes" in err
    assert err.endswith("\r\x1b[K")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1e3, "1 kB"), (2.5e9, "2.5 GB")],
)
def test_bytes_text(count: float, text: str):
    assert terminal.bytes_text(count) == text
