"""The form that a row wants its answer to have, as a regular expression."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jrope.errors import RowError, refuse, want
from jrope.forms.automaton import Automata
from jrope.forms.regex import literal, one_of, whole
from jrope.forms.schema import schema_regex
from jrope.forms.values import any_object

NAMES = ("response_format", "structured_outputs")
_KINDS = ("json", "regex", "choice", "json_object")


def asks(given: Mapping[str, Any]) -> bool:
    """Whether a row's fields ask for a form."""
    return any(given.get(name) not in (None, {"type": "text"}) for name in NAMES)


def read_form(given: Mapping[str, Any], automata: Automata) -> tuple[str, str] | None:
    """What errors call it, and its expression; None: any text.

    Args:
      given: a row's fields, without nulls.
      automata: to check a schema's patterns with.

    Raises:
      RowError: it is none that is served.
    """
    forms = [_response_format(given, automata), _structured_outputs(given, automata)]
    found = [form for form in forms if form is not None]
    if len(found) > 1:
        raise RowError("response_format and structured_outputs: got both, want one")
    return found[0] if found else None


def _only(name: str, asked: Mapping[str, Any], known: Sequence[str]) -> None:
    others = [key for key in asked if key not in known]
    refuse(others, f"; want {' or '.join(known)}", f"{name}: ")


def _response_format(
    given: Mapping[str, Any], automata: Automata
) -> tuple[str, str] | None:
    name = "response_format"
    if name not in given:
        return None
    asked: Any = given[name]
    kind = asked.get("type") if isinstance(asked, dict) else None
    wanted = 'an object whose type is "text", "json_object" or "json_schema"'
    want(kind in ("text", "json_object", "json_schema"), name, asked, wanted)
    _only(name, asked, ["type", "json_schema"][: 1 + (kind == "json_schema")])
    if kind == "text":
        return None
    if kind == "json_object":
        return name, any_object()
    inner: Any = asked.get("json_schema")
    good = isinstance(inner, dict) and "schema" in inner
    want(good, f"{name}: json_schema", inner, "an object with the schema")
    _only(f"{name}: json_schema", inner, ("schema", "name", "description", "strict"))
    strict = inner.get("strict")  # either way an answer is what the schema says
    good = strict is None or isinstance(strict, bool)
    want(good, f"{name}: strict", strict, "true or false")
    return name, schema_regex(name, inner["schema"], automata)


def _structured_outputs(
    given: Mapping[str, Any], automata: Automata
) -> tuple[str, str] | None:
    name = "structured_outputs"
    if name not in given:
        return None
    asked: Any = given[name]
    want(isinstance(asked, dict), name, asked, f"an object with {' or '.join(_KINDS)}")
    own = {key: value for key, value in asked.items() if value is not None}
    _only(name, own, _KINDS)
    want(len(own) == 1, name, asked, f"one of {', '.join(_KINDS)}")
    (kind, value), *_ = own.items()
    name = f"{name}: {kind}"
    if kind == "regex":
        want(isinstance(value, str), name, value, "a text")
        return name, whole(name, value)
    if kind == "choice":
        good = isinstance(value, list) and value
        good = good and all(isinstance(text, str) and text for text in value)
        want(bool(good), name, value, "texts, none of them empty")
        return name, one_of([*map(literal, value)])
    if kind == "json_object":
        want(value is True, name, value, "true")
        return name, any_object()
    return name, schema_regex(name, _parsed(name, value), automata)


def _parsed(name: str, schema: Any) -> Any:
    """A schema that may be a text of JSON."""
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{name}: it is no JSON: {error}") from None
