"""`compare`: every method at far positions, and what is wrong is found."""

import os
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest
from parity_helpers import METHODS, PAIRS, TRAINED
from parity_helpers import folder as folder

import jrope.hf.checkpoint
import jrope.hf.config
from jrope.errors import JropeError
from jrope.model.config import LlamaConfig
from jrope.model.with_rope import with_rope
from jrope.parity import compare, comparison, jrope_stages, place, torch_side
from jrope.parity.report import Error, NotFinite

OVERRIDES: dict[str, dict[str, Any]] = {
    "default": {},
    "condense": {"condense": 2.5},
    "linear": {"rope": ("linear", {"factor": 3.0})},
    "ntk": {"rope": ("ntk", {"factor": 4.0})},
    "dynamic": {"rope": ("dynamic", {"factor": 2.0})},
    "yarn": {"rope": ("yarn", {"factor": 4.0})},
    "yarn and condense": {"rope": ("yarn", {"factor": 4.0}), "condense": 2.0},
    "llama3": {
        "rope": ("llama3", {"factor": 4.0, "low_freq_factor": 1, "high_freq_factor": 4})
    },
    "longrope": {
        "rope": (
            "longrope",
            {
                "short_factor": (1.0,) * PAIRS,
                "long_factor": (4.0,) * PAIRS,
                "original": 16,
            },
        )
    },
    "proportional": {"rope": ("proportional", {"partial_rotary_factor": 0.5})},
}


def test_every_method_is_an_override() -> None:
    assert {*OVERRIDES} == {*METHODS, "yarn and condense"}


@pytest.mark.parametrize("name", OVERRIDES)
def test_override_at_far_positions(folder: Path, name: str) -> None:
    positions = ["0", "trained-4", "trained+4", 131064, "spread"]
    report = compare(folder, count=8, positions=positions, **OVERRIDES[name])
    assert report.ok and report.figure > 0
    assert [part.last for part in report.segments][-2:] == [131071, 131071]
    assert [part.first for part in report.segments][3] == 131064


def test_report_has_every_stage(folder: Path) -> None:
    report = compare(folder, count=8)
    names = [stage.name for stage in report.stages]
    assert names == ["embeddings", "layer 0", "final norm", "logits"]
    assert report.stages[0].jrope == Error(max_abs=0, of_max=0, rms=0, typical=0)
    where = [(s.first, s.last, s.logits.name) for s in report.segments]
    assert where == [
        (0, 7, "inside"),
        (28, 35, "at"),
        (36, 43, "past"),
        (131064, 131071, "past"),
    ]
    assert all(s.top1 == 1 and 0 <= s.kl < 1e-9 for s in report.segments)
    assert all(s.ratio is None for s in report.stages)
    assert report.trained_length == TRAINED


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_yardstick(folder: Path, dtype: str) -> None:
    report = compare(folder, dtype=dtype)
    assert report.ok and report.limit == 1.10
    assert 0.7 < report.figure <= 1.10
    assert report.stages[-1].ratio == report.figure
    last = report.stages[-1].torch
    assert last is not None and 1e-4 < last.typical < 0.05


def test_16_bit_segments_are_run_with_other_tokens(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def watched(params: Any, config: Any, ids: Any, places: Any) -> Any:
        seen.append((ids, places))
        return jrope_stages(params, config, ids, places)

    monkeypatch.setattr(comparison, "jrope_stages", watched)
    report = compare(folder, dtype="bfloat16", count=4, positions=[0, 9])
    ((ids, places),) = seen
    assert ids.shape == places.shape == (16, 4)
    assert places[:, 0].tolist() == [0] * 8 + [9] * 8
    assert len({tuple(row) for row in ids.tolist()}) == 16
    assert [part.first for part in report.segments] == [0, 9]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wrong_weights_are_found(
    folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoilt(*args: Any, **how: Any) -> Any:
        params, config = jrope.hf.checkpoint.load(*args, **how)
        norm = params["model"]["layers"]["0"]["input_layernorm"]
        step = 1e-4 if dtype == "float32" else 2**-6
        norm["weight"] = norm["weight"] * jnp.asarray(1 + step, norm["weight"].dtype)
        return params, config

    monkeypatch.setattr(comparison, "load", spoilt)
    report = compare(folder, dtype=dtype, count=16)
    assert not report.ok and "FAILED" in report.table()
    assert report.stages[0].jrope.max_abs == 0 < report.stages[1].jrope.max_abs


def test_wrong_method_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal up to the trained length; a report that looked there only would pass."""
    monkeypatch.setattr(torch_side, "config_to_hf", without_scaling)
    report = compare(folder, rope=("dynamic", {"factor": 2.0}), count=8)
    errors = {part.logits.name: part.logits.jrope.of_max for part in report.segments}
    assert not report.ok
    assert errors["inside"] <= 2e-5 < 1e-3 < errors["past"]


def without_scaling(config: LlamaConfig) -> dict[str, Any]:
    return jrope.hf.config_to_hf(with_rope(config, "default"))


def test_tokens_are_cut_into_segments(folder: Path) -> None:
    first = compare(folder, tokens=[5, 6, 7, 8, 9], count=4, positions=[0, 50])
    again = compare(folder, tokens=[5, 6, 7, 8, 9, 5, 6, 7], count=4, positions=[0, 50])
    other = compare(folder, tokens=[5, 6, 7, 8, 1], count=4, positions=[0, 50])
    assert first == again
    assert other.segments[0] == first.segments[0]
    assert other.segments[1] != first.segments[1]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"dtype": "float64"}, "dtype: got 'float64', want one of float32"),
    "no tokens": ({"tokens": []}, "tokens: got 0 of float64, want at least one"),
    "tensors": ({"tokens": [[1, 2], [3]]}, r"a builtins.list unlike.*\.tolist\(\)"),
    "vocabulary": ({"tokens": [3, 61]}, "integers from 0 to 60"),
    "count": ({"count": 0}, "tokens: got 0 a segment, want at least 1"),
    "word": ({"positions": ["trained*2"]}, r"positions: got 'trained\*2'.*want"),
    "negative": ({"positions": ["trained-33"]}, r"'trained-33' \(trained: 32\)"),
    "minus": ({"positions": [-1]}, "positions: got -1"),
    "none": ({"positions": []}, "want at least one"),
    "far": ({"positions": [2**31]}, "all below 2\\*\\*31"),
    "method": ({"rope": "yarm"}, "did you mean 'yarn'"),
    "dynamic-yarn": ({"rope": "dynamic-yarn"}, "transformers has no dynamic YaRN"),
    "both": (
        {"rope": ("dynamic", {"factor": 2.0}), "condense": 2.0},
        "nothing to compare with",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(folder: Path, name: str) -> None:
    arguments, message = BAD[name]
    with pytest.raises(JropeError, match=message):
        compare(folder, **arguments)


def test_missing_torch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(JropeError, match=r"parity needs torch.*pip install torch"):
        compare(folder, count=4)


def test_transformers_is_quiet_and_then_as_before() -> None:
    import logging

    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_info()
    try:
        with torch_side.quiet(transformers):
            assert transformers.logging.get_verbosity() == logging.ERROR
        assert transformers.logging.get_verbosity() == logging.INFO
    finally:
        transformers.logging.set_verbosity(before)


def test_torch_that_transformers_does_not_take(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.setattr(transformers, "is_torch_available", lambda: False)
    with pytest.raises(JropeError, match=r"does not take torch 2.*pip install --up"):
        compare(folder, count=4)


def test_torch_tensors_as_tokens(folder: Path) -> None:
    import torch

    listed = compare(folder, tokens=[5, 6, 7], count=3, positions=[0])
    given: Any = torch.tensor([5, 6, 7])
    assert compare(folder, tokens=given, count=3, positions=[0]) == listed
    away: Any = torch.ones(3, dtype=torch.long, device="meta")
    with pytest.raises(JropeError, match=r"tokens: got a torch.Tensor.*\.tolist\(\)"):
        compare(folder, tokens=away, count=3, positions=[0])


@pytest.fixture(scope="module")
def loud(tiny_hf: Any, tmp_path_factory: Any) -> Path:
    """A model whose second layer is past what float16 holds."""
    path = tmp_path_factory.mktemp("loud")
    model = tiny_hf(max_position_embeddings=TRAINED).model
    for part in (
        model.model.layers[1].mlp.up_proj,
        model.model.layers[1].mlp.down_proj,
    ):
        part.weight.mul_(1000)
    model.save_pretrained(path)
    return path


def test_overflow_is_named_on_both_sides(loud: Path) -> None:
    report = compare(loud, count=4, positions=[0], dtype="float16")
    assert report.not_finite == NotFinite(jrope="layer 1", torch="layer 1")
    assert not report.ok and report.stages == report.segments == ()
    assert "nan" not in report.table() and report.table().count("\n") == 1
    assert compare(loud, count=4, positions=[0], dtype="bfloat16").not_finite is None


@pytest.mark.parametrize("side", ["jrope", "torch"])
def test_one_side_that_is_not_finite(
    folder: Path, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = getattr(comparison, f"{side}_stages")

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        stages = run(*args, **kwargs)
        stages["final norm"][0, 1, 2] = float("inf")
        stages["logits"][:] = float("nan")
        return stages

    monkeypatch.setattr(comparison, f"{side}_stages", spoilt)
    report = compare(folder, count=4, positions=[0])
    found = {"jrope": None, "torch": None, side: "final norm"}
    assert report.not_finite == NotFinite(**found) and not report.ok


def test_places() -> None:
    want = [[0, 1], [9, 10], [11, 12], [131070, 131071]]
    assert place(None, 2, 10).tolist() == want
    assert place(["trained", 7], 2, 10).tolist() == [[10, 11], [7, 8]]
    assert place(["spread"], 3, 10).tolist() == [[0, 65536, 131071]]


# Real weights


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_real_model(dtype: str) -> None:
    report = compare(os.environ["JROPE_SMOLLM2"], dtype=dtype)
    assert report.ok, report.table()


STORIES = os.environ.get("JROPE_STORIES260K") or Path(__file__).parents[2].joinpath(
    "shared", "data", "stories260K"
)


@pytest.mark.skipif(not Path(STORIES).is_dir(), reason="no stories260K folder")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_tiny_model(dtype: str) -> None:
    report = compare(STORIES, dtype=dtype)
    assert report.ok, report.table()
