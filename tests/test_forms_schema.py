"""Forms of answers on the host: JSON schemas and expressions, and what they allow."""

import datetime
import json
import re
import uuid
from typing import Any

import numpy as np
import outlines_core
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from structure_helpers import (
    EOS,
    SCHEMAS,
    TOKENS,
    automata,
    drawn,
    regex_of,
    structure,
    table_of,
    text_of,
    valid,
)

from jrope.errors import RowError
from jrope.forms.request import read_form
from jrope.forms.schema import schema_regex
from jrope.forms.structure import MAY_STOP, MUST_STOP

BYTES = tuple(bytes([byte]) for byte in range(256))


def schema_text(schema: Any, seed: int) -> str | None:
    """A value of a schema, byte by byte."""
    tokens = drawn(table_of(schema_regex("it", schema, automata()), (), BYTES), seed)
    return None if tokens is None else text_of(tokens, BYTES)


@pytest.mark.parametrize("name", [*SCHEMAS, "object"])
def test_table_is_outlines_cores_index(name: str) -> None:
    got, words = structure(name), dict[bytes, list[int]]()
    for id, token in enumerate(TOKENS):
        if id != EOS:
            words.setdefault(token, []).append(id)
    vocabulary = outlines_core.Vocabulary(EOS, words)
    index = outlines_core.Index(rf"\x00(?:{regex_of(name)})\x00", vocabulary)
    ways, (end,) = index.get_transitions(), words[b"\x00"]
    flat = got.table.ravel()
    states = {0: ways[index.get_initial_state()][end]}
    waiting = [0]
    while waiting:
        state = waiting.pop()
        theirs = {t: to for t, to in ways[states[state]].items() if t != EOS}
        may_stop = theirs.pop(end, None) is not None
        assert (flat[state] >= MAY_STOP) == may_stop
        assert (flat[state] == MUST_STOP) == (not theirs)
        mine = flat[state + got.classes.astype(int)]
        assert {*np.flatnonzero(mine >= 0).tolist()} == {*theirs}
        for token, to in theirs.items():
            if (after := int(mine[token])) not in states:
                states[after] = to
                waiting.append(after)
            assert states[after] == to
    assert len(states) == len(got.table) == len({*states.values()})
    columns = {got.table[:, k].tobytes() for k in range(1, got.table.shape[1])}
    assert len(columns) == got.table.shape[1] - 1 == got.classes.max()


@pytest.mark.parametrize("name", [*SCHEMAS, "object"])
def test_what_a_table_allows_is_valid(name: str) -> None:
    it, texts = structure(name), set[str]()
    for seed in range(150):
        if (tokens := drawn(it, seed)) is not None:
            texts.add(text_of(tokens))
            valid(name, text_of(tokens))
            assert not it.is_over([]) and EOS not in tokens
    assert len(texts) > 4
    if name in ("text", "person"):
        assert any("é" in text for text in texts), "no character of several tokens"


def test_texts_that_go_on_where_others_end_are_there() -> None:
    for regex, texts in {
        r"[0-9]+(\.[0-9]+)?": ["1", "1.5"],
        "a|ab|abc": ["a", "ab", "abc"],
        r"^.{2}$": ["é1"],
        r"[a\]$^]+\$": ["a]^$$"],
    }.items():
        asked = read_form({"structured_outputs": {"regex": regex}}, automata())
        assert asked is not None
        it = table_of(asked[1], (), BYTES)
        for text in texts:
            flat, state = it.table.ravel(), 0
            for byte in text.encode():
                state = int(flat[state + it.classes[byte]])
                assert state >= 0, (regex, text)
            assert flat[state] >= MAY_STOP, (regex, text)
            assert re.fullmatch(regex, text)


@pytest.mark.parametrize("regex", ["[^[:digit:]]+", "[^x[:^alpha:]y]", "[[:digit:]]"])
def test_named_classes_are_whole_inside_of_strings(regex: str) -> None:
    own = schema_regex("it", {"type": "string", "pattern": regex}, automata())
    names = {"[:digit:]": "0-9", "[:^alpha:]": "\\x00-@\\[-`{-\uffff"}
    for name, plain in names.items():
        regex = regex.replace(name, plain)
    made = automata().of("it", own)
    for letter in map(chr, range(32, 127)):
        text, state = f'"{letter}"'.encode(), 0
        for byte in text:
            state = made.after[byte][state]
        inside = re.fullmatch(regex, letter) is not None and letter not in '"\\'
        assert made.accepting[state] == inside, letter


def test_formats_are_what_they_say() -> None:
    checks = {
        "date": datetime.date.fromisoformat,
        "time": datetime.time.fromisoformat,
        "date-time": datetime.datetime.fromisoformat,
        "uuid": uuid.UUID,
    }
    for name, check in checks.items():
        for seed in range(60):
            text = schema_text({"type": "string", "format": name}, seed)
            assert text is not None
            check(json.loads(text))


def test_schemas_say_no_more_than_they_do() -> None:
    for schema, wanted in [
        ({"type": "object", "additionalProperties": False}, {}),
        ({"type": "array", "maxItems": 0}, []),
        ({"type": "integer", "minLength": 3, "minimum": 2, "maximum": 2}, 2),
        ({"title": "x", "default": 3, "const": {"a": [None, "\u2028😀"]}}, None),
    ]:
        text = schema_text(schema, 1)
        assert text is not None
        assert json.loads(text) == schema.get("const", wanted)
    assert isinstance(json.loads(schema_text({"properties": {}}, 1) or ""), dict)
    assert isinstance(json.loads(schema_text({"minItems": 2}, 3) or ""), list)
    assert schema_text({}, 3) is not None


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"type": "number", "multipleOf": 2, "minimum": 1}, "multipleOf, minimum: not"),
        ({"oneOf": [{"type": "null"}]}, "oneOf: not served"),
        ({"anyOf": [True], "type": "null"}, "type: not served beside anyOf"),
        ({"type": "object", "patternProperties": {}}, "patternProperties: not served"),
        ({"not": {}}, "not: not served"),
        ({"type": "string", "pattern": "a", "minLength": 2}, "minLength: not serv"),
        (
            {"type": "string", "pattern": '"?'},
            "pattern: got '\"\\?', want one th",
        ),
        ({"type": "string", "pattern": "a$|b"}, r"pattern: \$: not served, save"),
        ({"type": "string", "pattern": "a)|(b"}, "parentheses do not match"),
        ({"type": "string", "pattern": "(?=a)"}, "pattern: outlines_core cannot"),
        ({"type": "string", "pattern": 1}, "pattern: got 1, want a text"),
        (
            {"type": "string", "format": "email"},
            "format: got 'email', want one",
        ),
        (
            {"type": "string", "minLength": 3, "maxLength": 2},
            "maxLength: got 2, want",
        ),
        ({"type": "string", "minLength": -1}, "minLength: got -1, want a who"),
        ({"type": "integer", "minimum": 5}, r"minimum: got \[5\], want at least 0 or"),
        ({"type": "integer", "minimum": 1.5}, "minimum: got 1.5, want a whole number"),
        ({"type": "integer", "minimum": 0, "maximum": 1000}, "1 to 1000 numbers"),
        ({"type": "text"}, "type: got 'text', want of object"),
        ({"type": "string", "enum": ["a", 1]}, "enum: got .* of type string"),
        ({"type": "integer", "const": True}, "const: got .* of type integer"),
        ({"const": float("nan")}, r"const: got \[nan\], want no NaN"),
        ({"type": []}, r"type: got \[\], want of object"),
        ({"enum": []}, r"enum: got \[\], want a list of values"),
        ({"anyOf": []}, r"anyOf: got \[\], want a list of schemas"),
        ({"properties": []}, r"properties: got \[\], want an object"),
        (
            {"properties": {}, "required": ["a"]},
            r"required: got \['a'\], want nam",
        ),
        ({"prefixItems": [True], "minItems": 2}, "prefixItems: got"),
        ({"$ref": "other.json"}, "ref: got 'other.json', want a part"),
        (
            {"$ref": "#/$defs/a"},
            "ref: got '#/\\$defs/a', want a part of the sch",
        ),
        ({"properties": {"a": {"$ref": "#"}}}, "# holds itself; recursive schemas are"),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}},
            "#/\\$defs/a holds itself; recursive schemas are not served",
        ),
        (3, "a schema: got 3, want an object"),
        ({"items": False}, "a schema: got False, want an object"),
    ],
)
def test_schemas_are_refused_by_keyword(schema: Any, told: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(RowError, match=f"response_format: .*{told}"):
        read_form({"response_format": form}, automata())


STRICT = {"name": "x", "schema": {}, "strict": "yes"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"response_format": {"type": "grammar"}},
            "response_format: got .*, want an",
        ),
        (
            {"response_format": "json_object"},
            "response_format: got 'json_ob",
        ),
        (
            {"response_format": {"type": "json_object", "schema": {}}},
            "response_format: schema: not served; want type$",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": STRICT}},
            "strict: got 'yes', want true or false",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "json_schema: got None, want",
        ),
        ({"structured_outputs": {"grammar": "x"}}, "grammar: not served; want json"),
        (
            {"structured_outputs": {"json": {}, "structural_tag": 1}},
            "structural_tag: not",
        ),
        ({"structured_outputs": {}}, "structured_outputs: got {}, want one of json, "),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "want one of json, regex"),
        (
            {"structured_outputs": "a"},
            "structured_outputs: got 'a', want an obj",
        ),
        ({"structured_outputs": {"json": "[" * 9**5}}, "json: it is no JSON: "),
        ({"structured_outputs": {"json": "{"}}, "json: it is no JSON: Expecting"),
        ({"structured_outputs": {"regex": 3}}, "regex: got 3, want a text"),
        ({"structured_outputs": {"regex": r"\bx"}}, r"regex: \\b: not served"),
        (
            {"structured_outputs": {"choice": ["a", ""]}},
            "choice: got .*none of t",
        ),
        ({"structured_outputs": {"json_object": 1}}, "json_object: got 1, want true"),
        (
            {
                "structured_outputs": {"choice": ["a"]},
                "response_format": {"type": "json_object"},
            },
            "response_format and structured_outputs: got both",
        ),
    ],
)
def test_forms_are_refused_by_name(given: dict[str, Any], told: str) -> None:
    with pytest.raises(RowError, match=told):
        read_form(given, automata())


KEYWORDS = [
    *("type", "enum", "const", "anyOf", "$ref", "properties", "required", "items"),
    *("additionalProperties", "prefixItems", "minItems", "maxItems", "minLength"),
    *("maxLength", "pattern", "format", "minimum", "exclusiveMaximum", "x"),
]
ODD = [None, True, 0, -1, 2**31, 10**400, 0.5, "x", "(", "\ud800", [], {}, [[]], [{}]]
SUBSCHEMAS = st.recursive(
    st.sampled_from(ODD),
    lambda inner: (
        st.dictionaries(st.sampled_from(KEYWORDS), inner | st.sampled_from(ODD))
        | st.lists(inner, max_size=3)
    ),
)


@examples(max_examples=60)
@given(st.dictionaries(st.sampled_from(KEYWORDS), SUBSCHEMAS, max_size=3))
def test_hostile_schemas_are_tables_or_row_errors(schema: Any) -> None:
    try:
        asked = read_form({"structured_outputs": {"json": schema}}, automata())
        assert asked is not None
        table_of(asked[1])
    except RowError as error:
        assert "internal" not in error.code


def test_long_repetitions_are_refused_before_they_are_made() -> None:
    for regex, told in {
        "a{9}(?:b{1000}c{3,}){500}": "502,509",
        r"\x{99}(?:\w{4000})?": "120,00",
        "[^{]{70000}": "70,000",
        "a{10}{9000}": "90,000",
    }.items():
        with pytest.raises(RowError, match=f"it takes {told}.* characters") as error:
            automata().of("it", regex)
        assert error.value.code == "too_long"
    laughs = {
        f"{i}": {"prefixItems": [{"$ref": f"#/$defs/{i + 1}"}] * 9} for i in range(9)
    }
    with pytest.raises(RowError, match=r"it: got an expression of [\d,]+ characters"):
        schema_regex(
            "it", {"$ref": "#/$defs/0", "$defs": {**laughs, "9": {}}}, automata()
        )
    for schema in ({"type": "string", "maxLength": 10**9}, {"minItems": 10**9}):
        with pytest.raises(RowError, match="characters, counting all repetitions"):
            automata().of("it", schema_regex("it", schema, automata()))


def test_properties_may_be_left_out_but_not_moved() -> None:
    null, names = {"type": "null"}, "abcd"
    schema = {"properties": dict.fromkeys(names, null)}
    for required in ([], ["c"], ["a", "d"]):
        regex = schema_regex("it", {**schema, "required": required}, automata())
        regex = re.sub(r"\\x{(..)}", r"\\x\1", regex)  # as Python spells it
        for mask in range(16):
            own = [name for i, name in enumerate(names) if mask >> i & 1]
            for members in (own, own[::-1]):
                text = json.dumps(dict.fromkeys(members))
                good = {*required} <= {*own} and members == own
                assert bool(re.fullmatch(regex, text)) == good, (required, text)
    many = {"properties": {f"{i}": null for i in range(200)}}
    sizes = [
        len(schema_regex("it", {**many, "required": required}, automata()))
        for required in ([], ["199"])
    ]
    assert sizes[0] > 40 * sizes[1]


def test_deep_schemas_are_refused() -> None:
    schema: Any = {}
    for _ in range(3000):
        schema = {"items": schema}
    with pytest.raises(RowError, match="it: it is nested too deeply"):
        schema_regex("it", schema, automata())
    wide = {"prefixItems": [True] * 10**6}
    with pytest.raises(RowError, match=r"it: got an expression of 4,.* at most"):
        schema_regex("it", wide, automata())
    optional = {"properties": {f"{i}": {"type": "null"} for i in range(10**5)}}
    with pytest.raises(RowError, match=r"it: got an expression of 4,.* at most"):
        schema_regex("it", optional, automata())


def test_text_is_no_form() -> None:
    assert read_form({}, automata()) is None
    assert read_form({"response_format": {"type": "text"}}, automata()) is None
    assert read_form({"structured_outputs": {"json": "true"}}, automata()) is not None
