"""Progress and sizes on a terminal."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from jrope.cli import terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time as the bars see it, in its last item."""
    now = [1000.0]
    time = SimpleNamespace(monotonic=lambda: now[-1])
    monkeypatch.setattr(terminal, "time", time)
    return now


def test_a_log_has_a_line_for_each_matter_and_one_in_30_seconds(
    capsys: Any, clock: list[float]
):
    with terminal.TimeLeft(100) as bar:
        bar.name("yarn 2048")
        for second in range(1, 71):  # a step a second
            clock.append(1000.0 + second)
            bar.step(1)
        for _ in range(3):
            bar.name("yarn 4096")
        bar.line("jrope: one failed")
    assert capsys.readouterr().err.splitlines() == [
        "jrope: 0%: yarn 2048",
        "jrope: 30%, 1 min 10 s left: yarn 2048",
        "jrope: 60%, 40 s left: yarn 2048",
        "jrope: 70%, 30 s left: yarn 4096",
        "jrope: one failed",
        "jrope: 100%: done in 1 min 10 s",
    ]


def test_a_log_does_not_say_done_of_what_was_broken_off(capsys: Any):
    with pytest.raises(KeyboardInterrupt), terminal.TimeLeft(1) as bar:
        bar.name("yarn")
        raise KeyboardInterrupt
    with terminal.TimeLeft(1):
        pass  # nothing was left to do
    assert capsys.readouterr().err == "jrope: 0%: yarn\n"


def test_a_log_hears_of_long_loads_only(capsys: Any, clock: list[float]):
    with terminal.Progress("loading", 200) as progress:
        for second in (10, 29, 31, 50, 62):
            clock.append(1000.0 + second)
            progress("a", 20)
    assert capsys.readouterr().err.splitlines() == [
        "jrope: loading: 30% of 200 bytes",
        "jrope: loading: 50% of 200 bytes",
    ]


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
