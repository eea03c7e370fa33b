"""What `bench` runs: its plan, one compilation a shape, and what fails."""

import dataclasses
import json

from bench_helpers import quick as quick
from bench_helpers import run

from jrope.bench import runs as bench_runs
from jrope.bench.model import named_shape, prefill_flops, step_bytes, with_layers
from jrope.bench.plan import Plan


def test_plan_keeps_arrangements_together():
    plan = Plan(samplers={}, batches=(8, 1, 32), contexts=(16, 8))
    tasks = plan.tasks()
    orders = [task.order for task in tasks]
    assert orders == ["out_in"] * 2 + ["in_out"] * 10
    assert all(t.batch == 1 and t.work == "decode" for t in tasks[:2])
    plan = dataclasses.replace(plan, order="none")
    assert {task.order for task in plan.tasks()} == {"none"}


def test_bench_compiles_a_shape_once_for_all_samplers(monkeypatch, capsys):
    made = []
    program = bench_runs.Program

    class Counted(program):
        def __init__(self, function, *args, **static):
            made.append(function.__name__)
            super().__init__(function, *args, **static)

    monkeypatch.setattr(bench_runs, "Program", Counted)
    assert run("--only", "decode", "--batch", "1,2", "--top-p", "0.9") == 0
    assert made == ["decode", "decode"]
    assert capsys.readouterr().out.count("p=0.9") >= 2


def test_counted_is_what_the_functions_count(capsys):
    assert run("--batch", "2", "--json", "-", "--capacity-factor", "4") == 0
    prompt, step = json.loads(capsys.readouterr().out)["rows"]
    config = with_layers(named_shape("smollm2-135m"), 1)
    assert prompt["counted"] == prefill_flops(config, 2, 64)
    assert step["counted"] == step_bytes(config, 2 * 48 + 2 * 2, 2)
    assert step["capacity"] == 4 * (64 + 16)


def test_caches_too_large_are_rows_with_the_numbers(monkeypatch, capsys):
    monkeypatch.setattr(bench_runs, "memory_limit", lambda: 2 * 10**8)
    assert run("--only", "decode", "--context", "64,256k", "--json", "-") == 1
    good, bad = json.loads(capsys.readouterr().out)["rows"]
    assert good["problem"] is None
    assert "too large: weights 0.01 + cache 0.20 GB" in bad["problem"]
    assert bad["seconds"] is None


def test_failing_shape_is_a_row_and_the_rest_goes_on(monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("INTERNAL: no such kernel")

    monkeypatch.setattr("jrope.bench.share.Prefill", fail)
    assert run("--json", "-") == 1
    captured = capsys.readouterr()
    step, prompt = json.loads(captured.out)["rows"]
    assert step["problem"] is None
    assert prompt["problem"] == "failed: RuntimeError: INTERNAL: no such kernel"
    assert "no such kernel" in captured.err


def test_profile_says_why_a_cpu_has_no_kernels(tmp_path, capsys):
    folder = tmp_path / "traces"
    assert run("--only", "decode", "--profile", str(folder)) == 0
    assert "no kernel table: the trace holds no kernels" in capsys.readouterr().out
    assert list(folder.glob("decode-greedy-b1-c64/**/*.xplane.pb"))
