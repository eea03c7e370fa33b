"""The form that a row wants its answer to have, as a regular expression."""

import json
from collections.abc import Mapping
from typing import Any

from jrope.batch.fields import RowError, want
from jrope.batch.regex import literal, one_of, whole
from jrope.batch.schema import object_regex, schema_regex

_KINDS = ("json", "regex", "choice", "json_object")


def read_form(given: Mapping[str, Any]) -> tuple[str, str] | None:
    """What errors call it, and its expression; None: any text.

    Args:
      given: a row's fields, without nulls.

    Raises:
      RowError: it is none that is served.
    """
    forms = [_response_format(given), _structured_outputs(given)]
    found = [form for form in forms if form is not None]
    if len(found) > 1:
        raise RowError("response_format and structured_outputs: got both, want one")
    return found[0] if found else None


def _response_format(given: Mapping[str, Any]) -> tuple[str, str] | None:
    name = "response_format"
    if name not in given:
        return None
    asked: Any = given[name]
    kind = asked.get("type") if isinstance(asked, dict) else None
    want(kind in ("text", "json_object", "json_schema"), name, asked, _FORMATS)
    if kind == "text":
        return None
    if kind == "json_object":
        return name, object_regex()
    inner: Any = asked.get("json_schema")
    good = isinstance(inner, dict) and "schema" in inner
    want(good, f"{name}: json_schema", inner, "an object with the schema")
    return name, schema_regex(name, inner["schema"])


_FORMATS = 'an object whose type is "text", "json_object" or "json_schema"'


def _structured_outputs(given: Mapping[str, Any]) -> tuple[str, str] | None:
    name = "structured_outputs"
    if name not in given:
        return None
    asked: Any = given[name]
    want(isinstance(asked, dict), name, asked, f"an object with {' or '.join(_KINDS)}")
    own = {key: value for key, value in asked.items() if value is not None}
    if others := [key for key in own if key not in _KINDS]:
        raise RowError(f"{name}: {', '.join(others)}: not served", "unsupported")
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
        return name, object_regex()
    return name, schema_regex(name, _parsed(name, value))


def _parsed(name: str, schema: Any) -> Any:
    """A schema that may be a text of JSON."""
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except ValueError as error:
        raise RowError(f"{name}: it is no JSON: {error}") from None
