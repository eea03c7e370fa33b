"""The benchmark's report: its lines, its ratios, its warnings."""

import dataclasses

from bench_helpers import CEILINGS, tiny

from jrope.bench.device import Ceilings, Kernel
from jrope.bench.report import Report, Row


def blank(**fields):
    return Row(
        work="decode", by="jrope", sampler="greedy", order="out_in", batch=1,
        context=8, capacity=16, new=4, **fields,
    )  # fmt: skip


def make_report(rows=()):
    return Report(
        model="m", dtype="bfloat16", config=tiny(), command=("jrope",),
        ceilings=CEILINGS, weight_bytes=2, read_bytes=1, rows=rows,
    )  # fmt: skip


def test_higher_ceilings_lower_the_parts():
    row = blank(seconds=0.5, counted=10**9, of_ceiling=2.0)
    report = make_report(rows=(row, blank(problem="no")))
    again = report.with_ceilings(Ceilings(read=4e9, matmul=1e12, transfer=None))
    assert again.ceilings.read == 4e9
    assert again.rows[0].of_ceiling == 0.5
    assert again.rows[1] == report.rows[1]


def test_the_head_names_the_rope_in_full():
    rope = dataclasses.replace(tiny().rope, condense=2)
    config = dataclasses.replace(tiny(), rope=rope)
    report = dataclasses.replace(make_report(), config=config)
    assert report.head()[2].endswith("of weights, rope default of positions / 2")


def test_busy_hosts_are_told(capsys):
    busy = dataclasses.replace(make_report(), busy=2.0)
    assert any(line.startswith("BUSY: the host had 2.0") for line in busy.head())
    idle = dataclasses.replace(busy, busy=0.1)
    assert not any("BUSY" in line for line in idle.head())


def test_lines_hold_kernels_and_ratios():
    kernel = Kernel(name="gemm", microseconds=3.0, launches=2.0)
    known = dict(
        seconds=0.001, spread=0.01, tokens_per_second=1000.0, counted=10**6,
        of_ceiling=0.5, compile_seconds=1.0, kernels=(kernel,), ratio=2.5,
    )  # fmt: skip
    lines = blank(**known).lines()
    assert "1.000 ms" in lines[0]
    assert "50.0%" in lines[0]
    assert "2.50x" in lines[0]
    assert "3.0 us, 2.0 launches" in lines[1]
    assert "100.0%" in lines[2]
    assert blank(problem="too large").lines()[0].endswith("too large")
