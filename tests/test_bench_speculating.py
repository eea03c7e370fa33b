"""`jrope bench --speculate`: passes, texts with guesses and without, the command."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from bench_helpers import quick as quick
from bench_helpers import tiny

from jrope.bench import speculating
from jrope.bench.model import random_params
from jrope.bench.speculating import Guessed, Speculated, measure
from jrope.cli import bench_speculate, main
from jrope.errors import JropeError
from jrope.generation.guesser import Draft, PromptLookup
from jrope.model.config import LlamaConfig

NEW = 6
SHAPE = {"batch": 2, "context": 9, "new": NEW, "repeats": 1, "patience": 9.0}
BASE = ["bench", "--shape", "smollm2-135m", "--layers", "1", "--speculate"]


@pytest.fixture(scope="module")
def shaped() -> tuple[Any, LlamaConfig]:
    config = tiny()
    return random_params(config, jnp.float32), config


def test_prompts_repeat_or_do_not(shaped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculating, "PIECE", 4)
    given = shaped[1], 2, 10, NEW
    repeating = speculating._request(*given, "repeats", PromptLookup(3))
    rows = repeating.prompt[:, :10]
    np.testing.assert_array_equal(rows[:, :4], rows[:, 4:8])
    np.testing.assert_array_equal(rows[:, :2], rows[:, 8:])
    assert repeating.max_new_tokens == NEW + 1
    assert (repeating.sampling.stop_ids < 0).all()  # none ends a row
    other = speculating._request(*given, "does not repeat", None)
    assert [len({*row}) for row in other.prompt[:, :10].tolist()] == [10, 10]
    assert float(np.asarray(other.sampling.sampler.temperature).max()) == 1


def test_a_draft_that_is_the_model_saves_passes(shaped: Any) -> None:
    params, config = shaped
    found = measure(params, config, Draft(params, config, 2), **SHAPE)
    assert [text.text for text in found.texts] == ["repeats", "does not repeat"]
    for text in found.texts:  # the same keys draw the same tokens
        assert (text.passes, text.steps) == (NEW // 3, NEW)
        assert text.seconds > 0 and text.plain_seconds > 0
    assert found.pass_seconds > 0 and found.step_seconds > 0


def test_a_pass_takes_no_guess(shaped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is timed over as many new tokens as a step of one."""
    params, config = shaped
    request = speculating._request(config, 2, 9, NEW, "repeats", PromptLookup(3))
    seen: list[Any] = []
    inner = speculating._many

    def watched(*given: Any, **options: Any) -> Any:
        seen.append((given[3].shape, inner(*given, **options)))
        return seen[-1][1]

    monkeypatch.setattr(speculating, "_many", watched)
    assert speculating._passes(params, config, request, 3, NEW) > 0
    (shape, (cache, rows)) = seen[0]
    assert shape == (2, 3)
    assert cache.lengths.tolist() == [9 + NEW] * 2 and rows.lengths.tolist() == [7, 7]


def test_a_run_that_fails_says_which() -> None:
    def fails() -> float:
        raise JropeError("too large")

    with pytest.raises(JropeError, match="guessed: too large"):
        speculating._medians({"guessed": fails, "plain": lambda: 1.0}, 1, 9.0)


def test_command_prints_ratios(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    given: list[Any] = []

    def measured(params: Any, config: Any, guesser: Any, **how: Any) -> Speculated:
        given.append((guesser, how["batch"], how["context"], how["new"]))
        text = Guessed(
            text="repeats", seconds=1.0, plain_seconds=2.5, passes=4, steps=10
        )
        times = {"step_seconds": 0.001, "pass_seconds": 0.0015}
        shape = {"batch": how["batch"], "context": how["context"], "tokens": 3}
        return Speculated(**shape, **times, texts=(text,))

    monkeypatch.setattr(bench_speculate, "measure", measured)
    words = ["prompt:3", "--batch", "1,2", "--context", "8", "--json", "-"]
    assert main([*BASE, *words]) == 0
    out, err = capsys.readouterr()
    assert given == [(PromptLookup(3), batch, 8, 64) for batch in (1, 2)]
    assert "2 x 8: a pass over 4 tokens takes 1.50x a step of one, 1.000 ms\n" in err
    assert "repeats: 2.50x as fast as without guesses, 2.50 tokens a pass\n" in err
    report = json.loads(out)
    assert [one["batch"] for one in report["speculation"]] == [1, 2]
    assert report["speculation"][0]["texts"][0]["passes"] == 4


@pytest.mark.parametrize(
    ("first", "last"), [(["batch"], []), ([], ["--versus", "transformers"])]
)
def test_command_says_what_it_does_not_go_with(
    first: list[str], last: list[str], capsys: Any
) -> None:
    assert main(["bench", *first, *BASE[1:], "prompt", *last]) == 2
    assert "--speculate goes with neither batch nor --versus" in capsys.readouterr().err
