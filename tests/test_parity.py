"""The main claim: jrope computes what transformers computes, and says so honestly.

A matrix of tiny random models, each method past its trained length, rows ragged.
"""

import dataclasses
import functools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jrope.checkpoint
import jrope.hf
import jrope.parity
from jrope import cli
from jrope.config import LlamaConfig, nest, with_rope
from jrope.errors import JropeError
from jrope.generate import generate
from jrope.hf import config_from_hf
from jrope.model import forward
from jrope.parity import compare, jrope_stages, place, torch_stages
from jrope.parity_report import Error, Report, Segment, Stage, segment, stage
from jrope.rope import ROPE_TYPES

TRAINED = 32  # every model; rows reach three times as far
LENGTHS = np.array([96, 40, 17])
PAIRS = 8
KINDS = {"MHA": 4, "GQA": 2, "MQA": 1}  # key/value heads of 4


class Method(NamedTuple):
    """A rotary embedding in transformers' words, and what is left to say in ours."""

    parameters: dict[str, Any]
    ours: dict[str, Any] = {}  # noqa: RUF012
    condense: float = 1.0


def hf(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, **fields}


ORIGINAL = {"original_max_position_embeddings": TRAINED}
METHODS = {
    "default": Method(hf("default")),
    "condense": Method(hf("default"), {"condense": 2.5}, 2.5),
    "linear": Method(hf("linear", factor=3.0)),
    "ntk": Method(  # transformers has no such type; its users change theta
        {"rope_type": "default", "rope_theta": 10000.0 * 4 ** (16 / 14)},
        {"method": "ntk", "factor": 4.0},
    ),
    "dynamic": Method(hf("dynamic", factor=2.0)),
    "yarn": Method(hf("yarn", factor=4.0, beta_fast=8.0, **ORIGINAL)),
    "llama3": Method(
        hf("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL)
    ),
    "longrope": Method(
        hf(
            "longrope",
            short_factor=[1 + 0.1 * i for i in range(PAIRS)],
            long_factor=[1 + 0.5 * i for i in range(PAIRS)],
            factor=4.0,
            **ORIGINAL,
        )
    ),
    "proportional": Method(hf("proportional", partial_rotary_factor=0.5, factor=2.0)),
}
each_method = pytest.mark.parametrize("method", METHODS)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_tied = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@pytest.fixture(scope="module")
def make(tiny_hf: Any) -> Any:
    """(torch model, params, config) of a case; asked for again, the same one."""

    import torch

    @functools.cache
    def build(method: str, kind: str, tied: bool) -> tuple[Any, Any, LlamaConfig]:
        parameters, ours, _ = METHODS[method]
        tiny = tiny_hf(
            kv_heads=KINDS[kind],
            tied=tied,
            max_position_embeddings=TRAINED,
            rope_parameters=parameters,
        )
        torch.set_num_threads(1)  # two only wait for each other at this size
        config = config_from_hf(tiny.config)
        if method == "ntk":
            theta = dataclasses.replace(config.rope, theta=10000.0)
            config = dataclasses.replace(config, rope=theta)
        params = nest({name: jnp.asarray(w) for name, w in tiny.weights.items()})
        return tiny.model, params, with_rope(config, **ours)

    return build


def tokens(config: LlamaConfig, count: int, seed: int = 0) -> np.ndarray:
    shape = (len(LENGTHS), count)
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape, np.int32)


def torch_logits(model: Any, row: np.ndarray, condense: float) -> np.ndarray:
    """One sequence without padding, at positions 0, 1, ...: [T, V]."""
    steps = np.arange(row.size)[None]
    return torch_stages(model, row[None], steps, condense=condense)["logits"][0]


def valid(logits: Any) -> np.ndarray:
    """[B, T, V] -> the logits of valid tokens, [tokens, V]."""
    rows = zip(np.asarray(logits), LENGTHS, strict=True)
    return np.concatenate([row[:length] for row, length in rows])


def test_every_method_is_in_the_matrix() -> None:
    assert {*METHODS} == {"default", "condense", *ROPE_TYPES} - {"dynamic-yarn"}


@each_tied
@each_kind
@each_method
def test_logits_in_float32(make: Any, method: str, kind: str, tied: bool) -> None:
    model, params, config = make(method, kind, tied)
    ids, condense = tokens(config, 96), METHODS[method].condense
    got, _ = forward(params, jnp.asarray(ids), config=config, lengths=LENGTHS)
    rows = zip(ids, LENGTHS, strict=True)
    want = [torch_logits(model, row[:length], condense) for row, length in rows]
    error = Error.of(valid(got), np.concatenate(want))
    assert error.of_max <= 2e-5


@each_tied
@each_kind
@each_method
def test_logits_in_bfloat16(make: Any, method: str, kind: str, tied: bool) -> None:
    import torch

    model, params, config = make(method, kind, tied)
    ids, condense = tokens(config, 96), METHODS[method].condense
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    # Compiled as a whole, where XLA is free to drop roundings between operations.
    run = jax.jit(forward, static_argnames=("config",))
    got, _ = run(params, jnp.asarray(ids), config=config, lengths=LENGTHS)
    narrow = rounded_twin(model, torch.bfloat16)
    runs = []
    for twin in (narrow, rounded_twin(narrow, torch.float32)):
        rows = zip(ids, LENGTHS, strict=True)
        runs += [[torch_logits(twin, row[:n], condense) for row, n in rows]]
    theirs, truth = (np.concatenate(r) for r in runs)
    judged = stage("logits", valid(got), truth, theirs)
    assert judged.ratio is not None and judged.ratio <= 1.10
    assert judged.torch is not None and judged.torch.rms < 0.05


def rounded_twin(model: Any, dtype: Any) -> Any:
    """A copy of a torch model with its weights in another dtype."""
    twin = type(model)(model.config).eval().to(dtype)
    weights = {name: w.to(dtype) for name, w in model.state_dict().items()}
    twin.load_state_dict(weights)
    return twin


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The likeliest token; compiles in a fraction of `Sampler`'s time."""

    temperature: float = 0.0

    def __call__(self, logits: jax.Array, keys: Any, seen: Any) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@each_tied
@each_kind
@each_method
def test_greedy_tokens(make: Any, method: str, kind: str, tied: bool) -> None:
    """From past the trained length, across it, and inside."""
    model, params, config = make(method, kind, tied)
    lengths, new = np.array([40, 28, 11]), 10
    ids = tokens(config, 40, seed=1)
    out = generate(
        params,
        ids,
        lengths,
        config=config,
        sampler=Greedy(),
        max_new_tokens=new,
        stop_ids=(),
    )
    condense = METHODS[method].condense
    for row, length, got in zip(ids, lengths, np.asarray(out.tokens), strict=True):
        want = torch_greedy(model, row[:length], new, condense)
        np.testing.assert_array_equal(got, want)


def torch_greedy(
    model: Any, prompt: np.ndarray, new: int, condense: float
) -> list[int]:
    """A whole pass for each token, padded to the planned total.

    The padding makes transformers take jrope's length: prompt + new tokens.
    """
    row = np.concatenate([prompt, np.zeros(new, np.int32)])
    for at in range(prompt.size, row.size):
        row[at] = torch_logits(model, row, condense)[at - 1].argmax()
    return row[prompt.size :].tolist()


# compare


@pytest.fixture(scope="module")
def folder(tiny_hf: Any, tmp_path_factory: Any) -> Path:
    """A tiny model as transformers saves it."""
    import torch

    path = tmp_path_factory.mktemp("tiny")
    tiny = tiny_hf(max_position_embeddings=TRAINED, layers=1)
    tiny.model.save_pretrained(path)
    torch.set_num_threads(1)
    return path


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


def test_condensing_divides_torch_positions_too(make: Any) -> None:
    model, _, config = make("default", "GQA", False)
    ids, places = tokens(config, 8), np.tile(np.arange(8), (3, 1))
    halved = torch_stages(model, ids, places, condense=2.0)["logits"]
    even = torch_stages(model, ids, 2 * places, condense=4.0)["logits"]
    np.testing.assert_array_equal(halved, even)
    plain = torch_stages(model, ids, places)["logits"]
    assert np.abs(plain - halved).max() > 0.1


def test_gaps_do_not_part_sequences(make: Any) -> None:
    model, params, config = make("default", "GQA", False)
    ids = tokens(config, 8)
    places = np.tile(100 * np.arange(8), (3, 1))
    want = torch_stages(model, ids, places)["logits"]
    got = jrope_stages(params, config, ids, places.astype(np.int32))["logits"]
    assert Error.of(got, want).of_max <= 2e-5
    ids[:, 0] = 0  # a first token that later ones see
    assert np.abs(torch_stages(model, ids, places)["logits"] - want)[:, -1].max() > 1e-3


def test_torch_rows_have_no_memory(make: Any) -> None:
    model, _, config = make("dynamic", "GQA", False)
    ids = tokens(config, 8)
    places = np.stack([np.arange(8) + at for at in (200, 60, 0)])
    whole = torch_stages(model, ids, places)["logits"]
    for i in (2, 1, 0):
        alone = torch_stages(model, ids[i : i + 1], places[i : i + 1])["logits"]
        np.testing.assert_array_equal(alone[0], whole[i])


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

    monkeypatch.setattr(jrope.parity, "jrope_stages", watched)
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
    def spoilt(*args: Any) -> Any:
        params, config = jrope.checkpoint.load(*args)
        norm = params["model"]["layers"]["0"]["input_layernorm"]
        step = 1e-4 if dtype == "float32" else 2**-6
        norm["weight"] = norm["weight"] * jnp.asarray(1 + step, norm["weight"].dtype)
        return params, config

    monkeypatch.setattr(jrope.parity, "load", spoilt)
    report = compare(folder, dtype=dtype, count=16)
    assert not report.ok and "FAILED" in report.table()
    assert report.stages[0].jrope.max_abs == 0 < report.stages[1].jrope.max_abs


def test_wrong_method_is_found(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal up to the trained length; a report that looked there only would pass."""
    monkeypatch.setattr(jrope.parity, "config_to_hf", without_scaling)
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


def test_places() -> None:
    want = [[0, 1], [9, 10], [11, 12], [131070, 131071]]
    assert place(None, 2, 10).tolist() == want
    assert place(["trained", 7], 2, 10).tolist() == [[10, 11], [7, 8]]
    assert place(["spread"], 3, 10).tolist() == [[0, 65536, 131071]]


# the report


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


def test_far_positions_have_slack() -> None:
    report = report_of(1.9e-4, None, "float32")
    near = report.segments[0]
    far = dataclasses.replace(near, last=81919)
    assert far.slack == 10 and near.slack == 1
    assert dataclasses.replace(report, segments=(far,)).ok
    assert not dataclasses.replace(report, segments=(far, near)).ok
    assert (
        "both x position / 8192" in dataclasses.replace(report, segments=(far,)).table()
    )


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


# the command


def command(*words: str) -> int:
    return cli.main(["parity", *words, "--no-compile-cache"])


def test_command_prints_tables(folder: Path, capsys: Any) -> None:
    status = command(str(folder), "--tokens", "32", "--dtype", "float32", "bfloat16")
    out = capsys.readouterr().out
    assert status == 0
    assert out.count("\nok: ") == 2 and "layer 0" in out and "16..47 at" in out


def test_command_prints_json(folder: Path, capsys: Any) -> None:
    words = ["--rope", "yarn:factor=4,original=16", "--condense", "2", "--json"]
    words += ["--positions", "0,trained-2", "--tokens", "4", "--dtype", "float32"]
    assert command(str(folder), *words) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert [(s["first"], s["last"]) for s in report["segments"]] == [(0, 3), (14, 17)]
    expected = "Yarn(factor=4, original_length=16) of positions / 2, theta 10000"
    assert report["rope"] == expected


def test_command_fails_past_the_threshold(folder: Path, capsys: Any) -> None:
    words = ["--dtype", "float32", "--tokens", "8", "--threshold", "1e-12"]
    assert command(str(folder), *words) == 1
    assert "FAILED: error of a logit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--positions", "here"], "positions: got 'here'"),
        (["--rope", "yarn:factor=oops"], "--rope"),
        (["--tokens", "0"], "0"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_command_says_what_is_wrong(
    folder: Path, capsys: Any, words: list[str], message: str
) -> None:
    assert command(str(folder), *words) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1
    assert captured.out == ""


def test_command_reads_text(folder: Path, tmp_path: Path, capsys: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"a": 3, "b": 7, "[UNK]": 0}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    tokenizer.save(str(copy / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (copy / "tokenizer_config.json").write_text(json.dumps(kind), "utf-8")
    text = tmp_path / "text.txt"
    text.write_text("a b b\n", "utf-8")
    words = ["--tokens", "3", "--positions", "0", "--dtype", "float32", "--json"]
    assert command(str(copy), "--text", str(text), *words) == 0
    (report,) = json.loads(capsys.readouterr().out)
    same = compare(copy, tokens=[3, 7, 7], count=3, positions=[0])
    assert report["figure"] == same.figure
    text.write_bytes(b"\xff")
    assert command(str(copy), "--text", str(text)) == 2
    assert "not UTF-8" in capsys.readouterr().err


# real weights


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
