"""`jrope bench --mesh`: a mesh beside one of its devices."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from bench_helpers import quick as quick
from cli_helpers import fail
from sharding_helpers import CONFIG

import jrope
from jrope.bench.model import SHAPES, random_params
from jrope.cli import main
from jrope.model.placed import layout_on
from jrope.sharding.meshes import layout_of
from jrope.tree import flatten

SHAPE = (64, 32, 48, 1, 4, 2, 8, 1e4, False)  # V, D, F, L, N, K, H, theta, tied
WORDS = ["bench", "--shape", "smollm2-135m", "--context", "8", "--new", "4"]
WORDS += ["--repeat", "1", "--batch", "4", "--json", "-"]


def measured(capsys: Any, *words: str) -> dict[str, Any]:
    assert main([*WORDS, *words]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    monkeypatch.setitem(SHAPES, "smollm2-135m", SHAPE)


def test_a_mesh_is_timed_beside_one_of_its_devices(capsys: Any) -> None:
    report = measured(capsys, "--mesh", "data=2,model=2", "--dtype", "float32")
    assert report["model"]["mesh"] == "data=2,model=2"
    rows = {(row["work"], row["by"]): row for row in report["rows"]}
    assert len(rows) == len(report["rows"]) == 4
    own, one = (rows["decode", by] for by in ("jrope", "jrope, one device"))
    assert one["ratio"] == pytest.approx(one["seconds"] / own["seconds"])
    # by hand: head, q, o, gate, up, down and k, v are halved, norms are not
    split, norms = 64 * 32 + 2 * 32 * 32 + 3 * 32 * 48 + 2 * 16 * 32, 3 * 32
    slots = 4 * 6 + 4 * 4 // 2  # four rows, six filled of the mean, two new
    cache = 2 * 2 * 8 * slots
    assert one["counted"] == 4 * (split + norms + cache)
    assert own["counted"] == 4 * (split // 2 + norms + cache // 4)
    assert own["memory_bytes"] < one["memory_bytes"]
    for row in rows.values():
        assert row["batch"] == 4 and row["problem"] is None
        tokens = 4 * (row["context"] if row["work"] == "prefill" else 1)
        speed = tokens / row["seconds"]
        assert row["tokens_per_second"] == pytest.approx(speed)
    prompts = [rows["prefill", by]["counted"] for by in ("jrope", "jrope, one device")]
    assert 4 * prompts[0] == prompts[1]


def test_a_prompt_may_be_split_and_weights_int8(capsys: Any) -> None:
    report = measured(capsys, "--mesh", "context=2,model=2", "--quantize", "int8")
    assert [row["problem"] for row in report["rows"]] == [None] * 4


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_random_weights_are_made_where_they_stand(quantize: Any) -> None:
    there = layout_on(jrope.mesh("fsdp=2,model=4"), CONFIG)
    made = random_params(CONFIG, jnp.bfloat16, quantize, there)
    assert layout_of(made) == there
    want = flatten(random_params(CONFIG, jnp.bfloat16, quantize))
    for name, x in flatten(made).items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(want[name]), name)
        assert len(x.sharding.device_set) == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mesh", "model=16"], "nearest that fits is model=8"),
        (["--mesh", "modle=2"], "did you mean 'model'"),
        (["--mesh", "model=4"], "does not divide num_key_value_heads 2 over model=4"),
        (["--mesh", "data=8"], "does not divide 4 rows over data=8"),
        (["--mesh", "model=2", "--speculate", "prompt"], "--speculate runs on one"),
        (["--mesh", "model=2", "--versus", "transformers"], "--versus runs on one"),
    ],
)
def test_what_cannot_be_is_one_line(
    capsys: Any, words: list[str], message: str
) -> None:
    assert message in fail(capsys, *WORDS, *words)
