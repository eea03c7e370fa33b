"""lm_eval's requests on jrope against its own backend "hf", on a model with a text."""

import json
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jrope.batch.engine import Engine
from jrope.errors import JropeError
from jrope.integrations import continuations, until
from jrope.integrations import lm_eval as integration
from jrope.integrations.continuations import Continuation, likelihoods
from jrope.model.scores import Scores
from jrope.rope import Yarn

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

MODELS = Path(__file__).parents[1] / "examples" / "models"
if not MODELS.exists():
    pytest.skip("examples/ is not beside the tests", allow_module_level=True)
FOLDER = MODELS / "jrope-tiny-condensed-8"
TEXT = (MODELS / "jrope-tiny" / "held_out.txt").read_text("utf-8")
LONGEST, NEW = 32, 12  # below the texts' lengths, so that they are cut and windowed


@pytest.fixture(scope="module", autouse=True)
def small_engine() -> Iterator[None]:
    """Few programs, and stop texts looked for between chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(until, "Engine", partial(Engine, piece=16, chunk=4))
        yield


@cache
def jropes(**options: Any) -> Any:
    given = {"dtype": "float32", "max_length": LONGEST, "batch_size": 32, **options}
    return integration.register()(str(FOLDER), **given)


@cache
def torchs(**options: Any) -> Any:
    from lm_eval.models.huggingface import HFLM

    given = {"device": "cpu", "dtype": "float32", "batch_size": 4, **options}
    return HFLM(pretrained=str(FOLDER), max_length=LONGEST, **given)


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def asked_of(model: Any, kind: str, *arguments: tuple[Any, ...]) -> Any:
    return getattr(model, kind)(instances(kind, *arguments), disable_tqdm=True)


def passages(count: int, size: int) -> list[str]:
    return [TEXT[at : at + size] for at in range(0, count * 700, 700)]


def choices() -> list[tuple[str, str]]:
    """Continuations of any length; spaces on either side; contexts too long, none."""
    found = list[tuple[str, str]]()
    for i, text in enumerate(passages(5, 600)):
        cut = text.rindex(" ", 0, (40, 90, 150, 300, 590)[i])
        found += [(text[:cut], word) for word in (" the", " a man", text[cut:][:60])]
        found += [(text[:cut] + " ", "of it"), (text[:cut] + "  ", text[cut:][:9])]
    return [*found, ("", "The"), ("", TEXT[:50]), ("<s>", "Then he")]


def assert_same(got: Any, want: Any) -> None:
    totals, greedy = zip(*got, strict=True)
    wanted, best = zip(*want, strict=True)
    np.testing.assert_allclose(totals, wanted, rtol=1e-4)
    assert greedy == best
    assert all(type(flag) is bool for flag in greedy)


@pytest.mark.parametrize("bos", [None, True])
def test_loglikelihoods_are_those_of_torch(bos: bool | None) -> None:
    special = {} if bos is None else {"add_bos_token": bos}
    want = asked_of(torchs(**special), "loglikelihood", *choices())
    got = asked_of(jropes(**special), "loglikelihood", *choices())
    assert_same(got, want)


def test_greedy_continuations_are_known_as_such() -> None:
    """What torch itself goes on with, of one to many tokens, and all but the last."""
    model, pairs = torchs(), list[tuple[str, str]]()
    for text in passages(4, 120):
        (new,) = asked_of(model, "generate_until", (text, {"max_gen_toks": NEW}))
        pairs += [(text, new), (text, new[:5]), (text, new + " indeed")]
    want = asked_of(model, "loglikelihood", *pairs)
    assert {flag for _, flag in want} == {True, False}
    assert_same(asked_of(jropes(), "loglikelihood", *pairs), want)


def test_rolling_windows_give_every_token_once() -> None:
    texts = [(TEXT[:1500],), ("Then",), (TEXT[700:1000],), ("",)]
    want = asked_of(torchs(), "loglikelihood_rolling", *texts)
    got = asked_of(jropes(), "loglikelihood_rolling", *texts)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    wide = asked_of(jropes(batch_size="auto"), "loglikelihood_rolling", *texts)
    np.testing.assert_allclose(wide, got, rtol=1e-5)


def test_generated_texts_are_those_of_torch() -> None:
    """Up to stop texts of a letter, of words, over tokens; contexts that are cut."""
    stops = (["\n"], [" the", "."], ["e s", "qqq"], [])
    asked = [
        (text, {"until": list(stops[i % 4]), "max_gen_toks": 4 + 2 * (i % 5)})
        for i, text in enumerate(passages(8, 500))
    ]
    asked.append(("Then", {"until": ",", "max_new_tokens": NEW, "do_sample": False}))
    want = [asked_of(torchs(), "generate_until", one)[0] for one in asked]
    got = asked_of(jropes(), "generate_until", *asked)
    assert got == want
    assert len({*got}) > 5


def test_sampling_follows_from_the_request_alone() -> None:
    how = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "max_gen_toks": 8}
    asked = [(text, how) for text in passages(4, 100)]
    first, again = (asked_of(jropes(), "generate_until", *asked) for _ in range(2))
    assert first == again
    how["do_sample"] = False
    assert asked_of(jropes(), "generate_until", *asked) != first


def test_results_are_cached_as_they_come() -> None:
    model, kept = jropes(), list[Any]()

    class Hook:
        def add_partial(self, *given: Any) -> None:
            kept.append(given)

    before, model.cache_hook = model.cache_hook, Hook()
    try:
        (pair,) = asked_of(model, "loglikelihood", ("Then", " he"))
        (total,) = asked_of(model, "loglikelihood_rolling", ("Then he",))
        (text,) = asked_of(model, "generate_until", ("Then", {"max_gen_toks": 4}))
    finally:
        model.cache_hook = before
    assert kept == [
        ("loglikelihood", ("Then", " he"), pair),
        ("loglikelihood_rolling", ("Then he",), total),
        ("generate_until", ("Then", {"max_gen_toks": 4}), text),
    ]


def test_the_longest_rows_come_first_in_few_shapes(monkeypatch: Any) -> None:
    shapes = list[tuple[int, int]]()

    def score(params: Any, tokens: np.ndarray, lengths: Any, **how: Any) -> Scores:
        shapes.append(tokens.shape)
        np.testing.assert_array_equal(how["rope_lengths"], lengths - 1)
        flat = np.zeros((len(tokens), tokens.shape[1] - 1), np.float32)
        return Scores(flat, flat > 0)

    monkeypatch.setattr(continuations, "score", score)
    asked = [Continuation([1] * size, [2, 3]) for size in [5, 100, 7, 40, 41, 5, 6]]
    asked += [Continuation([1] * 900, [2, 3])]
    how = {"max_length": 200, "rows": lambda width: 256 // width}
    found = [*likelihoods(None, None, asked, **how)]
    assert [one.number for one in found] == [7, 1, 4, 3, 2, 6, 0, 5]
    assert shapes == [(1, 256), (2, 128), (5, 48)]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": "many"}, "batch_size: got 'many', want a whole number from 1"),
        ({"dtyp": "float32"}, "dtyp: no such argument of this model .*'dtype'"),
        ({"max_length": 0}, "max_length: got 0, want an integer, at least 1"),
        ({"rope": "yarm:4"}, "yarm"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
    ],
)
def test_bad_model_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(JropeError, match=message):
        jropes.__wrapped__(**options)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"num_beams": 4}, "generation_kwargs: got num_beams, want until, max_gen"),
        ({"max_gen_toks": LONGEST}, "max_gen_toks: got 32, want from 1 to 31"),
        ({}, "max_gen_toks: got 256"),
        ({"max_gen_toks": 1, "top_k": -1}, "top_k: got -1"),
    ],
)
def test_bad_generation_arguments(given: dict[str, Any], message: str) -> None:
    with pytest.raises(JropeError, match=message):
        asked_of(jropes(), "generate_until", ("Then", given))


def test_a_continuation_longer_than_the_model_is_refused() -> None:
    with pytest.raises(JropeError, match=r"request 0: got a continuation of \d+ tok"):
        asked_of(jropes(), "loglikelihood", ("Then", TEXT[:900]))


def test_rope_stretches_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    ropes = list[Any]()

    def score(*given: Any, config: Any, **how: Any) -> Scores:
        ropes.append((config.rope.condense, config.rope.scaling))
        return Scores(np.zeros((1, 15)), np.zeros((1, 15), bool))

    monkeypatch.setattr(continuations, "score", score)
    own = jropes(max_length=None, batch_size=1)
    long = jropes(max_length=None, batch_size=1, rope="yarn:factor=16,original=256")
    assert (own.max_length, long.max_length) == (256, 4096)
    for model in (own, long):
        asked_of(model, "loglikelihood", ("Then", " he"))
    assert ropes == [(8, None), (1, Yarn(factor=16, original_length=256))]


def test_without_lm_eval_a_line_tells_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("lm_eval", "lm_eval.api", "lm_eval.api.registry"):
        monkeypatch.setitem(sys.modules, name, None)
    assert integration.main() == 2
    line = capsys.readouterr().err
    assert line.startswith("jrope: error: this needs the package lm_eval")
    assert line.endswith("pip install lm_eval\n") and line.count("\n") == 1


def test_a_part_of_lm_eval_that_is_missing_is_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacks() -> None:
        raise ModuleNotFoundError("No module named 'datasets'")

    monkeypatch.setattr(integration, "register", lacks)
    assert integration.main() == 2
    line = capsys.readouterr().err
    assert line == "jrope: error: No module named 'datasets'; pip install lm_eval\n"


TASKS = {
    "choose": """
task: choose
output_type: multiple_choice
doc_to_text: "{{text}} "
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "write": """
task: write
output_type: generate_until
doc_to_text: text
doc_to_target: answer
generation_kwargs: {until: [".", " the"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "whole": """
task: whole
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
}


def write_tasks(folder: Path) -> None:
    lines = [
        {"text": text[:90], "choices": ["the", "of it", "him"], "label": i % 3}
        | {"answer": " man"}
        for i, text in enumerate(passages(6, 300))
    ]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, lines)), "utf-8")
    shared = "dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n"
    for name, task in TASKS.items():
        text = f"{task}{shared}    test: {data}\n"
        (folder / f"{name}.yaml").write_text(text, "utf-8")


def results_of(model: Any, folder: Path) -> Any:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    how = {"bootstrap_iters": 0, "log_samples": True}
    return simple_evaluate(model, tasks=[*TASKS], task_manager=tasks, **how)


def test_tasks_from_files_come_out_as_with_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of lm_eval, which needs all its packages."""
    datasets = pytest.importorskip("datasets", reason="lm_eval without its packages")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_tasks(tmp_path)
    got, want = (results_of(model, tmp_path) for model in (jropes(), torchs()))
    for name in TASKS:
        for metric, value in want["results"][name].items():
            if isinstance(value, float):
                assert got["results"][name][metric] == pytest.approx(value, rel=1e-4)
    texts, wanted = (
        [row["filtered_resps"] for row in result["samples"]["write"]]
        for result in (got, want)
    )
    assert texts == wanted and len({str(text) for text in texts}) > 3
