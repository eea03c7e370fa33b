"""transformers on the rows of `jrope bench batch`: as many tokens, its own process."""

import json
import subprocess
import sys
from typing import Any

import jax.numpy as jnp
import pytest
from bench_helpers import CEILINGS, tiny
from bench_helpers import quick as quick

from jrope.bench import beside as module
from jrope.bench.batching import Measured, compare, workload
from jrope.bench.beside import Beside, beside, measure
from jrope.bench.model import random_params
from jrope.cli import bench_batch, main
from jrope.errors import JropeError

ROWS = 5
CONTINUOUS = Beside(by="continuous batching", tokens=90, seconds=1.0)
STATIC = Beside(by="static batches", rows=3, tokens=90, seconds=2.0)


def ask(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[str]:
    """Let `answer` take the place of the process; what it was given."""
    given: list[str] = []

    def run(words: Any, *, input: str, env: Any, **_: Any) -> Any:
        assert words == [sys.executable, "-m", "jrope.bench.beside"]
        assert env["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        given.append(input)
        return subprocess.CompletedProcess(words, *(*answer, "")[:3])

    monkeypatch.setattr(module.subprocess, "run", run)
    return given


def test_both_sides_make_the_tokens_that_rows_ask_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny(eos_token_id=tuple(range(50)))  # any token would end a row
    works = workload(config, ROWS, shrink=32)
    given = ask(monkeypatch, (0, 'noise\n{"found": [{"by": "x", "seconds": 1}]}\n'))
    with pytest.raises(JropeError, match=r"nothing worked: x: 0\.0 useful"):
        beside(config, "float32", works)
    monkeypatch.setattr(module, "SIZES", (2, 64))
    found = measure(json.loads(given[0]))
    want = sum(work.max_new_tokens for work in works)
    assert [(one.rows, one.tokens, one.problem) for one in found] == [
        (None, want, None),
        (2, want, None),
        (ROWS, want, None),
    ]
    assert all(one.seconds > 0 for one in found)
    assert all("sdpa attention" in one.by for one in found)
    params = random_params(config, jnp.float32)
    (own,) = compare(params, config, works, CEILINGS, slots=2, size=0)
    assert own.tokens == want


def test_a_way_that_fails_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"found": [{"by": "a", "problem": "out of memory"}, vars(STATIC)]}
    ask(monkeypatch, (0, json.dumps(answer)))
    failed, works = beside(tiny(), "float32", workload(tiny(), 2, shrink=32))
    assert failed.line() == "a: out of memory" and failed.speed == 0
    text = "static batches, 3 rows at once: 45.0 useful tokens/s, 2.00 s"
    assert works.line() == text


@pytest.mark.parametrize(
    "answer, message",
    [
        ((0, '{"problem": "--versus transformers needs torch"}'), "needs torch"),
        ((-9, "", "x\nKilled"), "transformers ended with status -9 Killed"),
        ((0, "", ""), "ended with status 0"),
    ],
)
def test_a_process_that_fails_is_one_line(
    answer: Any, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    ask(monkeypatch, answer)
    words = ["--shape", "smollm2-135m", "--layers", "1", "--rows", "2"]
    assert main(["bench", "batch", *words, "--versus", "transformers"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("jrope: error: ") and message in error


def test_process_prints_what_went_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(module.json, "load", lambda file: {})
    module._main()
    assert "needs torch" in json.loads(capsys.readouterr().out)["problem"]


def test_command_compares_with_the_fastest_way(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    order: list[str] = []

    def asked(config: Any, dtype: str, works: Any) -> list[Beside]:
        order.append("transformers")
        assert dtype == "bfloat16" and len(works) == 6
        return [STATIC, CONTINUOUS]

    def compared(*args: Any, **options: Any) -> Any:
        order.append("jrope")
        numbers = dict.fromkeys(("rows", "compiled", "steps"), 1)
        times = {"tokens": 90, "seconds": 0.4, "compile_seconds": 0.5}
        yield Measured(by="slots", occupancy=1.0, **numbers, **times)

    monkeypatch.setattr(bench_batch, "beside", asked)
    monkeypatch.setattr(bench_batch, "compare", compared)
    words = ["--shape", "smollm2-135m", "--layers", "1", "--rows", "6", "--json", "-"]
    assert main(["bench", "batch", *words, "--versus", "transformers"]) == 0
    captured = capsys.readouterr()
    assert order == ["transformers", "jrope"]  # which would take the memory first
    assert "slots are 2.50x as fast as continuous batching\n" in captured.err
    assert [one["by"] for one in json.loads(captured.out)["beside"]] == [
        "static batches",
        "continuous batching",
    ]
