"""Lines as rows: what they ask for, and what is wrong with them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from batch_file_helpers import records_of, run, settings, write_rows
from cli_helpers import VOCAB, ids_of
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from jrope.batch.answers import failure
from jrope.batch.fields import UNSERVED
from jrope.batch.journal import id_of, to_line
from jrope.batch.rows import Row, read_row
from jrope.batch.source import Line, read_line
from jrope.errors import RowError
from jrope.generation.sample import Sampler

SETTINGS = settings(max_length=64)
CHAT = {"messages": [{"role": "user", "content": "x"}]}
URL = {"chat": "/v1/chat/completions", "text": "/v1/completions"}


def line(text: str) -> Line:
    return read_line(1, text.encode())


def row(fields: Any, **more: Any) -> Row:
    given = settings(**{"max_length": 64, **more}) if more else SETTINGS
    return read_row(line(json.dumps(fields)), given)


def api(body: dict[str, Any], kind: str = "chat", **more: Any) -> dict[str, Any]:
    body = {**CHAT, **body} if kind == "chat" else {"prompt": "x", **body}
    return {"custom_id": "a", "method": "POST", "url": URL[kind], "body": body, **more}


def problem(fields: Any) -> str:
    with pytest.raises(RowError) as error:
        row(fields)
    return str(error.value)


# What rows ask for


def test_plain_rows_are_those_of_jrope_generate() -> None:
    own = Sampler(temperature=0.5, top_k=7)
    found = row({"prompt": "hello"}, sampler=own)
    assert found.prompts == [ids_of("hello")]
    assert found.request.sampler == own
    assert found.request.stop_ids == (VOCAB["</s>"],)
    assert found.limits == [64 - 5]
    assert row({"prompt": "x"}, max_length=1000).limits == [256]
    assert row({"prompt": "x"}, max_new_tokens=9).limits == [9]
    found = row({"prompt": "x", "temperature": 1, "top_k": None}, sampler=own)
    assert found.request.sampler == Sampler(temperature=1.0, top_k=7)


def test_prompts_may_be_ids_or_turns() -> None:
    assert row({"token_ids": [5, 6]}).prompts == [[5, 6]]
    turns = [VOCAB["<|user|>"], *ids_of("x"), VOCAB["<|assistant|>"]]
    assert row(CHAT).prompts == [turns]
    parts = [{"type": "text", "text": "x"}]
    message = {"role": "user", "content": parts, "name": None}
    assert row({"messages": [message]}).prompts == [turns]
    assert row({"prompt": ""}).prompts == [[VOCAB["<s>"]]]
    config = replace(SETTINGS.config, bos_token_id=0)  # which is an id, too
    assert row({"prompt": ""}, config=config).prompts == [[0]]


def test_openai_rows_have_the_defaults_of_the_api() -> None:
    found = row(api({}), sampler=Sampler(temperature=0.3))
    assert found.request.sampler == Sampler(temperature=1.0)
    assert found.form == "chat" and found.limits == [64 - 3]
    assert found.request.n == 1 and found.request.logprobs is None
    assert row(api({}, "text")).limits == [16]
    assert row(api({"max_tokens": None, "max_completion_tokens": 5})).limits == [5]


def test_completions_take_several_prompts() -> None:
    several: list[tuple[Any, list[list[int]]]] = [
        ("ab", [ids_of("ab")]),
        (["a", "b"], [ids_of("a"), ids_of("b")]),
        ([3, 4], [[3, 4]]),
        ([[3, 4], [5]], [[3, 4], [5]]),
    ]
    for prompt, ids in several:
        assert row(api({"prompt": prompt}, "text")).prompts == ids


def test_every_field_arrives() -> None:
    sampling = {
        "temperature": 0.7,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
        "frequency_penalty": -0.5,
        "presence_penalty": 2.0,
    }
    more: dict[str, Any] = {"min_tokens": 1, "logit_bias": {"7": 1, "0": -0.5}}
    more |= {"top_k": -1, "seed": -1, "n": 3, "stop": "a", "stop_token_ids": [7, 7]}
    given = {**sampling, **more, "logprobs": True, "top_logprobs": 4, "max_tokens": 2}
    request = row(api(given)).request
    assert request.sampler == Sampler(**sampling, top_k=0)
    assert request.seed == 2**32 - 1 and request.n == 3 and request.limit == 2
    assert request.min_tokens == 1 and request.logit_bias == {7: 1.0, 0: -0.5}
    assert request.stop == ("a",) and request.logprobs == 4
    assert request.stop_ids == (7, VOCAB["</s>"])
    request = row({"prompt": "x", "logprobs": 2, "ignore_eos": True}).request
    assert request.logprobs == 2 and request.stop_ids == ()
    assert row({"prompt": "x", "stop": ["", "b"]}).request.stop == ("b",)


def test_plain_rows_may_have_any_other_field() -> None:
    assert row({"prompt": "x", "url": "http://x", "body": 1}).form == "plain"
    found = row({"prompt": "x", "method": None, "model": "m", "temperature": 0})
    assert found.extra == {"method": None, "model": "m"}


def test_whole_floats_are_integers() -> None:
    """As for vLLM's models, and as tables with missing values make them."""
    one = {"max_tokens": 16, "seed": 3, "n": 2, "top_k": 7, "stop_token_ids": [1, 2]}
    one |= {"min_tokens": 2}
    two = {"max_tokens": 16.0, "seed": 3.0, "n": 2.0, "top_k": 7.0, "min_tokens": 2.0}
    two |= {"stop_token_ids": [1.0, 2]}
    for name in ("logprobs", "max_completion_tokens", "top_logprobs"):
        more = {"logprobs": True, "max_tokens": None} | {name: 4}
        wanted = row({"prompt": "x", **one, **more}).request
        found = row({"prompt": "x", **two, **more, name: 4.0}).request
        assert repr(found) == repr(wanted)
    assert repr(row(api({"max_tokens": 16.0})).limits) == "[16]"


def test_seeds_come_from_the_row_itself() -> None:
    seeds = [row({"custom_id": f"{i}", "prompt": "x"}).request.seed for i in "aab"]
    assert seeds[0] == seeds[1] != seeds[2]


def test_what_changes_nothing_is_taken() -> None:
    idle = {name: values[0] for name, values in UNSERVED.items() if values}
    more = {"model": "gpt-4o", "user": "me", "tools": None}
    assert row(api({**idle, **more})).request == row(api({})).request


# What is refused by name


BAD = {
    "temperature": [-1, "hot", True, 1e31, []],
    "top_p": [1.5, "x"],
    "top_k": [2.5, -2],
    "min_p": [2],
    "repetition_penalty": [0],
    "frequency_penalty": [2.5, -2.5, "x", True],
    "presence_penalty": [2.5, float("nan")],
    "min_tokens": [-1, 1.5, "x", True, 64],
    "logit_bias": [
        *(5, [], [5], "x", {"x": 1}, {"05": 1}, {"1_0": 1}, {"5.0": 1}, {"": 1}),
        *({"-1": 1}, {"264": 1}, {"5": 101}, {"5": "x"}, {"5": None}, {"5": True}),
        {str(i): 0 for i in range(301)},
    ],
    "seed": [1.5, "x", 2**70 * -1, 2.0**53],
    "n": [0, 129, 1.5],
    "stop": [5, [5], {}],
    "stop_token_ids": [5, [-1], [True], [999], [1.5], [[1.0]]],
    "ignore_eos": [1],
    "max_tokens": [0, -1, 2.5, 2**40],
    "logprobs": ["yes", -1, 21],
    "top_logprobs": [21, -1, 3],
    "response_format": ["text", {}, {"type": []}, {"type": "json_schema"}],
    "structured_outputs": [5, [], {}, {"grammar": "x"}, {"regex": "["}],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_values_are_named(name: str) -> None:
    for value in BAD[name]:
        assert name in problem({"prompt": "x", name: value})
        assert name in problem(api({name: value}))


GUIDED = [
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("guided_decoding_backend", "guided_whitespace_pattern"),
]


@pytest.mark.parametrize("name", {**UNSERVED, **dict.fromkeys(GUIDED)})
def test_what_is_not_served_is_named(name: str) -> None:
    for fields in ({"prompt": "x", name: {"x": 1}}, api({name: {"x": 1}})):
        hint = "; structured_outputs is" if name in GUIDED else ""
        assert problem(fields) == f"{name}: not served{hint}"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (api({"temprature": 1}), "'temprature': no such field (did you mean 'temp"),
        (api({"prompt": "x"}), "'prompt': no such field"),
        (api({}, model="x"), "'model': no such field beside body"),
        (api({}) | {"custom_id": 5}, "custom_id: got 5, want a text"),
        (api({}) | {"method": "GET"}, "method: got 'GET', want POST"),
        (api({}) | {"url": "/v1/responses"}, "url: got '/v1/responses', want /v1/chat"),
        (api({}) | {"body": []}, "body: got [], want an object"),
        (api({"messages": []}), "messages: got [], want a list of {role, content}"),
        (api({"messages": [{"role": "user"}]}), "want texts as role and content"),
        (api({"messages": ["x"]}), "messages: got 'x', want {role, content} alone"),
        (
            api({"messages": [{"role": "a", "content": [{"image_url": "x"}]}]}),
            "want parts of text only",
        ),
        (api({"logprobs": 3}), "logprobs: got 3, want true or false"),
        (api({"prompt": None}, "text"), "prompt: got None, want a list of token ids"),
        (api({"prompt": []}, "text"), "prompt: it is empty"),
        (api({"prompt": [[]]}, "text"), "prompt: it is empty"),
        (api({"prompt": [264]}, "text"), "ids [264] lie outside the vocabulary of 264"),
        (api({"max_tokens": 62}), "a prompt of 3 and max_tokens 62 exceed the 64"),
        (api({"max_tokens": 2, "max_completion_tokens": 3}), "got [3, 2], want one of"),
        ({"prompt": "x" * 64}, "a prompt of 64 and max_tokens 1 exceed the 64 tokens"),
        ({"prompt": "\ud800"}, "prompt: it is no Unicode"),
        ({"prompt": ["x"]}, "prompt: got ['x'], want a text"),
        ({"prompt": "x", **CHAT}, "got ['prompt', 'messages'], want one of"),
        ({"text": "x"}, "a row: got ['text'], want one of prompt, messages, token_ids"),
        ({"prompt": "x", "error": 1}, "error: its answer has fields of this name"),
        ({"prompt": "x", "custom_id": 1}, "custom_id: got 1, want a text"),
        ({"prompt": "x", "weight": float("nan")}, "NaN, Infinity and the like"),
        ([1], "the line holds a JSON list, want an object"),
    ],
)
def test_what_is_wrong_is_said(fields: Any, words: str) -> None:
    assert words in problem(fields)


def test_a_template_that_fails_is_its_rows_error() -> None:
    own = settings()
    own.tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(RowError, match=r"the chat template failed: .*no system turn"):
        read_row(line(json.dumps(CHAT)), own)
    own.tokenizer.chat_template = None
    with pytest.raises(RowError, match="has no chat template"):
        read_row(line(json.dumps(CHAT)), own)


def test_what_only_the_engine_knows_is_its_rows_error(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "stop_token_ids": [*range(9)]}, {"prompt": "x"}]
    output = tmp_path / "out"
    assert run(write_rows(tmp_path / "rows", rows), output).failed == 1
    assert records_of(output)[0]["error"]["message"] == "stop_ids: too many"


# Anything at all

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, -(2**63), 10**400, 0.5, 1e-9, 1e308),
    *(float("nan"), float("inf"), "", "x", "\ud800", "\u2028", "\x00", "{{", [], {}),
    *([[]], [None], ["x"], [1, 2], [-1], [1.0], {"x": {"x": []}}, {"type": "text"}),
    *({"role": "user", "content": "x"}, [{"role": "user", "content": ["x"]}], "x" * 99),
    *([{"role": "system", "content": [{"text": "x"}]}], [{"role": [], "content": 1}]),
]
VALUES = st.sampled_from(ODD)
NAMES = st.sampled_from(
    [*BAD, *UNSERVED, "prompt", "messages", "token_ids", "custom_id", "url", "body"]
)
FIELDS = st.dictionaries(NAMES | st.text(max_size=5), VALUES, max_size=6)
PLAIN = st.builds(lambda more: {"prompt": "x", **more}, FIELDS)
BODIES = FIELDS | st.builds(lambda more: {**CHAT, **more}, FIELDS)
API = st.builds(
    lambda body, more: {"custom_id": "a", "url": URL["chat"], "body": body, **more},
    BODIES,
    st.just({}) | FIELDS,
)
TEXTS = (FIELDS | PLAIN | API | VALUES).map(lambda x: json.dumps(x).encode())
CUT = st.builds(lambda text, at: text[: at % (len(text) + 1)], TEXTS, st.integers(0))


@examples(max_examples=1000)
@given((TEXTS | CUT | st.binary(max_size=40)).map(lambda x: x.replace(b"\n", b"")))
def test_a_thousand_hostile_lines_are_rows_or_errors(
    text: bytes,
) -> None:
    if not text.strip():
        return
    found = read_line(1, text)
    try:
        assert read_row(found, SETTINGS).prompts
        return
    except RowError as error:
        assert error.code != "internal_error", error
        record = to_line(failure(found, error))
    assert record.count(b"\n") == 1 and len(record.decode().splitlines()) == 1
    read = json.loads(record)
    assert id_of(read) == found.id and read["custom_id"] == found.custom_id
    assert read["error"]["message"] and read["line"] == 1
