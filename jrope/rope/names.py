"""From a method's name and fields to the method, and from a rope to its full name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

from jrope.errors import JropeError, did_you_mean, is_integer
from jrope.rope.embedding import Rope
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


def describe(rope: Rope) -> str:
    """The embedding in the words of `--rope`, and all else that is not at its default.

    Not theta and rotary_dim, which belong to the checkpoint whatever the method.

    >>> method = build("linear", {"factor": 4.0}, trained=64, longest=64)
    >>> describe(Rope(theta=1e4, rotary_dim=8, scaling=method, condense=8))
    'linear:factor=4 of positions / 8'
    """
    names = {kind: name for name, kind in ROPE_TYPES.items()}
    name, method = names.get(type(rope.scaling), "default"), cast(Any, rope.scaling)
    fields = () if method is None else dataclasses.fields(method)
    values = {f.name: (getattr(method, f.name), f.default) for f in fields}
    told = [f"{k}={_word(v)}" for k, (v, usual) in values.items() if v != usual]
    name += f":{','.join(told)}" if told else ""
    name += "" if rope.condense == 1 else f" of positions / {rope.condense:g}"
    parts = [name, "interleaved" if rope.layout == "interleaved" else ""]
    parts += ["accurate" if rope.precision == "accurate" else ""]
    parts += ["" if rope.lengths == "planned" else f"{rope.lengths} lengths"]
    return ", ".join(part for part in parts if part)


def _word(value: Any) -> str:
    """A field as `--rope` takes it, but for long lists."""
    if isinstance(value, tuple):
        items = cast(tuple[Any, ...], value)
        short = len(items) <= 4
        return ":".join(map(_word, items)) if short else f"({len(items)} numbers)"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}"
