"""JSON schemas as regular expressions, keyword by keyword; what is not read is refused.

The properties of an object come in the order of its schema: not every text of a schema,
but no others.
"""

from collections.abc import Mapping
from typing import Any, cast, final

from jrope.errors import RowError, is_integer, refuse, want
from jrope.forms.automaton import Automata
from jrope.forms.regex import check_length, inside_string, one_of
from jrope.forms.values import (
    CHARACTER,
    COLON,
    COMMA,
    FORMATS,
    INTEGERS,
    PLAIN,
    anything,
    array,
    exactly,
    is_of,
    mapping,
    object_,
    several,
)

_IDLE = {  # change no answer
    *("title", "description", "default", "examples", "deprecated", "readOnly"),
    *("writeOnly", "$schema", "$id", "$comment", "$defs", "definitions"),
}
_KEYWORDS = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "integer": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"},
    **{kind: set[str]() for kind in ("number", "boolean", "null")},
}
_MOST_INTEGERS = 1000  # between two bounds


def schema_regex(name: str, schema: Any, automata: Automata) -> str:
    """The values of a schema.

    Args:
      name: what errors call it.
      schema: as JSON has it.
      automata: to check patterns with.

    Raises:
      RowError: it is none, or it has keywords, or values of them, that are not served.
    """
    try:
        return _Schema(name, schema, automata).value(schema)
    except RecursionError:
        raise RowError(f"{name}: it is nested too deeply", "too_long") from None


@final
class _Schema:
    """A schema whose parts may refer to others."""

    def __init__(self, name: str, root: Any, automata: Automata) -> None:
        self.name, self.root, self.automata = name, root, automata
        self.within: tuple[str, ...] = ()  # references that are being read
        self.made = 0  # characters so far

    def value(self, schema: Any) -> str:
        """A part of it."""
        return self._counted(anything() if schema is True else self._value(schema))

    def _counted(self, found: str) -> str:
        """Parts of parts may double what there is each time: refused before that."""
        self.made += len(found)
        check_length(self.name, self.made)
        return found

    def _value(self, schema: Any) -> str:
        good = isinstance(schema, dict)
        self._want(good, "a schema", schema, 'an object, as {"type": "string"}')
        given = {name: x for name, x in schema.items() if name not in _IDLE}
        if "$ref" in given:
            return self._reference(self._alone("$ref", given))
        if "anyOf" in given:
            schemas = self._list("anyOf", self._alone("anyOf", given), "schemas")
            return one_of([self.value(schema) for schema in schemas])
        for name in ("const", "enum"):
            if name in given:
                found = self._alone(name, given, "type")
                found = [found] if name == "const" else found
                return self._exactly(name, self._list(name, found, "values"), given)
        return one_of([self._typed(kind, given) for kind in self._types(given)])

    def _want(self, good: bool, name: str, got: object, wanted: str) -> None:
        want(good, f"{self.name}: {name}", got, wanted)

    def _list(self, name: str, got: Any, what: str) -> list[Any]:
        self._want(isinstance(got, list) and got != [], name, got, f"a list of {what}")
        return got

    def _only(self, given: Mapping[str, Any], *known: str, beside: str = "") -> None:
        """Refuse other keywords."""
        refuse([n for n in given if n not in known], beside, f"{self.name}: ")

    def _alone(self, name: str, given: Mapping[str, Any], *idle: str) -> Any:
        self._only(given, name, *idle, beside=f" beside {name}")
        return given[name]

    def _reference(self, ref: Any) -> str:
        good = isinstance(ref, str) and (ref == "#" or ref.startswith("#/"))
        self._want(good, "$ref", ref, "a part of the same schema, #/...")
        if ref in self.within or ref == "#":
            why = f"$ref: {ref} holds itself; recursive schemas are not served"
            hint = "write it out, as deep as answers may nest"
            raise RowError(f"{self.name}: {why}: {hint}", "unsupported")
        part = self.root
        for word in ref.split("/")[1:]:
            word = word.replace("~1", "/").replace("~0", "~")
            good = isinstance(part, dict) and word in part
            self._want(good, "$ref", ref, "a part of the schema that is there")
            part = part[word]
        before, self.within = self.within, (*self.within, ref)
        found, self.within = self.value(part), before
        return found

    def _exactly(self, name: str, values: list[Any], given: dict[str, Any]) -> str:
        if "type" in given:
            kinds = self._types(given)
            good = all(any(is_of(x, kind) for kind in kinds) for x in values)
            self._want(good, name, values, f"values of type {' or '.join(kinds)}")
        try:
            return exactly(values)
        except ValueError:
            return self._want(False, name, values, "no NaN and no Infinity") or ""

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

    def _typed(self, kind: str, given: dict[str, Any]) -> str:
        """Values of one type, of which keywords for other types say nothing."""
        own, every = _KEYWORDS.get(kind, set()), set[str]().union(*_KEYWORDS.values())
        others = every - own - (_KEYWORDS["integer"] if kind == "number" else set())
        given = {name: x for name, x in given.items() if name not in {*others, "type"}}
        self._only(given, *own)
        read = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._integer,
        }
        if kind in read:
            return read[kind](given)
        return anything() if kind == "any" else PLAIN[kind]

    def _range(self, given: Mapping[str, Any], what: str) -> tuple[int, int | None]:
        low, high = given.get(f"min{what}", 0), given.get(f"max{what}")
        good = is_integer(low, at_least=0)
        self._want(good, f"min{what}", low, "a whole number from 0")
        good = high is None or is_integer(high, at_least=low)
        self._want(good, f"max{what}", high, f"a whole number from {low}")
        return low, high

    def _string(self, given: Mapping[str, Any]) -> str:
        if "format" in given:
            kind = self._alone("format", given)
            good = isinstance(kind, str) and kind in FORMATS
            self._want(good, "format", kind, f"one of {', '.join(FORMATS)}")
            return f'"{FORMATS[kind]}"'
        if "pattern" in given:
            return f'"{self._pattern(self._alone("pattern", given))}"'
        low, high = self._range(given, "Length")
        return f'"{CHARACTER}{{{low},{"" if high is None else high}}}"'

    def _pattern(self, pattern: Any) -> str:
        """An expression, if what it matches needs no escapes in JSON."""
        self._want(isinstance(pattern, str), "pattern", pattern, "a text")
        name = f"{self.name}: pattern"
        regex = inside_string(name, pattern)
        made = self.automata.of(name, regex)
        good = (made.after[[*range(32), *b'"\\']] == made.states).all()
        wanted = "one that matches no quotes, backslashes and control characters"
        want(bool(good), name, pattern, wanted)
        return f"(?:{regex})"

    def _integer(self, bounds: Mapping[str, Any]) -> str:
        for name, bound in bounds.items():
            good = is_integer(bound, at_least=-(2**63))
            self._want(good, name, bound, "a whole number")
        lows = {"minimum": 0, "exclusiveMinimum": 1}
        highs = {"maximum": 0, "exclusiveMaximum": -1}
        low = max((bounds[n] + x for n, x in lows.items() if n in bounds), default=None)
        high = min(
            (bounds[n] + x for n, x in highs.items() if n in bounds), default=None
        )
        if high is None and low in INTEGERS:
            return INTEGERS[low]
        good = None not in (low, high) and cast(int, high) - cast(int, low) >= 0
        good = good and cast(int, high) - cast(int, low) < _MOST_INTEGERS
        wanted = "at least 0 or at least 1 alone"
        wanted += f", or two bounds with 1 to {_MOST_INTEGERS} numbers"
        self._want(good, ", ".join(bounds), [*bounds.values()], wanted)
        return exactly(range(cast(int, low), cast(int, high) + 1))

    def _array(self, given: Mapping[str, Any]) -> str:
        low, high = self._range(given, "Items")
        if "prefixItems" not in given:
            return array(several(self.value(given.get("items", True)), low, high))
        items: Any = given["prefixItems"]  # these, and no others behind them
        good = isinstance(items, list)
        good = good and low <= len(items) <= (len(items) if high is None else high)
        self._want(good, "prefixItems", items, "a list of minItems to maxItems")
        return array(COMMA.join(self.value(item) for item in items))

    def _object(self, given: Mapping[str, Any]) -> str:
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
            return mapping(self.value(others))
        return object_(self._members(properties, {*required}))

    def _members(self, properties: Mapping[str, Any], required: set[str]) -> str:
        first, later = "", ""  # what follows on nothing, and on another property
        for name, schema in [*properties.items()][::-1]:
            own = f"{exactly([name])}{COLON}{self.value(schema)}"
            if name in required:
                first, later = f"{own}{later}", f"{COMMA}{own}{later}"
                continue
            # Before one that has to be there a comma follows on any of them.
            alone = f"(?:{own}{later}|{first})"
            first = f"(?:{own}{COMMA})?{first}" if required else alone
            later = f"(?:{COMMA}{own})?{later}"
            check_length(self.name, len(first))
        return first
