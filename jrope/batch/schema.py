"""JSON schemas as regular expressions, keyword by keyword; what is not read is refused.

JSON comes on one line, with one space at most where JSON allows any, and the properties
of an object in the order of its schema: not every text of a schema, but no others.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any, cast, final

from jrope.batch.automaton import automaton
from jrope.batch.fields import RowError, want
from jrope.batch.regex import inside_string, literal, one_of
from jrope.errors import is_integer

DEPTH = 3  # of objects and arrays in each other, where a schema says nothing of them
_IDLE = {  # change no answer
    *("title", "description", "default", "examples", "deprecated", "readOnly"),
    *("writeOnly", "$schema", "$id", "$comment", "$defs", "definitions"),
}
_KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    "number": set[str](),
    "boolean": set[str](),
    "null": set[str](),
}
_PLAIN = {
    "number": r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?",
    "boolean": "(?:true|false)",
    "null": "null",
}
_INTEGERS = {None: "(?:0|-?[1-9][0-9]*)", 0: "(?:0|[1-9][0-9]*)", 1: "[1-9][0-9]*"}
_MOST_INTEGERS = 1000  # between two bounds
_CHARACTER = r'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])'
_DAY = (  # without a 29th of February
    "(?:(?:0[1-9]|1[0-2])-(?:0[1-9]|1[0-9]|2[0-8])"
    "|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
)
_DATE = f"(?:[1-9][0-9]{{3}}|0[0-9]{{2}}[1-9])-{_DAY}"
_TIME = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?"
    "(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}
_LONGEST = 2**20  # characters of an expression
_COMMA, _COLON = "[ ]?,[ ]?", "[ ]?:[ ]?"


def object_regex(depth: int = DEPTH) -> str:
    """JSON objects with any values, nested so deeply at most."""
    return _map(_anything(depth - 1))


def schema_regex(name: str, schema: Any) -> str:
    """The values of a schema.

    Raises:
      RowError: it is none, or it has keywords, or values of them, that are not served.
    """
    return _Schema(name, schema).value(schema, ())


@final
class _Schema:
    """A schema whose parts may refer to others."""

    def __init__(self, name: str, root: Any) -> None:
        self.name, self.root = name, root

    def value(self, schema: Any, within: tuple[str, ...]) -> str:
        """A part of it, inside these references."""
        if schema is True:
            return _anything(DEPTH)
        good = isinstance(schema, dict)
        want(good, f"{self.name}: a schema", schema, 'an object, as {"type": "string"}')
        given = {name: x for name, x in schema.items() if name not in _IDLE}
        if "$ref" in given:
            return self._reference(self._alone("$ref", given), within)
        if "anyOf" in given:
            return self._any(self._alone("anyOf", given), within)
        if "const" in given:
            return _values([self._alone("const", given, "type")])
        if "enum" in given:
            values = self._alone("enum", given, "type")
            good = isinstance(values, list) and values
            self._want(bool(good), "enum", values, "a list of values")
            return _values(values)
        return one_of([self._typed(k, given, within) for k in self._types(given)])

    def _want(self, good: bool, name: str, got: object, wanted: str) -> None:
        want(good, f"{self.name}: {name}", got, wanted)

    def _only(self, given: Mapping[str, Any], *known: str, beside: str = "") -> None:
        """Refuse other keywords."""
        if names := [n for n in given if n not in known]:
            why = f"{self.name}: {', '.join(names)}: not served{beside}"
            raise RowError(why, "unsupported")

    def _alone(self, name: str, given: Mapping[str, Any], *idle: str) -> Any:
        self._only(given, name, *idle, beside=f" beside {name}")
        return given[name]

    def _reference(self, ref: Any, within: tuple[str, ...]) -> str:
        good = isinstance(ref, str) and (ref == "#" or ref.startswith("#/"))
        self._want(good, "$ref", ref, "a part of the same schema, #/...")
        if ref in within or ref == "#":
            why = f"$ref: {ref} holds itself; recursive schemas are not served"
            raise RowError(f"{self.name}: {why}", "unsupported")
        part = self.root
        for word in ref.split("/")[1:]:
            word = word.replace("~1", "/").replace("~0", "~")
            good = isinstance(part, dict) and word in part
            self._want(good, "$ref", ref, "a part of the schema that is there")
            part = part[word]
        found = self.value(part, (*within, ref))
        if len(found) > _LONGEST:  # references to references may double it each time
            got = f"an expression of {len(found):,} characters"
            raise RowError(
                f"{self.name}: $ref: got {got}, want {_LONGEST:,}", "too_long"
            )
        return found

    def _any(self, schemas: Any, within: tuple[str, ...]) -> str:
        good = isinstance(schemas, list) and schemas
        self._want(bool(good), "anyOf", schemas, "a list of schemas")
        return one_of([self.value(schema, within) for schema in schemas])

    def _types(self, given: Mapping[str, Any]) -> list[str]:
        """The types that a value may have: named, or those that keywords speak of."""
        if "type" in given:
            kinds: Any = given["type"]
            kinds = kinds if isinstance(kinds, list) else [kinds]
            good = kinds and all(isinstance(k, str) and k in _KEYWORDS for k in kinds)
            self._want(bool(good), "type", given["type"], f"of {', '.join(_KEYWORDS)}")
            return kinds
        spoken = [k for k, names in _KEYWORDS.items() if not names.isdisjoint(given)]
        return spoken[:1] or ["any"]

    def _typed(self, kind: str, given: dict[str, Any], within: tuple[str, ...]) -> str:
        """Values of one type, of which keywords for other types say nothing."""
        own, every = _KEYWORDS.get(kind, set()), set[str]().union(*_KEYWORDS.values())
        others = every - own - (_KEYWORDS["integer"] if kind == "number" else set())
        given = {name: x for name, x in given.items() if name not in others}
        self._only(given, "type", *own)
        if kind == "object":
            return self._object(given, within)
        if kind == "array":
            return self._array(given, within)
        if kind == "string":
            return f'"{self._string(given)}"'
        if kind == "integer":
            return self._integer(given)
        return _anything(DEPTH) if kind == "any" else _PLAIN[kind]

    def _range(self, given: Mapping[str, Any], what: str) -> tuple[int, int | None]:
        low, high = given.get(f"min{what}", 0), given.get(f"max{what}")
        good = is_integer(low, at_least=0)
        self._want(good, f"min{what}", low, "a whole number from 0")
        good = high is None or is_integer(high, at_least=low)
        self._want(good, f"max{what}", high, f"a whole number from {low}")
        return low, high

    def _string(self, given: dict[str, Any]) -> str:
        if "format" in given:
            kind = self._alone("format", given, "type")
            good = isinstance(kind, str) and kind in _FORMATS
            self._want(good, "format", kind, f"one of {', '.join(_FORMATS)}")
            return _FORMATS[kind]
        if "pattern" in given:
            return self._pattern(self._alone("pattern", given, "type"))
        low, high = self._range(given, "Length")
        return f"{_CHARACTER}{{{low},{'' if high is None else high}}}"

    def _pattern(self, pattern: Any) -> str:
        """An expression, if what it matches needs no escapes in JSON."""
        self._want(isinstance(pattern, str), "pattern", pattern, "a text")
        name = f"{self.name}: pattern"
        regex = inside_string(name, pattern)
        made = automaton(name, regex)
        if (made.after[[*range(32), *b'"\\']] < made.states).any():
            wanted = "one that matches no quotes, backslashes and control characters"
            want(False, name, pattern, wanted)
        return f"(?:{regex})"

    def _integer(self, given: Mapping[str, Any]) -> str:
        bounds = {name: given[name] for name in given if name != "type"}
        for name, bound in bounds.items():
            good = is_integer(bound, at_least=-(2**63))
            self._want(good, name, bound, "a whole number")
        lows = {"minimum": 0, "exclusiveMinimum": 1}
        highs = {"maximum": 0, "exclusiveMaximum": -1}
        low = max((bounds[n] + x for n, x in lows.items() if n in bounds), default=None)
        high = min(
            (bounds[n] + x for n, x in highs.items() if n in bounds), default=None
        )
        if high is None and low in _INTEGERS:
            return _INTEGERS[low]
        if low is None or high is None or not 0 <= high - low < _MOST_INTEGERS:
            wanted = "at least 0 or at least 1 alone"
            wanted += f", or two bounds with 1 to {_MOST_INTEGERS} numbers"
            self._want(False, ", ".join(bounds), [*bounds.values()], wanted)
        return one_of([*map(str, range(cast(int, low), cast(int, high) + 1))])

    def _array(self, given: Mapping[str, Any], within: tuple[str, ...]) -> str:
        low, high = self._range(given, "Items")
        if "prefixItems" in given:  # these, and no others behind them
            items: Any = given["prefixItems"]
            good = isinstance(items, list)
            good = good and low <= len(items) <= (len(items) if high is None else high)
            self._want(good, "prefixItems", items, "a list of minItems to maxItems")
            inner = _COMMA.join(self.value(item, within) for item in items)
        else:
            inner = _several(self.value(given.get("items", True), within), low, high)
        return rf"\[[ ]?{inner}[ ]?\]"

    def _object(self, given: Mapping[str, Any], within: tuple[str, ...]) -> str:
        properties: Any = given.get("properties", {})
        good = isinstance(properties, dict)
        self._want(good, "properties", properties, "an object of schemas")
        required: Any = given.get("required", [])
        good = isinstance(required, list) and all(
            isinstance(n, str) and n in properties for n in required
        )
        self._want(good, "required", required, "names among properties")
        others = given.get("additionalProperties", True)
        if not properties and others is not False:
            return _map(self.value(others, within))
        first, later = "", ""  # what follows on nothing, and on another property
        for name, schema in reversed(properties.items()):
            own = f"{_values([name])}{_COLON}{self.value(schema, within)}"
            if name in required:
                first, later = f"{own}{later}", f"{_COMMA}{own}{later}"
            else:
                first = f"(?:{own}{later}|{first})"
                later = f"(?:{_COMMA}{own})?{later}"
        return rf"\{{[ ]?{first}[ ]?\}}"


def _values(values: Iterable[Any]) -> str:
    return one_of([literal(json.dumps(x, ensure_ascii=False)) for x in values])


def _several(item: str, low: int, high: int | None) -> str:
    """From `low` to `high` items with commas between them."""
    if high == 0:
        return ""
    most = "" if high is None else high - 1
    some = f"{item}(?:{_COMMA}{item}){{{max(low - 1, 0)},{most}}}"
    return some if low else f"(?:{some})?"


def _map(value: str) -> str:
    member = f'"{_CHARACTER}*"{_COLON}{value}'
    return rf"\{{[ ]?{_several(member, 0, None)}[ ]?\}}"


def _anything(depth: int) -> str:
    """Any value, nested so deeply at most."""
    kinds = [f'"{_CHARACTER}*"', *_PLAIN.values()]
    if depth > 0:
        value = _anything(depth - 1)
        kinds += [rf"\[[ ]?{_several(value, 0, None)}[ ]?\]", _map(value)]
    return one_of(kinds)
