"""The report of a comparison: what passes, as numbers and as a table."""

import dataclasses
import json

import numpy as np

from jrope.parity.frequencies import Frequencies
from jrope.parity.report import Error, NotFinite, Report, Segment, Stage, segment


def report_of(ours: float, theirs: float | None, dtype: str = "bfloat16") -> Report:
    def error(size: float) -> Error:
        return Error(max_abs=size, of_max=size, rms=size, typical=size)

    torch = None if theirs is None else error(theirs)
    logits = Stage(name="inside", jrope=error(ours), torch=torch)
    return Report(
        model="folder",
        dtype=dtype,
        rope="plain RoPE",
        trained_length=8,
        frequencies=Frequencies(count=8, limit=4, differences=()),
        stages=(logits,),
        segments=(Segment(first=0, last=3, logits=logits, top1=1.0, kl=0.0),),
        threshold=2e-5,
    )


def test_what_passes() -> None:
    assert report_of(2e-5, None, "float32").ok
    assert not report_of(2.1e-5, None, "float32").ok
    assert report_of(1.1e-3, 1.0e-3).ok
    assert not report_of(1.2e-3, 1.0e-3).ok
    assert report_of(0.0, 0.0).ok
    assert not report_of(1e-9, 0.0).ok
    assert not report_of(np.nan, 1.0).ok
    assert not report_of(np.nan, None, "float32").ok


def test_far_positions_have_no_slack() -> None:
    report = report_of(2.1e-5, None, "float32")
    far = dataclasses.replace(report.segments[0], first=131008, last=131071)
    assert not dataclasses.replace(report, segments=(far,)).ok


def test_not_finite_is_one_line() -> None:
    report = dataclasses.replace(
        report_of(1e-6, None, "float16"),
        not_finite=NotFinite(jrope="layer 0", torch="layer 3"),
        stages=(),
        segments=(),
    )
    assert not report.ok and json.loads(report.to_json())["figure"] is None
    title, line = report.table().splitlines()
    assert title == "folder in float16, plain RoPE"
    assert line == (
        "FAILED: NaN or infinity: jrope from layer 0 on and PyTorch from layer 3 on, "
        "nothing to compare; float16 ends at 65504, take bfloat16 or float32; "
        "jrope.load(..., check_finite=True) names weights that are NaN or infinite"
    )
    alone = NotFinite(jrope=None, torch="logits").line("bfloat16")
    assert "infinity: PyTorch from logits on (jrope is finite), n" in alone
    assert "float16" not in alone.replace("bfloat16", "")


def test_one_segment_that_is_nan_fails() -> None:
    good, bad = (report_of(size, None, "float32") for size in (1e-6, np.nan))
    for segments in (good.segments + bad.segments, bad.segments + good.segments):
        assert not dataclasses.replace(good, segments=segments).ok


def test_errors_in_numbers() -> None:
    want = np.array([[[3.0, 4.0], [0.0, 10.0]]], np.float32)
    got = want + np.array([[[0.3, -0.4], [0.0, 0.1]]], np.float32)
    error = Error.of(got, want)
    figures = error.max_abs, error.of_max, error.rms, error.typical
    expected = 0.4, 0.04, (0.26 / 125) ** 0.5, (0.1 * 0.01) ** 0.5
    np.testing.assert_allclose(figures, expected, rtol=1e-5)
    assert Error.of(np.full_like(want, np.nan), want).max_abs != 0


def test_divergence_and_agreement() -> None:
    want = np.log(np.array([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], np.float32))
    got = np.log(np.array([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]], np.float32)) + 7
    part = segment(8, np.array([8, 9]), got, want, None)
    assert part.top1 == 0.5 and part.logits.name == "past"
    np.testing.assert_allclose(part.kl, 0.25 * np.log(2) / 2, rtol=1e-5)


def test_json_says_everything() -> None:
    words = json.loads(report_of(np.nan, 1.0).to_json())
    assert words["ok"] is False and words["figure"] is None and words["limit"] == 1.1
    assert words["segments"][0]["logits"]["jrope"]["rms"] is None
    assert words["segments"][0]["logits"]["torch"]["rms"] == 1.0


def test_table_for_reading() -> None:
    assert report_of(1e-3, 1e-3).table().splitlines() == [
        "folder in bfloat16, plain RoPE",
        "stage         max abs    of max   rel RMS   typical PyTorch's     ratio",
        "inside       1.00e-03  1.00e-03  1.00e-03  1.00e-03  1.00e-03     1.000",
        "",
        "logits at     max abs    of max   rel RMS   typical PyTorch's     ratio"
        "     top-1        KL",
        "0..3 inside  1.00e-03  1.00e-03  1.00e-03  1.00e-03  1.00e-03     1.000"
        "   100.00%   0.0e+00",
        "",
        "ok: error of a logit 1 times PyTorch's, allowed 1.1",
    ]
