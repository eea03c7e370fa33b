"""JSON values as regular expressions: on one line, one space at most between parts."""

import json
from collections.abc import Iterable
from typing import Any

from jrope.forms.regex import literal, one_of

DEPTH = 3  # of objects and arrays in each other, where a schema says nothing of them
COMMA, COLON = "[ ]?,[ ]?", "[ ]?:[ ]?"
CHARACTER = r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])'
PLAIN = {
    "string": f'"{CHARACTER}*"',
    "number": r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?",
    "boolean": "(?:true|false)",
    "null": "null",
}
INTEGERS = {None: "(?:0|-?[1-9][0-9]*)", 0: "(?:0|[1-9][0-9]*)", 1: "[1-9][0-9]*"}
_DAY = (  # without a 29th of February
    "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
    "|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
)
_DATE = f"(?:[1-9][0-9]{{3}}|0[0-9]{{2}}[1-9])-{_DAY}"
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
    "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}
_TYPES: dict[str, Any] = {
    **{"object": dict, "array": list, "string": str, "null": type(None)},
    **{"integer": int, "number": (int, float)},
}


def is_of(value: Any, kind: str) -> bool:
    """Whether a value has a type of JSON schemas."""
    if isinstance(value, bool):
        return kind == "boolean"
    return kind in _TYPES and isinstance(value, _TYPES[kind])


def exactly(values: Iterable[Any]) -> str:
    """One of these values; a ValueError where JSON has none of them."""
    texts = [json.dumps(x, ensure_ascii=False, allow_nan=False) for x in values]
    return one_of([*map(literal, texts)])


def array(inner: str) -> str:
    """What is inside, in brackets."""
    return rf"\[[ ]?{inner}[ ]?\]"


def object_(inner: str) -> str:
    """What is inside, in braces."""
    return rf"\{{[ ]?{inner}[ ]?\}}"


def several(item: str, low: int = 0, high: int | None = None) -> str:
    """From `low` to `high` items with commas between them."""
    if high == 0:
        return ""
    most = "" if high is None else high - 1
    some = f"{item}(?:{COMMA}{item}){{{max(low - 1, 0)},{most}}}"
    return some if low else f"(?:{some})?"


def mapping(value: str) -> str:
    """An object with any names and such values."""
    return object_(several(f"{PLAIN['string']}{COLON}{value}"))


def anything(depth: int = DEPTH) -> str:
    """Any value, nested so deeply at most."""
    if not depth:
        return one_of([*PLAIN.values()])
    value = anything(depth - 1)
    return one_of([*PLAIN.values(), array(several(value)), mapping(value)])


def any_object(depth: int = DEPTH) -> str:
    """Objects with any values, nested so deeply at most."""
    return mapping(anything(depth - 1))
