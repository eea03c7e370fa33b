"""`jrope bench batch`: its rows, its two ways, the limit beside them."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bench_helpers import CEILINGS, tiny
from bench_helpers import quick as quick

from jrope.batch.stats import Stats
from jrope.batch.work import Finished
from jrope.bench import batching
from jrope.bench.batching import (
    Measured,
    capacity_of,
    compare,
    in_batches,
    least_seconds,
    structured,
    vocabulary,
    workload,
)
from jrope.bench.model import cache_bytes, prefill_flops, random_params, read_bytes
from jrope.cli import bench_batch, main
from jrope.forms.structure import MAY_STOP


def test_rows_are_drawn_once_and_within_their_bounds() -> None:
    rows = workload(tiny(), 1024)
    prompts = np.array([len(row.prompt) for row in rows])
    news = np.array([row.max_new_tokens for row in rows])
    assert (prompts.min(), prompts.max()) == (32, 2048)
    assert (news.min(), news.max()) == (16, 1024)
    assert (
        abs(np.log(prompts).mean() - 5.6) < 0.1 and abs(np.log(news).mean() - 5) < 0.1
    )
    assert capacity_of(rows) == (prompts + news).max()
    again = workload(tiny(), 1024)[77]
    np.testing.assert_array_equal(again.prompt, rows[77].prompt)
    small = workload(tiny(), 1024, shrink=8)
    assert max(len(row.prompt) for row in small) == 256
    assert min(row.max_new_tokens for row in small) == 2


class Fake:
    """An engine that draws nothing but zeros, in 12 steps."""

    def __init__(self, params: Any, config: Any, **options: Any) -> None:
        self.options, self.stats = options, Stats(slots=options["slots"])

    def compile(self) -> None:
        self.stats.compiled += 5

    def run(self, works: Any) -> Any:
        self.stats.steps, self.stats.slot_steps, self.stats.seconds = 12, 48, 1.0
        for row in works:
            self.stats.decode_tokens += row.max_new_tokens
            self.stats.live_rows += row.max_new_tokens
            zeros = np.zeros(row.max_new_tokens, np.int32)
            yield Finished(key=0, tokens=zeros, finish_reason="length", finite=True)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Shapes that are compiled ahead and shapes that run; nothing does."""
    seen: dict[str, list[Any]] = {"ahead": [], "run": []}

    def note(name: str) -> Any:
        def noted(_: Any, prompt: Any, lengths: Any, **options: Any) -> int:
            assert prompt.shape[1] == lengths.max() and options["stop_ids"] == ()
            seen[name].append((*prompt.shape, options["max_new_tokens"]))
            return 0

        return noted

    monkeypatch.setattr(batching, "compile_ahead", note("ahead"))
    monkeypatch.setattr(batching, "generate", note("run"))
    monkeypatch.setattr(batching, "Engine", Fake)
    return seen


def test_a_static_batch_runs_to_its_longest_row(asked: Any) -> None:
    works = workload(tiny(), 10, shrink=16)
    found = in_batches({}, tiny(), works, 4)
    parts = [works[:4], works[4:8], works[8:]]
    longest = [max(row.max_new_tokens for row in part) for part in parts]
    assert [shape[2] for shape in asked["run"]] == longest
    assert [shape[0] for shape in asked["run"]] == [4, 4, 2]
    assert 1 <= len(asked["ahead"]) <= 3
    assert found.steps == sum(longest)
    assert found.tokens == sum(row.max_new_tokens for row in works)
    assert found.occupancy == found.tokens / (4 * found.steps)


def test_limit_counts_weights_slots_and_prompts(asked: Any) -> None:
    config, works = tiny(), workload(tiny(), 3, shrink=16)
    params = random_params(config, "float32")
    filled = 0
    for row in works:
        filled += sum(len(row.prompt) + t + 1 for t in range(row.max_new_tokens))
    read = 12 * read_bytes(config, 4) + cache_bytes(config, filled, 4)
    flops = sum(prefill_flops(config, 1, len(row.prompt)) for row in works)
    want = read / CEILINGS.read + flops / CEILINGS.matmul
    assert least_seconds(params, config, works, 12, CEILINGS) == pytest.approx(want)
    slots, static = compare(params, config, works, CEILINGS, slots=4, size=2)
    assert slots.of_limit == pytest.approx(want / slots.seconds)
    assert slots.steps == 12 and slots.occupancy == slots.tokens / 48
    assert static.by == "static batches" and static.stats is None
    assert len(list(compare(params, config, works, CEILINGS, slots=4, size=0))) == 1


def test_answers_of_a_form_are_as_long(asked: Any) -> None:
    works = workload(tiny(), 4, shrink=64)
    tokens = vocabulary(500)
    assert len(tokens) == len({*tokens[:256]}) + 244 and max(map(len, tokens)) == 7
    assert vocabulary(500) == tokens != vocabulary(500)[::-1]
    rows = structured(works, 500)
    for row, work in zip(rows, works, strict=True):
        made = row.structure
        assert made is not None and replace(row, structure=None).key == work.key
        assert made.table[:, 0].max() == MAY_STOP, "an answer may be over early"
        assert (made.table[:, 1:] >= 0).any(axis=1).all()
        ids = [tokens.index(bytes([byte])) for byte in b'{"a": [1, true]},']
        assert not made.is_over(ids)
        assert row.max_new_tokens == work.max_new_tokens
    assert len({id(row.structure) for row in rows}) == 1
    how: Any = {"slots": 4, "size": 0, "forms": True}
    params = random_params(tiny(), "float32")
    found = [*compare(params, tiny(), works, CEILINGS, **how)]
    assert [one.by for one in found] == ["slots", "slots, structured"]
    assert found[0].tokens == found[1].tokens == sum(w.max_new_tokens for w in works)


def command(*words: str) -> int:
    base = ["--shape", "smollm2-135m", "--layers", "1", "--shrink", "16"]
    return main(["bench", "batch", *base, "--rows", "6", "--slots", "4", *words])


def test_command_prints_both_and_the_ratio(asked: Any, capsys: Any) -> None:
    assert command("--static", "2", "--json", "-") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out)
    assert [one["by"] for one in report["batching"]] == ["slots", "static batches"]
    assert report["batching"][0]["stats"]["steps"] == 12 and "rows" not in report
    assert "6 rows, " in captured.err and "useful tokens/s" in captured.err
    assert "x as fast as static batches" in captured.err


def test_command_tells_memory_where_a_device_does(
    asked: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "peak_memory", lambda: 5_260_000_000)
    assert command("--static", "2", "--json", "-") == 0
    captured = capsys.readouterr()
    assert captured.err.count("; 5.3 GB in use at most\n") == 2
    assert json.loads(captured.out)["batching"][1]["peak_bytes"] == 5_260_000_000


def test_command_prints_what_forms_take(asked: Any, capsys: Any) -> None:
    assert command("--static", "0", "--structured") == 0
    assert "x as fast as slots, structured\n" in capsys.readouterr().out


def test_command_says_what_it_does_not_take(capsys: Any) -> None:
    assert command("--versus", "transformers", "--quantize", "int8") == 2
    assert "does not have these int8 weights" in capsys.readouterr().err
    assert main(["bench", "a", "b"]) == 2
    assert "bench: got a b, want one FOLDER" in capsys.readouterr().err
    assert main(["bench", "batch"]) == 2
    assert "either a FOLDER or --shape" in capsys.readouterr().err


def test_command_takes_all_the_slots_there_are(
    asked: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    given: dict[str, Any] = {}

    def compared(*args: Any, **options: Any) -> Any:
        given.update(options)
        numbers = dict.fromkeys(("rows", "tokens", "seconds", "compiled", "steps"), 1)
        yield Measured(by="slots", compile_seconds=0.5, occupancy=1.0, **numbers)

    monkeypatch.setattr(bench_batch, "compare", compared)
    file = tmp_path / "report.json"
    words = ["--shape", "smollm2-135m", "--layers", "1", "--json", str(file)]
    assert main(["bench", "batch", *words]) == 0
    assert given == {"slots": None, "size": 64, "forms": False}
    assert len(json.loads(file.read_text("utf-8"))["batching"]) == 1
