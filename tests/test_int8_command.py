"""8-bit weights: what the commands count, refuse and measure."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from bench_helpers import quick as quick
from int8_helpers import (
    EMBEDDED,
    middling,
)
from model_helpers import assert_equal

from jrope.bench.model import (
    named_shape,
    random_params,
    read_bytes,
    step_bytes,
    with_layers,
)
from jrope.bench.runs import Prefill
from jrope.cli import bench, main
from jrope.cli import generate as cli_generate
from jrope.generation.run import stream
from jrope.hf.checkpoint import load
from jrope.lab.journal import read_journal
from jrope.tree import flatten
from jrope.weights.fuse import fuse
from jrope.weights.int8 import quantize, weight_bytes

# bench


@pytest.mark.parametrize("tied", [True, False])
def test_random_integers_are_shaped_like_quantised_weights(tied: bool) -> None:
    config = dataclasses.replace(
        with_layers(named_shape("smollm2-135m"), 1),
        vocab_size=64,
        tie_word_embeddings=tied,
    )
    made = flatten(random_params(config, jnp.bfloat16, "int8"))
    want = flatten(quantize(random_params(config, jnp.bfloat16)))
    assert {*made} == {*want}
    for name, x in made.items():
        assert (x.shape, x.dtype) == (want[name].shape, want[name].dtype), name
        if x.dtype == jnp.int8:
            whole = np.asarray(x)
            assert whole.min() == -127 and whole.max() == 127
            scale = np.asarray(made[name.replace("weight", "scale")])
            np.testing.assert_allclose(scale * 127, 0.02, rtol=1e-6)
    sizes = weight_bytes(config, 2, "int8")
    assert sum(sizes.values()) == sum(x.nbytes for x in made.values())


def test_bytes_are_those_by_hand() -> None:
    config = named_shape("llama3-8b")
    d, f, layers, v, kv = 4096, 14336, 32, 128256, 1024
    layer = d * d + 2 * kv * d + d * d + 3 * d * f  # q, k, v, o; gate, up, down
    rows = d + 2 * kv + d + 2 * f + d
    norms = (2 * layers + 1) * d * 2
    head = v * d + 4 * v
    want = layers * (layer + 4 * rows) + norms + head
    assert read_bytes(config, 2, "int8") == want
    assert sum(weight_bytes(config, 2, "int8").values()) == want + v * d * 2
    slots = 10 * 2 * layers * kv * 2
    assert step_bytes(config, 10, 2, "int8") == want + slots
    assert step_bytes(config, 10, 2) == read_bytes(config, 2) + slots
    assert round(read_bytes(config, 2) / want, 3) == 1.998


def test_bench_counts_integers_and_scales(capsys: Any) -> None:
    words = ["--shape", "smollm2-135m", "--layers", "1", "--context", "64"]
    words += ["--new", "4", "--repeat", "1", "--batch", "1,2", "--only", "decode"]
    words += ["--json", "-"]
    assert main(["bench", *words, "--quantize", "int8"]) == 0
    out, err = capsys.readouterr()
    assert "1 layers, bfloat16, int8 weights: 5.94 MB of weights" in err
    report, config = json.loads(out), with_layers(named_shape("smollm2-135m"), 1)
    assert report["model"]["quantize"] == "int8"
    assert report["model"]["dtype"] == "bfloat16"
    bytes_ = sum(weight_bytes(config, 2, "int8").values())
    assert report["model"]["weight_bytes"] == report["model"]["read_bytes"] == bytes_
    for row, filled in zip(report["rows"], (64 + 2, 2 * 48 + 2 * 2), strict=True):
        assert row["counted"] == step_bytes(config, filled, 2, "int8")
        at_best = row["counted"] / row["seconds"] / report["ceilings"]["read"]
        assert row["of_ceiling"] == pytest.approx(at_best)
        assert row["memory_bytes"] < 1.5 * bytes_
    assert {row["order"] for row in report["rows"]} == {"out_in"}


def test_bench_takes_a_folder(capsys: Any) -> None:
    words = ["--context", "16", "--new", "2", "--repeat", "1", "--fuse", "none"]
    words += ["--only", "prefill"]
    words += ["--quantize", "int8", "--json", "-"]
    assert main(["bench", str(EMBEDDED), *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["order"] for row in report["rows"]} == {"none"}
    assert report["load_seconds"] > 0


def test_prefill_runs_in_the_loops_arrangement() -> None:
    config, params = middling(1, "bfloat16")
    work = Prefill(params, config, 1, 32, 32)
    assert work.run() > 0


# the command line


@pytest.mark.parametrize(
    "words, message",
    [
        (["generate", EMBEDDED, "x", "--quantize", "int3"], "invalid choice: 'int3'"),
        (["evaluate", EMBEDDED, "--quantize", "8"], "invalid choice: '8'"),
        (["bench", EMBEDDED, "--quantize"], "--quantize: expected one argument"),
        (["bench", EMBEDDED, "--quantize", "int8", "--fuse", "in_out"], "lie out_in"),
        (
            ["bench", EMBEDDED, "--quantize", "int8", "--versus", "transformers"],
            "transformers does not have these int8 weights",
        ),
        (["generate", "/no/folder", "x", "--quantize", "int8"], "no folder /no/folder"),
    ],
)
def test_wrong_arguments_are_one_line(
    words: list[Any], message: str, capsys: Any
) -> None:
    assert main([str(word) for word in words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("jrope: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_weights_that_fit_only_as_integers(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench, "memory_limit", lambda: 70 * 10**9)
    assert main(["bench", "--shape", "llama3-70b", "--quantize", "int8"]) == 2
    assert "71.6 GB of int8 weights" in capsys.readouterr().err


def test_generate_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The text alone would not tell: 48 greedy tokens are those of wide weights."""
    given: list[Any] = []

    def spy(params: Any, *args: Any, **options: Any) -> Any:
        given.append(params)
        return stream(params, *args, **options)

    monkeypatch.setattr(cli_generate, "stream", spy)
    words = ["Emma had never been", "--max-new-tokens", "8", "--dtype", "float32"]
    assert main(["generate", str(EMBEDDED), *words, "--quantize", "int8"]) == 0
    params, _ = load(EMBEDDED, "float32")
    assert_equal(given[0], fuse(quantize(params)))
    assert len(capsys.readouterr().out) > 10


def evaluate(path: Path, *words: object, status: int = 0) -> float:
    """The perplexity's logarithm on the embedded model's unseen text."""
    text = ("--text", EMBEDDED / "held_out.txt", "--context", 256, "--stride", 256)
    command = ["evaluate", EMBEDDED, *text, "--out", path, "--tokens", 8192, *words]
    assert main([str(word) for word in command]) == status
    (nll,) = (r["nll"] for r in read_journal(path) if r.get("windows") == "sliding")
    return nll


def test_perplexity_of_the_embedded_model_hardly_changes(
    tmp_path: Path, capsys: Any
) -> None:
    """And a journal is gone on with only as it was begun."""
    plain, narrow = tmp_path / "plain.jsonl", tmp_path / "int8.jsonl"
    before = evaluate(plain, "--dtype", "float32")
    after = evaluate(narrow, "--dtype", "float32", "--quantize", "int8")
    assert before != after
    assert abs(np.expm1(after - before)) < 0.003
    assert "float32, int8 weights" in capsys.readouterr().out
    kept = narrow.read_bytes()
    evaluate(narrow, "--dtype", "float32", "--quantize", "int8")
    assert narrow.read_bytes() == kept, "nothing was measured again"
    evaluate(narrow, "--dtype", "float32", status=2)
    err = capsys.readouterr().err
    assert "a run with dtype float32, int8 weights (now float32): run it as" in err
    evaluate(plain, "--dtype", "float32", "--quantize", "int8", status=2)
