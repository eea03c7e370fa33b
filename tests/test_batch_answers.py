"""Answers in the shapes of the API, and beside a plain row's own fields."""

import json
from typing import Any

import numpy as np
import pytest
from batch_file_helpers import settings
from cli_helpers import VOCAB, ids_of

from jrope.batch.answers import answer
from jrope.batch.rows import read_row
from jrope.batch.source import read_line
from jrope.batch.text import decode, token_text, tokens_to_stop
from jrope.batch.work import Finished
from jrope.errors import RowError

SETTINGS = settings(max_length=64, model="tiny", created=17)
TOKENIZER = SETTINGS.tokenizer
END = VOCAB["</s>"]


def finished(text: str | list[int], reason: Any = "stop", **more: Any) -> Finished:
    ids = [*ids_of(text), END] if isinstance(text, str) else text
    tokens = np.array(ids, np.int32)
    return Finished(
        **{"key": 0, "tokens": tokens, "finish_reason": reason, "finite": True, **more}
    )


def answered(fields: dict[str, Any], *results: Finished) -> dict[str, Any]:
    row = read_row(read_line(1, json.dumps(fields).encode()), SETTINGS)
    return answer(row, results, SETTINGS)


def api(url: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": f"/v1/{url}", "body": body}


def chat(**body: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": "x"}]
    return api("chat/completions", messages=turns, **body)


def scored(text: str) -> Finished:
    """Every token with log-probability -1/8, beside one of -1/4 that is its next."""
    ids = np.array(ids_of(text), np.int32)
    scores = np.full(len(ids), -1 / 8, np.float32)
    top = np.stack([ids, (ids + 1) % 256], 1)
    tops = np.stack([scores, scores - 1 / 8], 1)
    more = {"logprobs": scores, "top_ids": top, "top_logprobs": tops}
    return finished(ids.tolist(), "length", **more)


def test_chat_completion() -> None:
    record = answered(chat(), finished("hi"))
    id = record["id"].removeprefix("batch_req_")
    assert record == {
        "id": f"batch_req_{id}",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "request_id": f"batch_req_{id}",
            "body": {
                "id": f"chatcmpl-{id}",
                "object": "chat.completion",
                "created": 17,
                "model": "tiny",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "hi"},
                        "logprobs": None,
                        "finish_reason": "stop",
                    }
                ],
                "usage": {
                    "prompt_tokens": 3,
                    "completion_tokens": 3,
                    "total_tokens": 6,
                },
            },
        },
        "error": None,
    }
    assert answered(chat(), finished("hi"))["id"] == record["id"]
    assert answered(chat(seed=1), finished("hi"))["id"] != record["id"]


def test_completions_of_several_prompts() -> None:
    results = [finished(text, "length") for text in ("a", "b", "c", "d")]
    body = answered(api("completions", prompt=["x", "yz"], n=2), *results)
    body = body["response"]["body"]
    assert body["object"] == "text_completion"
    assert [c["text"] for c in body["choices"]] == ["a", "b", "c", "d"]
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["prompt_tokens"] == 3  # a prompt counts once, whatever n


def test_logprobs_of_a_chat() -> None:
    body = answered(chat(logprobs=True, top_logprobs=2), scored("aé"))["response"]
    content = body["body"]["choices"][0]["logprobs"]["content"]
    a, b = (
        {"token": t, "logprob": -x, "bytes": [ord(t)]}
        for t, x in zip("ab", (1 / 8, 1 / 4), strict=True)
    )
    assert content[0] == a | {"top_logprobs": [a, b]}
    assert content[1]["token"] == "\ufffd" and content[1]["bytes"] is None
    assert len(content) == 3


def test_logprobs_of_completions() -> None:
    record = answered(api("completions", prompt="x", logprobs=2), scored("ab"))
    assert record["response"]["body"]["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-1 / 8, -1 / 8],
        "top_logprobs": [{"a": -1 / 8, "b": -1 / 4}, {"b": -1 / 8, "c": -1 / 4}],
        "text_offset": [0, 1],
    }


def test_logprobs_are_the_shortest_decimals_of_float32() -> None:
    value = np.array([-0.1, -np.inf], np.float32)
    record = answered(
        {"prompt": "x", "logprobs": 0}, finished([70, 71], "length", logprobs=value)
    )
    assert [entry["logprob"] for entry in record["logprobs"]] == [-0.1, -9999.0]


def test_plain_rows_keep_their_fields() -> None:
    fields = {"prompt": "x", "topic": {"a": [1]}, "none": None, "temperature": 0}
    record = answered({**fields, "custom_id": "k"}, finished("hi"))
    assert record.pop("request_id").startswith("batch_req_")
    assert record == {
        "topic": {"a": [1]},
        "none": None,
        "custom_id": "k",
        "generated_text": "hi",
        "generated_tokens": [*ids_of("hi"), END],
        "num_generated_tokens": 3,
        "finish_reason": "stop",
        "num_input_tokens": 1,
        "error": None,
    }
    record = answered({"prompt": "x", "n": 2}, finished("a"), finished("b"))
    assert record["generated_text"] == ["a", "b"]
    assert record["num_generated_tokens"] == [2, 2]


def test_a_logit_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(RowError, match="not a finite number: weights hold a NaN"):
        answered({"prompt": "x"}, finished("a", finite=False))


# Stop texts


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("c", "ab", 3),
        ("cd", "ab", 4),
        (["zz", "de", "e"], "abc", 5),
        ("é", "abcde", 7),
        ("zz", "abcdeé!", 9),
        ("a", "", 1),
    ],
)
def test_text_ends_before_a_stop(stop: Any, text: str, tokens: int) -> None:
    record = answered({"prompt": "x", "stop": stop}, finished("abcdeé!"))
    assert record["generated_text"] == text
    assert record["num_generated_tokens"] == tokens
    assert record["finish_reason"] == "stop"


def test_a_stop_text_at_the_limit_is_a_stop() -> None:
    result = finished(ids_of("abc"), "length")
    assert answered({"prompt": "x", "stop": "bc"}, result)["finish_reason"] == "stop"


def test_a_stop_is_found_after_the_same_tokens_whenever_one_looks() -> None:
    ids = ids_of("one END two END")
    for count in range(len(ids) + 1):
        found = tokens_to_stop(TOKENIZER, [1], ids[:count], ("END",))
        assert found == (None if count < 7 else 7)
    assert tokens_to_stop(TOKENIZER, [1], ids, ()) is None


def test_a_stop_does_not_count_among_the_least_tokens() -> None:
    ids = ids_of("one END two END")
    for least, want in ((0, 7), (6, 7), (7, 15), (14, 15), (15, None)):
        for count in range(len(ids) + 1):
            found = tokens_to_stop(TOKENIZER, [1], ids[:count], ("END",), least)
            assert found == (want if want is not None and count >= want else None)
    row: dict[str, Any] = {"prompt": "x", "stop": ["END", "zz"], "min_tokens": 7}
    record = answered(row, finished("one END two END"))
    assert record["generated_text"] == "one END two "
    assert record["num_generated_tokens"] == 15
    assert record["finish_reason"] == "stop"
    # It ends with é, of which the first two tokens hold half.
    record = answered({**row, "stop": "aé", "min_tokens": 2}, finished("aéb"))
    assert (record["generated_text"], record["num_generated_tokens"]) == ("", 3)


def test_a_stop_id_is_no_text() -> None:
    record = answered(
        {"prompt": "x", "stop_token_ids": ids_of("c")}, finished(ids_of("abc"))
    )
    assert record["generated_text"] == "ab" and record["num_generated_tokens"] == 3


def test_text_goes_on_from_the_prompt() -> None:
    half, rest = ids_of("é")
    assert decode(TOKENIZER, ids_of("x"), ids_of(" y")) == " y"
    assert decode(TOKENIZER, [half], [rest, *ids_of("a")])[-1] == "a"
    assert token_text(TOKENIZER, END) == "</s>"
