"""`jrope bench --speculate`: passes, texts with guesses and without, the command."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from bench_helpers import quick as quick
from bench_helpers import tiny

from jrope.bench import speculating
from jrope.bench.model import random_params
from jrope.bench.speculating import (
    NEVER,
    REPEATS,
    Guessed,
    Speculated,
    measure,
    measure_own,
    middle,
)
from jrope.cli import bench_speculate, main
from jrope.errors import JropeError
from jrope.generation.guesser import Draft, PromptLookup
from jrope.generation.run import generate
from jrope.model.config import LlamaConfig

NEW = 6
SHAPE = {"batch": 2, "context": 9, "new": NEW, "repeats": 1, "patience": 9.0}
TINY = Path(__file__).parents[1] / "examples/models/jrope-tiny"
BASE = ["bench", "--shape", "smollm2-135m", "--layers", "1", "--speculate"]


@pytest.fixture(scope="module")
def shaped() -> tuple[Any, LlamaConfig]:
    config = tiny()
    return random_params(config, jnp.float32), config


def test_prompts_repeat_or_do_not(shaped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculating, "PIECE", 4)
    given = shaped[1], 2, 10, NEW
    repeating = speculating._request(*given, REPEATS, PromptLookup(3))
    rows = repeating.prompt[:, :10]
    np.testing.assert_array_equal(rows[:, :4], rows[:, 4:8])
    np.testing.assert_array_equal(rows[:, :2], rows[:, 8:])
    assert repeating.max_new_tokens == NEW + 1
    assert (repeating.sampling.stop_ids < 0).all()  # none ends a row
    other = speculating._request(*given, NEVER, None)
    assert [len({*row}) for row in other.prompt[:, :10].tolist()] == [10, 10]
    assert float(np.asarray(other.sampling.sampler.temperature).max()) == 1


def test_a_draft_that_is_the_model_saves_passes(shaped: Any) -> None:
    params, config = shaped
    found = measure(params, config, Draft(params, config, 2), **SHAPE)
    assert [text.text for text in found.texts] == [REPEATS, NEVER]
    for text in found.texts:  # the same keys draw the same tokens
        assert (text.passes, text.steps) == (NEW // 3, NEW)
        assert text.seconds > 0 and text.plain_seconds > 0
    assert found.pass_seconds > 0 and found.step_seconds > 0


def test_a_pass_takes_no_guess(shaped: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is timed over as many new tokens as a step of one."""
    params, config = shaped
    request = speculating._request(config, 2, 9, NEW, REPEATS, PromptLookup(3))
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


def test_own_prompts_end_where_the_model_ends_them(
    shaped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, config = shaped
    prompts = {"long": [3, 1, 4, 1, 5, 9, 2], "short": [2, 7]}
    row = np.array([[2, 7, 0, 0, 0, 0, 0]], np.int32)
    how: Any = {"config": config, "max_new_tokens": NEW + 1}
    tokens = generate(params, row, [2], stop_ids=(), **how).tokens[0].tolist()
    third = next(i for i in range(2, NEW) if tokens[i] not in tokens[:i])
    config = dataclasses.replace(config, eos_token_id=(tokens[third],))
    shapes = set[Any]()
    inner = speculating.prepare

    def watched(prompt: Any, *given: Any, **options: Any) -> Any:
        shapes.add(prompt.shape)
        return inner(prompt, *given, **options)

    monkeypatch.setattr(speculating, "prepare", watched)
    limits: Any = {"new": NEW, "repeats": 1, "patience": 9.0}
    draft = Draft(params, config, 2)
    found = [*measure_own(params, config, draft, prompts, **limits)]
    assert [one.text for one in found] == ["long", "short"]
    assert found[1].steps == third  # after the first token
    assert found[1].passes == -(-third // 3)  # its own draft is always right
    assert shapes == {(1, 7)}  # one width, one set of programs


def test_the_middle_of_several_texts() -> None:
    def one(plain: float, passes: int) -> Guessed:
        return Guessed(
            text="", seconds=2.0, plain_seconds=plain, passes=passes, steps=passes * 2
        )

    assert middle([one(8.0, 3), one(1.0, 2), one(5.0, 4), one(9.0, 0)]) == (
        "median of 3: 2.50x as fast (0.50 to 4.00), 2.00 tokens a pass"
    )
    assert middle([one(1.0, 0)]) == "no answer went on behind its first token"
    assert one(1.0, 0).line() == ": ended with its first token, which is not timed"


def test_command_takes_rows_of_ones_own(tmp_path: Path, capsys: Any) -> None:
    if not TINY.is_dir():
        pytest.skip("examples/ is not beside the tests")
    file = tmp_path / "rows.jsonl"
    two = {"url": "/v1/completions", "body": {"prompt": ["or", "not to be"]}}
    rows = {"custom_id": "a", "prompt": "to be"}, {"custom_id": "b", **two}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["bench", str(TINY), "--speculate", "prompt:3", "--new", "4"]
    words += ["--repeat", "1", "--input", str(file), "--json", "-"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    texts = [one["text"] for one in json.loads(out)["speculation"]]
    assert texts == ["a", "b, prompt 1", "b, prompt 2"]
    assert err.splitlines()[-1].startswith("median of 3: ")
    file.write_text('{"prompt": "to be"}\n{"prompt": 3}\n')
    assert main(words) == 2
    assert f"{file}, line 2: prompt: got 3" in capsys.readouterr().err
    assert main([*words, "--context", "8"]) == 2
    assert "leave --batch and --context out" in capsys.readouterr().err
    other = {"custom_id": "c", "url": "/v1/embeddings", "body": {"input": "to be"}}
    file.write_text(json.dumps(other) + "\n")
    assert main(words) == 2
    assert f"{file}, c: url: got 'embeddings', want" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--shape", "smollm2-135m"], "--input: want --speculate beside it"),
        ([*BASE[1:], "prompt"], "--input: texts want a FOLDER, which has a tokenizer"),
    ],
)
def test_rows_are_refused_before_the_work(
    words: list[str], wrong: str, capsys: Any
) -> None:
    assert main(["bench", *words, "--input", "nowhere.jsonl"]) == 2
    assert wrong in capsys.readouterr().err
