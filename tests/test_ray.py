"""A stage of Ray Data, called as Ray calls it; and by Ray, where that is installed."""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batch_file_helpers import HashEngine, write_rows
from cli_helpers import TEMPLATE
from cli_helpers import model as model

from jrope.errors import JropeError, RowError
from jrope.integrations import ray as integration
from jrope.integrations.ray import ERROR, JropePredictor

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_batch.py"
HOT = {"temperature": 1}


@pytest.fixture
def predict(model: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stage whose engine is a hash of the row."""
    monkeypatch.setattr(integration, "Engine", lambda *_, **__: HashEngine())
    return JropePredictor(model, max_new_tokens=6, sampling_params=HOT)


def batch_of(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """As Ray's numpy batches are: a null where a row lacks a column."""
    names = dict.fromkeys(name for row in rows for name in row)
    found = {}
    for name in names:
        found[name] = np.empty(len(rows), object)
        for i, row in enumerate(rows):
            found[name][i] = row.get(name)
    return found


def rows_of(batch: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    assert all(isinstance(column, np.ndarray) for column in batch.values())
    sizes = {len(column) for column in batch.values()}
    assert len(sizes) == 1
    return [
        dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)
    ]


def test_rows_keep_their_columns_and_order(predict: Any) -> None:
    rows = [{"prompt": f"row {i}", "custom_id": f"r{i}", "own": i} for i in range(9)]
    rows[3]["sampling_params"] = {"max_tokens": 2, "temperature": None, "stop": None}
    rows[4]["sampling_params"] = {"stop": np.array(["a", "b", "c"], object)}
    found = rows_of(predict(batch_of(rows)))
    assert [row["own"] for row in found] == [*range(9)]
    for row, asked in zip(found, rows, strict=True):
        assert row["prompt"] == asked["prompt"] and row[ERROR] is None
        assert row["num_generated_tokens"] == len(row["generated_tokens"])
        assert row["num_input_tokens"] == len(asked["prompt"])
        assert row["request_id"].startswith("batch_req_")
    assert found[3]["num_generated_tokens"] <= 2 < found[5]["num_generated_tokens"]
    assert not {*found[4]["generated_text"]} & {*"abc"}
    assert {row["finish_reason"] for row in found} == {"stop", "length"}
    assert found[5]["generated_tokens"].dtype == np.int32 and "logprobs" not in found[0]


def test_an_answer_depends_on_its_row_alone(predict: Any) -> None:
    """In whatever batch, with or without an id, however often."""
    rows = [{"prompt": "again", "custom_id": name} for name in ("a", "b", None, None)]
    whole = rows_of(predict(batch_of([{"prompt": "first"}, *rows])))[1:]
    apart = [rows_of(predict(batch_of([row])))[0] for row in rows]
    texts = [row["generated_text"] for row in whole]
    assert texts == [row["generated_text"] for row in apart]
    assert texts[0] != texts[1] != texts[2] == texts[3]


def test_a_bad_row_is_an_error_of_its_own(predict: Any) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "good"},
        {"prompt": None},
        {"prompt": "x", "sampling_params": {"top_p": 2.0}},
        {"prompt": "x", "sampling_params": {"temprature": 1.0}},
        {"prompt": "x", "sampling_params": {"n": 2}},
        {"prompt": "x", "sampling_params": '{"n": 1}'},
        {"prompt": "x" * 200},
        {"prompt": "NaN"},
        {"prompt": "x", "custom_id": 7},
        {"prompt": "y", "custom_id": 7},
    ]
    wanted = [
        *(None, "a row: got .* want one of prompt, messages, token_ids"),
        *("top_p: got 2.0", "sampling_params: 'temprature': no such field .*temperat"),
        *("n: got 2, want 1", "sampling_params: got .* want a dict"),
        *("exceed the 64 tokens", "not a finite number"),
        *(None, "custom_id '7' came before in this batch, with other fields"),
    ]
    for row, want in zip(rows_of(predict(batch_of(rows))), wanted, strict=True):
        if want is None:
            assert row[ERROR] is None and row["generated_text"]
            continue
        with pytest.raises(RowError, match=want):
            raise RowError(row[ERROR])
        assert row["generated_text"] is None and len(row["generated_tokens"]) == 0


def test_a_batch_without_prompts_is_an_error(predict: Any) -> None:
    with pytest.raises(JropeError, match=r"got columns \['text'\], want one of prompt"):
        predict(batch_of([{"text": "x"}]))


def test_chats_ids_and_logprobs(predict: Any) -> None:
    """Arrays of arrays, and of structs whose fields are null where others have them."""
    turns = np.array([{"role": "user", "content": "hi", "name": None}], object)
    rows: list[dict[str, Any]] = [
        {"token_ids": np.array([65, 66], np.int64)},
        {"messages": turns, "sampling_params": {"logprobs": 2, "top_k": None}},
    ]
    ids, chat = rows_of(predict(batch_of(rows)))
    assert ids[ERROR] is None and ids["num_input_tokens"] == 2
    assert "no chat template" in chat[ERROR]
    predict._settings.tokenizer.chat_template = TEMPLATE
    ids, chat = rows_of(predict(batch_of(rows)))
    assert ids["logprobs"] is None and chat["num_input_tokens"] == 4
    sizes = [len(entry["top_logprobs"]) for entry in chat["logprobs"]]
    assert sizes == [2] * chat["num_generated_tokens"]


def test_numbers_are_the_same_beside_missing_ones(predict: Any) -> None:
    """Which Ray, Arrow and pandas make floats and NaN, or NumPy's own numbers."""

    def rows(kind: Any, none: Any) -> list[dict[str, Any]]:
        own = {"max_tokens": kind(4), "temperature": kind(1), "seed": none, "n": none}
        stops = {"stop_token_ids": np.array([5], kind), "max_tokens": none}
        ids = np.array([65, 67], kind)
        missing = dict.fromkeys(("prompt", "token_ids", "custom_id"), none)
        every = [
            {"prompt": "x", "sampling_params": own},
            {"prompt": "x", "custom_id": kind(7), "sampling_params": stops},
            {"token_ids": ids, "sampling_params": none},
        ]
        return [{**missing, **row} for row in every]

    wanted = rows_of(predict(batch_of(rows(int, None))))
    assert [row["num_generated_tokens"] <= 4 for row in wanted] == [True, False, False]
    nan = float("nan")
    for kind, none in ((float, nan), (np.float64, np.float64(nan)), (np.int64, None)):
        found = rows_of(predict(batch_of(rows(kind, none))))
        for one, other in zip(found, wanted, strict=True):
            assert one[ERROR] is None and one["request_id"] == other["request_id"]
            assert one["generated_text"] == other["generated_text"]
    row = {"prompt": "x", "sampling_params": {"max_tokens": 2.5}}
    assert "max_tokens: got 2.5" in rows_of(predict(batch_of([row])))[0][ERROR]


def test_forms_are_told_from_each_other(predict: Any, monkeypatch: Any) -> None:
    own = HashEngine()
    monkeypatch.setattr(predict, "_engine", own)
    given = []
    for names in ("ab", "ba"):
        schema = {"properties": {name: {"type": "null"} for name in names}}
        form = {"structured_outputs": {"json": schema}}
        given.append({"prompt": "a", "sampling_params": form})
    first, other = rows_of(predict(batch_of(given)))
    assert first["request_id"] != other["request_id"] and own.structures == [True]
    predict(batch_of([{"prompt": "a"}]))
    assert own.structures == [True, False]


def test_an_engine_that_fails_ends_the_batch(predict: Any) -> None:
    def run(*_: Any) -> Any:
        raise RuntimeError("the device is gone")

    predict._engine.run = run
    with pytest.raises(RuntimeError, match="the device is gone"):
        predict(batch_of([{"prompt": "x"}]))


def test_it_is_made_as_the_arguments_say(model: Path, monkeypatch: Any) -> None:
    made = list[Any]()
    monkeypatch.setattr(
        integration, "Engine", lambda *given, **how: made.append((given, how))
    )
    JropePredictor(model, dtype="bfloat16", rope="linear:2", slots=3)
    ((params, config), how) = made[0]
    assert params["model"]["norm"]["weight"].dtype == "bfloat16"
    assert config.rope.scaling.factor == 2
    assert how["slots"] == 3 and how["capacity"] == 128
    with pytest.raises(JropeError, match="--rope 'linear:'"):
        JropePredictor(model, rope="linear:")


class Mortal(JropePredictor):
    """Dies in the midst of a batch, once."""

    def __init__(self, died: Path, folder: Path) -> None:
        integration.Engine = lambda *_, **__: HashEngine()
        super().__init__(folder, max_new_tokens=6, sampling_params=HOT)
        self.died = died

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if "r20" in batch["custom_id"] and not self.died.exists():
            self.died.touch()
            os._exit(1)
        return super().__call__(batch)


@pytest.mark.filterwarnings("ignore")
def test_a_killed_actor_loses_no_row(model: Path, predict: Any, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed")
    rows: list[dict[str, Any]] = [
        {"custom_id": f"r{i}", "prompt": f"row {i}", "sampling_params": {"top_k": i}}
        for i in range(40)
    ]
    rows[7]["sampling_params"] = {"top_k": -5}
    source = write_rows(tmp_path / "rows.json", rows)
    example = runpy.run_path(str(EXAMPLE))
    options = {"died": tmp_path / "died", "folder": model}
    where = os.pathsep.join((str(Path(__file__).parent), *sys.path))
    ray.init(num_cpus=4, runtime_env={"env_vars": {"PYTHONPATH": where}})
    try:
        for _ in range(2):  # the second time what failed alone
            how = {"stage": Mortal, "batch_size": 4, "actors": 1}
            example["answer"](source, tmp_path / "out", options, **how)
    finally:
        ray.shutdown()
    assert (tmp_path / "died").exists()
    found = example["answers_in"](tmp_path / "out")
    assert {name for name, row in found.items() if row[ERROR]} == {"r7"}
    good = [row for row in rows if row["custom_id"] != "r7"]
    want = rows_of(predict(batch_of(good)))
    assert [found[row["custom_id"]]["generated_text"] for row in good] == [
        row["generated_text"] for row in want
    ]
