"""Forms of answers on the host: expressions, tables, and the bytes of tokens."""

import dataclasses
import datetime
import json
import re
import sys
import uuid
from typing import Any

import numpy as np
import outlines_core
import pytest
from batch_file_helpers import settings
from cli_helpers import SIZE, fast
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from structure_helpers import (
    EOS,
    SCHEMAS,
    TOKENS,
    drawn,
    regex_of,
    structure,
    text_of,
    valid,
)
from tokenizers import Tokenizer, decoders, models

import jrope.batch.automaton
import jrope.batch.structure
from jrope.batch.automaton import automaton
from jrope.batch.fields import RowError
from jrope.batch.form import read_form
from jrope.batch.rows import BatchSettings
from jrope.batch.schema import schema_regex
from jrope.batch.spelling import token_bytes
from jrope.batch.structure import MAY_STOP, MUST_STOP, Structures, make_structure

BYTES = [bytes([byte]) for byte in range(256)]


def schema_text(schema: Any, seed: int) -> str | None:
    """A value of a schema, byte by byte."""
    made = make_structure("it", automaton("it", schema_regex("it", schema)), BYTES)
    tokens = drawn(made, seed)
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
    made, texts = structure(name), set[str]()
    for seed in range(150):
        if (tokens := drawn(made, seed)) is not None:
            texts.add(text_of(tokens))
            valid(name, text_of(tokens))
            assert not made.is_over([]) and EOS not in tokens
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
        asked = read_form({"structured_outputs": {"regex": regex}})
        assert asked is not None
        made = make_structure("it", automaton(*asked), BYTES)
        for text in texts:
            flat, state = made.table.ravel(), 0
            for byte in text.encode():
                state = int(flat[state + made.classes[byte]])
                assert state >= 0, (regex, text)
            assert flat[state] >= MAY_STOP, (regex, text)
            assert re.fullmatch(regex, text)


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
        read_form({"response_format": form})


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
            {"response_format": {"type": "json_schema"}},
            "json_schema: got None, want",
        ),
        ({"structured_outputs": {"grammar": "x"}}, "grammar: not served"),
        (
            {"structured_outputs": {"json": {}, "structural_tag": 1}},
            "structural_tag: ",
        ),
        ({"structured_outputs": {}}, "structured_outputs: got {}, want one of json, "),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "want one of json, regex"),
        (
            {"structured_outputs": "a"},
            "structured_outputs: got 'a', want an obj",
        ),
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
        read_form(given)


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
        asked = read_form({"structured_outputs": {"json": schema}})
        assert asked is not None
        Structures(TOKENS).of(*asked, ())
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
            automaton("it", regex)
        assert error.value.code == "too_long"
    laughs = {
        f"{i}": {"prefixItems": [{"$ref": f"#/$defs/{i + 1}"}] * 9} for i in range(9)
    }
    with pytest.raises(RowError, match=r"ref: got an expression of [\d,]+ characters"):
        schema_regex("it", {"$ref": "#/$defs/0", "$defs": {**laughs, "9": {}}})
    for schema in ({"type": "string", "maxLength": 10**9}, {"minItems": 10**9}):
        with pytest.raises(RowError, match="characters, counting all repetitions"):
            automaton("it", schema_regex("it", schema))


def test_text_is_no_form() -> None:
    assert read_form({}) is None
    assert read_form({"response_format": {"type": "text"}}) is None
    assert read_form({"structured_outputs": {"json": "true"}}) is not None


# --- tables


def test_equal_forms_share_a_table() -> None:
    own = Structures(TOKENS)
    one = own.of("x", "a+", (EOS,))
    assert own.of("y", "a+", ()) is one  # EOS is no text
    letter = TOKENS.index(b"a")
    other = own.of("x", "a|b", (letter, EOS, letter))  # an id that ends answers
    assert other is not own.of("x", "a|b", ())
    assert other.table[0, other.classes[letter]] == -1
    with pytest.raises(RowError, match="x: no text of the vocabulary's tokens, wi"):
        own.of("x", "ab", (letter,))


def test_tables_without_end_are_refused(monkeypatch: Any) -> None:
    own = Structures([b"", b"a", b"ab", b"b\xc3"])
    with pytest.raises(RowError, match="it: no text of the vocabulary's tokens, wi"):
        own.of("it", "a+é", ())
    made = own.of("it", "a*ab|abé", ())  # where é cannot come, its first byte must not
    texts = {
        text_of(drawn(made, i) or [], [b"", b"a", b"ab", b"b\xc3"]) for i in range(30)
    }
    assert texts > {"ab", "aab"}
    with pytest.raises(RowError, match="it: the empty text alone has this form"):
        own.of("it", "(?:)", ())
    with pytest.raises(RowError, match="it: outlines_core cannot compile it: it match"):
        own.of("it", r"a[^\s\S]", ())
    calls = list[str]()
    monkeypatch.setattr(
        jrope.batch.structure, "automaton", lambda *_: calls.append("made")
    )
    with pytest.raises(RowError, match="it match"):  # which is not tried again
        own.of("it", r"a[^\s\S]", ())
    assert not calls


def test_large_tables_are_refused_with_their_numbers(monkeypatch: Any) -> None:
    monkeypatch.setattr(jrope.batch.automaton, "STATES", 5)
    with pytest.raises(
        RowError, match="it: it takes 10 states, want 5 at most"
    ) as told:
        Structures(TOKENS).of("it", "a{9}", ())
    assert told.value.code == "too_long"
    monkeypatch.undo()
    monkeypatch.setattr(jrope.batch.structure, "ENTRIES", 25)
    with pytest.raises(RowError, match="it takes 10 states and more than 3 classes of"):
        Structures(TOKENS).of("it", "a{9}", ())


def test_without_outlines_core_a_row_says_what_to_install(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "outlines_core", None)
    with pytest.raises(RowError, match=r'package outlines_core; pip install "jrope\['):
        Structures(TOKENS).of("it", "a", ())


# --- tokens


def test_tokens_of_bytes() -> None:
    given = settings()
    found = token_bytes(given.tokenizer, given.config)
    letters = given.tokenizer.backend_tokenizer
    for text in ("é😀日 \n~", "\x00\x7f\xad"):
        ids = letters.encode(text).ids
        assert b"".join(found[id] for id in ids).decode() == text
    assert found[256:] == [b""] * (SIZE - 256)  # special ones, and those of no token
    given.tokenizer.add_tokens(["Ġé"])  # in plain letters
    config = dataclasses.replace(given.config, eos_token_id=(65,))
    assert token_bytes(given.tokenizer, config)[261] == "Ġé".encode()
    assert found[65] and not token_bytes(given.tokenizer, config)[65]


def sentencepiece() -> BatchSettings:
    words = {"<s>": 0, "</s>": 1, "<0xC3>": 2, "<0xA9>": 3, "▁a": 4, "é▁": 5}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return settings(tokenizer=fast(tokenizer))


def test_tokens_of_sentencepiece() -> None:
    given = sentencepiece()
    found = token_bytes(given.tokenizer, given.config)
    assert found[:6] == [b"", b"", b"\xc3", b"\xa9", b" a", "é ".encode()]
    made = given.structures.of("it", "é* a", ())
    assert {text_of(drawn(made, i) or [], found) for i in range(9)} >= {" a", "é a"}
    assert given.structures is given.structures


def test_other_tokens_are_refused() -> None:
    given = sentencepiece()
    given.tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(RowError, match="got a tokenizer that decodes by WordPiece"):
        token_bytes(given.tokenizer, given.config)
