"""Vocabularies of bytes, schemas with their checks, and answers drawn from tables."""

import json
import random
from functools import cache
from typing import Any

import numpy as np

from jrope.forms.automaton import Automata
from jrope.forms.schema import schema_regex
from jrope.forms.structure import (
    MAY_STOP,
    MUST_STOP,
    Structure,
    Vocabulary,
    make_structure,
)
from jrope.forms.values import any_object

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["a", "é.", None]},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "person": PERSON,
    "numbers": {
        "type": "array",
        "items": {"type": "integer", "exclusiveMinimum": -3, "exclusiveMaximum": 40},
        "minItems": 1,
        "maxItems": 3,
    },
    "either": {"anyOf": [{"const": 'a "\n'}, {"type": "boolean"}, {"enum": [1.5, 12]}]},
    "referring": {
        "$defs": {"x": {"type": ["string", "null"], "maxLength": 3}},
        "type": "object",
        "properties": {"a~": {"$ref": "#/$defs/x"}, 'b"': {"$ref": "#/$defs/x"}},
    },
    "text": {"type": "string", "pattern": "^(?:a|[^bc]{2}|\\S.){1,3}$"},
    "pair": {"prefixItems": [{"type": "null"}, {"type": "integer", "minimum": 1}]},
}
# 61 tokens: what JSON needs, letters alone and together, and bytes of characters.
TOKENS = [b"", *(bytes([byte]) for byte in b'{}[]":,. -+\\/0123456789abcefnlorstu~')]
TOKENS += [b'": "', b'", "', b"true", b"12", b'["', b"}", b"na", b"me", b"kind", b"ag"]
TOKENS += [b"\xc3", b"\xa9", b"\xc3\xa9", b"a\xc3", b"\xa9.", b"\xf0\x9f\x98", b"\x80"]
TOKENS += [b"m", b"k", b"i", b"d", b"g", b'":', b"\x00"]
EOS = 0
assert len(TOKENS) == 61


@cache
def automata() -> Automata:
    return Automata()


@cache
def table_of(
    regex: str, stop_ids: tuple[int, ...] = (), tokens: tuple[bytes, ...] = (*TOKENS,)
) -> Structure:
    automaton = automata().of("it", regex)
    return make_structure("it", automaton, Vocabulary(tokens), stop_ids)


def regex_of(name: str) -> str:
    """Of SCHEMAS, or of any object."""
    if name == "object":
        return any_object(2)
    return schema_regex("schema", SCHEMAS[name], automata())


def structure(name: str, stop_ids: tuple[int, ...] = (EOS,)) -> Structure:
    return table_of(regex_of(name), stop_ids)


def text_of(tokens: Any, vocabulary: Any = TOKENS) -> str:
    return b"".join(vocabulary[token] for token in tokens).decode()


def drawn(one: Structure, seed: int, longest: int = 400) -> list[int] | None:
    """Tokens of an answer, each drawn from those allowed; None: it was too long."""
    dice, flat = random.Random(seed), one.table.ravel()
    tokens, state = list[int](), 0
    while len(tokens) < longest:
        if flat[state] == MUST_STOP or (
            flat[state] == MAY_STOP and dice.random() < 0.2
        ):
            return tokens
        ways = flat[state + one.classes.astype(int)]
        tokens.append(dice.choice(np.flatnonzero(ways >= 0).tolist()))
        state = int(ways[tokens[-1]])
    return None


def valid(name: str, text: str) -> None:
    """Raise unless this is JSON of the schema."""
    import jsonschema

    schema = {"type": "object"} if name == "object" else SCHEMAS[name]
    jsonschema.Draft202012Validator(schema).validate(json.loads(text))
