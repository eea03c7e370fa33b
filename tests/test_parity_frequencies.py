"""Frequencies a few ulp from PyTorch's: told by name, and no failure of the model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from parity_helpers import PAIRS
from parity_helpers import folder as folder
from rope_cases import HF_CASES

import jrope.rope.frequencies
import jrope.rope.methods
from jrope.parity import compare, comparison, torch_side, torch_stages
from jrope.parity.frequencies import compare_frequencies, limit
from jrope.rope import DynamicNTK, Rope

METHODS: dict[str, Any] = {
    "default": None,
    "yarn": ("yarn", {"factor": 4.0}),
    "dynamic": ("dynamic", {"factor": 2.0}),
    "longrope": (
        "longrope",
        {
            "short_factor": (1.0,) * PAIRS,
            "long_factor": (4.0,) * PAIRS,
            "original": 16,
        },
    ),
}
PLACES = ["0", "trained-4", 131064, "spread"]


def nudge(monkeypatch: pytest.MonkeyPatch, ulps: int) -> None:
    """Make PyTorch's first frequency smaller, whenever it is computed."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    def nudged(function: Any) -> Any:
        def compute(*args: Any, **kwargs: Any) -> Any:
            inv_freq, scaling = function(*args, **kwargs)
            inv_freq.view(torch.int32)[0] -= ulps
            return inv_freq, scaling

        return compute

    for kind, function in ROPE_INIT_FUNCTIONS.items():
        monkeypatch.setitem(ROPE_INIT_FUNCTIONS, kind, nudged(function))
    name = "compute_default_rope_parameters"
    plain = staticmethod(nudged(getattr(LlamaRotaryEmbedding, name)))
    monkeypatch.setattr(LlamaRotaryEmbedding, name, plain)


@pytest.mark.parametrize("name", METHODS)
def test_one_ulp_is_told_and_passes(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nudge(monkeypatch, 1)
    report = compare(folder, count=8, positions=PLACES, rope=METHODS[name])
    assert report.ok and 0 < report.figure < 5e-6
    first = [d for d in report.frequencies.differences if d.pair == 0]
    depends = name in ("dynamic", "longrope")
    lengths = [8, report.trained_length + 4, 131072] if depends else [None]
    assert [d.length for d in first] == lengths
    assert report.frequencies.count == PAIRS * len(lengths)
    assert {d.ulps for d in first} == {1}
    assert all(0 < d.jrope - d.torch < 1e-7 for d in first)
    assert "up to 1 ulp from this PyTorch's, allowed 4 (pair 0 " in report.table()
    words = json.loads(report.to_json())["frequencies"]["differences"]
    assert words[0] == {
        "length": lengths[0],
        "pair": 0,
        "jrope": first[0].jrope,
        "torch": first[0].torch,
        "ulps": 1,
    }


@pytest.mark.parametrize("name", METHODS)
def test_with_its_own_frequencies_it_would_fail(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def own(*args: Any, inv_freq: Any, **kwargs: Any) -> Any:
        assert inv_freq is not None
        return torch_stages(*args, **kwargs)

    nudge(monkeypatch, 1)
    monkeypatch.setattr(comparison, "torch_stages", own)
    assert not compare(folder, count=8, positions=PLACES, rope=METHODS[name]).ok


def test_more_than_the_last_bits_fail(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the logits do not show it."""
    nudge(monkeypatch, 5)
    report = compare(folder, count=4, positions=[0])
    assert report.figure <= report.limit and not report.ok
    assert "5 ulp from this PyTorch's, allowed 4" in report.table()
    assert "each side its own\nFAILED: " in report.table()


def test_given_frequencies_replace_torchs(tiny_hf: Any) -> None:
    model = tiny_hf(layers=1).model
    ids, places = np.array([[3, 4, 5]]), np.array([[0, 7, 90]])
    own = torch_side.torch_frequencies(model, places)
    want = torch_stages(model, ids, places)["logits"]
    same = torch_stages(model, ids, places, inv_freq=own)["logits"]
    np.testing.assert_array_equal(same, want)
    other = torch_stages(model, ids, places, inv_freq=own * np.float32(0.5))["logits"]
    half = torch_stages(model, ids, places, condense=2.0)["logits"]
    np.testing.assert_array_equal(other, half)


@pytest.mark.parametrize("name", HF_CASES)
def test_the_limit_is_what_a_power_one_ulp_away_makes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    powers, random = jrope.rope.frequencies.wavelength_powers, np.random.default_rng(0)

    def away(*args: Any) -> np.ndarray:
        right = powers(*args)
        steps = random.integers(-1, 2, right.size, np.int32)
        return (right.view(np.int32) + steps).view(np.float32)

    for case in HF_CASES[name]:
        rope = case.rope()
        lengths = np.array([case.trained, 131072])
        if isinstance(rope.scaling, DynamicNTK):
            continue  # its powers are of another base at each length
        right = np.broadcast_to(rope.frequencies(lengths)[0], (2, rope.rotary_dim // 2))
        with monkeypatch.context() as patch:
            for module in (jrope.rope.frequencies, jrope.rope.methods):
                patch.setattr(module, "wavelength_powers", away)
            for _ in range(20):
                other = np.broadcast_to(rope.frequencies(lengths)[0], right.shape)
                found = compare_frequencies(rope, right.copy(), other.copy(), lengths)
                assert found.ok, found.line()


def test_limit_of_a_steep_ramp() -> None:
    (case, *_) = HF_CASES["llama3"]
    scaling = case.rope().scaling
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    want = int(4 + 4 * scaling.factor * low / (high - low))
    assert limit(case.rope()) == want > 4


def test_line_names_the_largest_first() -> None:
    rope = Rope(theta=10000.0, rotary_dim=16)
    ours = rope.frequencies(None)[0][None]
    theirs = (ours.view(np.int32) + np.array([0, 1, 1, 0, 3, 1, 1, 0], np.int32)).view(
        np.float32
    )
    found = compare_frequencies(rope, ours, theirs, np.array([9]))
    assert found.line().startswith(
        "frequencies: 5 of 8 up to 3 ulp from this PyTorch's, allowed 4 (pair 4 0.0"
    )
    assert found.line().endswith(" and 2 more); compared with jrope's on both sides")
    assert compare_frequencies(rope, ours, ours, np.array([9])).line() == ""
