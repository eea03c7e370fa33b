"""From a method's name and fields to the method: the one place that does so."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jrope.errors import JropeError, did_you_mean, is_integer
from jrope.rope.methods import ROPE_TYPES, LongRope, Method

ALIASES = {
    "original": "original_length",
    "original_max_position_embeddings": "original_length",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "short": "short_factor",
    "long": "long_factor",
}


def build(
    name: str, given: Mapping[str, Any], *, trained: int, longest: int
) -> Method | None:
    """The method of a name in `ROPE_TYPES`; None for "default", which is plain RoPE.

    Args:
      name: the method's name.
      given: its fields, under their own names or those in `ALIASES`.
      trained: what `original_length` is where a method needs one that is not given.
      longest: the length that the model is for; longrope's factor, unless it or an
        attention factor is given, is longest / original_length.

    Raises:
      JropeError: unknown name; fields that the method does not have, lacks, or has
        twice; values that it refuses.
    """
    if name != "default" and name not in ROPE_TYPES:
        known = ["default", "condense", *ROPE_TYPES]
        hint = did_you_mean(name, known)
        raise JropeError(f"unknown rope type {name!r}; known: {', '.join(known)}{hint}")
    kind = ROPE_TYPES.get(name)
    known_fields = dataclasses.fields(kind) if kind else ()
    fields = _named(name, given, {field.name for field in known_fields})
    if kind is None:
        return None
    if any(field.name == "original_length" for field in known_fields):
        fields.setdefault("original_length", trained)
    if kind is LongRope and "attention_factor" not in fields:
        length = fields["original_length"]
        if is_integer(length, at_least=1):  # else LongRope says what is wrong
            fields.setdefault("factor", longest / length)
    required = [f.name for f in known_fields if f.default is dataclasses.MISSING]
    if missing := [field for field in required if field not in fields]:
        raise JropeError(f"rope type {name!r} needs {', '.join(missing)}")
    return kind(**fields)


def _named(name: str, given: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    """The fields under their own names, once each, all of them known."""
    fields: dict[str, Any] = {}
    for key, value in given.items():
        field = ALIASES.get(key, key)
        if field in fields:
            raise JropeError(f"rope type {name!r}: {field!r} is given twice")
        fields[field] = value
    if unknown := sorted(set(fields) - names):
        wanted = ", ".join(sorted(names)) or "none"
        raise JropeError(f"rope type {name!r} has no field {unknown}; fields: {wanted}")
    return fields
