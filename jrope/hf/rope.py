"""Hugging Face's words for rotary embeddings: `rope_scaling`, `rope_parameters`, both.

What transformers 5 resolves is resolved alike: an empty object is an absent one; theta
stands inside, else at the top, else is 10000; the top level's
original_max_position_embeddings overrides the inner one.  Where it would silently build
another model than the file says, we raise: a factor without a type, two types, a key
that the type does not read, two schemas that disagree, a null where a number must be.

A method's keys are its dataclass's fields, so a new method needs nothing here.
"""

import dataclasses
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from jrope.errors import JropeError, check, did_you_mean, is_positive
from jrope.rope import (
    ROPE_TYPES,
    DynamicYarn,
    Linear,
    LongRope,
    NTKAware,
    Rope,
    build,
    ntk_theta,
)

SCHEMAS = ("rope_scaling", "rope_parameters")
ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"
KINDS = ("default", *ROPE_TYPES)

_HF_NAMES = {
    "original_length": ORIGINAL,
    "theta": "rope_theta",
    "rotary_dim": "head_dim",
    "condense": "rope_condense_ratio",
}
_ALIASES = {"su": "longrope"}  # its name in the first Phi-3 files
_LISTS = ("short_factor", "long_factor")
_TYPES = ("rope_type", "type")  # the second in files older than transformers 4.43
# Keys that hold no number of the formula; YaRN's own files say whether they are tuned.
# In dynamic YaRN's they say it by the lengths (`_tuned_scale`), not by a factor.
_SILENT = {
    "yarn": {*_TYPES, "rope_theta", "finetuned"},
    "dynamic-yarn": {*_TYPES, "rope_theta", "finetuned", "factor"},
}


def rope_from_hf(
    config: Mapping[str, Any],
    head_dim: int,
    *,
    theta: float = 10000.0,
    partial: bool = False,
) -> Rope:
    """Resolve the rotary embedding of a config.json of either schema.

    Args:
      config: the whole JSON object; absent keys have transformers' defaults.
      head_dim: channels of a head.
      theta: what an absent rope_theta means.
      partial: whether partial_rotary_factor says how many of them are rotated; else
        all are.

    Raises:
      JropeError: see the module.
    """
    for where in SCHEMAS:
        good = isinstance(config.get(where), dict | None)
        check(good, where, config.get(where), "an object or null")
    if partial:
        config, head_dim = _rotated(config, head_dim)
    found: dict[str, dict[str, Any]]
    found = {where: config[where] for where in SCHEMAS if config.get(where)}
    ropes = [
        _read(where, values, config, head_dim, theta)
        for where, values in (found or {SCHEMAS[1]: {}}).items()
    ]
    if len({*ropes}) > 1:
        raise JropeError(
            f"rope_scaling ({ropes[0]}) and rope_parameters ({ropes[1]}) disagree; "
            "make them the same, with rope_theta at the top level, or remove one"
        )
    return ropes[0]


def _rotated(config: Mapping[str, Any], head_dim: int) -> tuple[dict[str, Any], int]:
    """The file without its partial_rotary_factor, and the channels that this leaves."""
    found = {k: x for k, x in config.items() if k != PARTIAL}
    parts: list[Any] = [config.get(PARTIAL)]
    for where in SCHEMAS:
        rope = dict(config.get(where) or {})
        parts.append(rope.pop(PARTIAL, None))
        found[where] = rope
    given = [part for part in parts if part not in (None, 1)]
    part: Any = given[0] if given else 1
    good = is_positive(part) and part <= 1 and all(p == part for p in given)
    check(good, PARTIAL, parts, "one number, above 0 and at most 1")
    return found, int(head_dim * part)


def rope_to_hf(rope: Rope) -> dict[str, Any]:
    """The keys of config.json that make transformers 4.57 and 5 build this embedding.

    `condense` is written as linear scaling and as rope_condense_ratio, from which
    `rope_from_hf` reads it back; NTKAware as the theta that it amounts to.  A dynamic
    method's trained length is max_position_embeddings there.  DynamicYarn is written in
    its authors' words, which transformers refuses.  The rule for lengths and the
    precision are the program's choice, not the file's.

    Raises:
      JropeError: interleaved layout, condense together with a scaling method, or a
        DynamicYarn whose factor * original_length is not whole.
    """
    check(rope.layout == "half", "layout", rope.layout, "'half': permute q and k first")
    theta, scaling, extra = float(rope.theta), cast(Any, rope.scaling), {}
    if rope.condense != 1:
        wanted = (
            f"1: config.json has no field for it beside {scaling}; leave one out "
            "of the file, and set it with `with_rope` or --rope after loading"
        )
        check(scaling is None, "condense", rope.condense, wanted)
        scaling = Linear(factor=rope.condense)
        extra["rope_condense_ratio"] = rope.condense
    if isinstance(scaling, NTKAware):
        theta, scaling = ntk_theta(theta, scaling.factor, rope.rotary_dim), None
    kind, fields = _written(scaling)
    if kind == "dynamic":
        extra["max_position_embeddings"] = fields.pop(ORIGINAL)
    if isinstance(scaling, DynamicYarn):
        longest = round(scaling.factor * scaling.original_length)
        good = longest / scaling.original_length == scaling.factor
        wanted = f"a whole number over original_length ({scaling.original_length})"
        check(good, "factor", scaling.factor, wanted)
        extra["max_position_embeddings"] = longest
        fields["finetuned"] = scaling.factor > 1
    if isinstance(scaling, LongRope):  # for transformers 4, which ignores factor
        extra[ORIGINAL] = fields[ORIGINAL]
        fields["attention_factor"] = scaling.attention_scaling
    # theta stands in each place where some version looks for it
    parameters = {"rope_type": kind, "rope_theta": theta, **fields}
    return {
        "rope_theta": theta,
        "rope_scaling": None if kind == "default" else dict(parameters),
        "rope_parameters": parameters,
        **extra,
    }


def _written(scaling: Any) -> tuple[str, dict[str, Any]]:
    if scaling is None:
        return "default", {}
    kind = next(name for name, of in ROPE_TYPES.items() if type(scaling) is of)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(scaling):
        value = getattr(scaling, field.name)
        if field.name in _LISTS:
            value = list(value)
        if value is not None:
            fields[_HF_NAMES.get(field.name, field.name)] = value
    return kind, fields


def _read(
    where: str,
    values: dict[str, Any],
    config: Mapping[str, Any],
    head_dim: int,
    theta: float,
) -> Rope:
    kind = _kind(where, values)
    outer = config.get("rope_theta", theta)
    theta = values.get("rope_theta", outer)
    wanted = f"{outer!r}, as at the top level: versions differ in which one they read"
    good = config.get("rope_theta") is None or theta is outer or theta == outer
    check(good, f"{where}.rope_theta", theta, wanted)
    given = {key: values[key] for key in values if key not in _silent(kind)}
    scaling = _scaling(where, kind, _with_outer(where, kind, given, config), config)
    scaling, condense = _condensed(scaling, config.get("rope_condense_ratio"))
    with _own_words(where):
        return Rope(
            theta=theta, rotary_dim=head_dim, scaling=scaling, condense=condense
        )


def _kind(where: str, values: Mapping[str, Any]) -> str:
    nested = [key for key, value in values.items() if isinstance(value, dict)]
    wanted = "numbers: a rope per layer type is another architecture"
    check(not nested, where, f"nested objects {', '.join(nested)}", wanted)
    kinds = {key: values[key] for key in _TYPES if key in values}
    extra = [key for key in values if key not in {*_TYPES, "rope_theta", PARTIAL}]
    if not kinds and extra:
        raise JropeError(
            f"{where} has {', '.join(map(repr, extra))} but neither 'rope_type' nor "
            f"'type'; add the type, one of {', '.join(KINDS)}"
        )
    for key, kind in kinds.items():
        kinds[key] = _ALIASES.get(str(kind), kind)
        if kinds[key] not in KINDS:
            raise JropeError(
                f"unknown rope type {kind!r} in {where}.{key}; known: "
                f"{', '.join(KINDS)}{did_you_mean(str(kind), KINDS)}"
            )
    if len({*kinds.values()}) > 1:
        raise JropeError(
            f"{where}: 'type'={values['type']!r} contradicts "
            f"'rope_type'={values['rope_type']!r}; remove one of them"
        )
    return next(iter(kinds.values()), "default")


def _silent(kind: str) -> set[str]:
    return _SILENT.get(kind, {*_TYPES, "rope_theta"})


def _with_outer(
    where: str, kind: str, given: dict[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """The method's keys with what transformers looks for at the top level as well."""
    if PARTIAL not in given and config.get(PARTIAL) is not None:
        given[PARTIAL] = config[PARTIAL]
    if PARTIAL in given and kind != "proportional":
        part = given.pop(PARTIAL)
        good = part is None or (is_positive(part) and part == 1)
        check(good, PARTIAL, part, "1 or null: LLaMA rotates whole heads")
    known = [*_keys(kind)]
    if (outer := config.get(ORIGINAL)) is not None:
        wanted = f"no such key, since rope type {kind!r} does not read it"
        check(ORIGINAL in known, ORIGINAL, outer, wanted)
        given[ORIGINAL] = outer
    if unknown := [key for key in given if key not in known]:
        hints = ", ".join(f"{key!r}{did_you_mean(key, known)}" for key in unknown)
        raise JropeError(
            f"{where}: rope type {kind!r} does not read {hints}; it reads "
            f"{', '.join(known) or 'rope_theta only'}.  Remove or correct the key"
        )
    return given


def _keys(kind: str) -> dict[str, dataclasses.Field[Any]]:
    fields = dataclasses.fields(ROPE_TYPES[kind]) if kind in ROPE_TYPES else ()
    keys = {_HF_NAMES.get(field.name, field.name): field for field in fields}
    if kind == "dynamic":  # its trained length is max_position_embeddings
        del keys[ORIGINAL]
    return keys


def _scaling(
    where: str, kind: str, given: Mapping[str, Any], config: Mapping[str, Any]
) -> Any:
    if kind == "default":
        return None
    fields: dict[str, Any] = {}
    for key, field in _keys(kind).items():
        nullable = field.default is None or key in ("beta_fast", "beta_slow")
        if key not in given or (nullable and given[key] is None):
            continue
        value = given[key]
        if key in _LISTS:
            check(isinstance(value, list), f"{where}.{key}", value, "a list of numbers")
            value = tuple(value)
        fields[field.name] = value
    longest = positive_integer(config, "max_position_embeddings")
    if kind == "longrope" and "original_length" not in fields:
        hint = "without it the switch from short to long factors has no place"
        raise JropeError(f"{where}: rope type 'longrope' needs {ORIGINAL}; {hint}")
    original = fields.get("original_length", longest)
    ratio = longest / original if original and is_positive(original) else 1.0
    if kind == "yarn" and given.get("factor", 1) is None:
        wanted = f"a number, or {ORIGINAL} too, to infer it from"
        check(ORIGINAL in given, f"{where}.factor", None, wanted)
        fields["factor"] = ratio
    if kind == "dynamic-yarn":
        fields["factor"] = _tuned_scale(where, config[where], ratio)
    with _own_words(where):
        return _shortest(build(kind, fields, trained=longest, longest=longest))


def _tuned_scale(where: str, values: Mapping[str, Any], ratio: float) -> float:
    """Dynamic YaRN's least scale: M / O where the file says finetuned, else 1.

    The authors' code reads it so, and not the factor that their files have, too; on a
    model that is not tuned, between O and a larger M, its versions differ.
    """
    tuned = values.get("finetuned", False)
    wanted = f"true, or max_position_embeddings the same as {ORIGINAL}"
    good = isinstance(tuned, bool) and (tuned or ratio == 1)
    check(good, f"{where}.finetuned", tuned, wanted)
    return ratio


def _shortest(scaling: Any) -> Any:
    """Without an attention_factor that only repeats what the factor implies."""
    if isinstance(scaling, LongRope) and scaling.factor is not None:
        implied = dataclasses.replace(scaling, attention_factor=None)
        if implied.attention_scaling == scaling.attention_scaling:
            return implied
    return scaling


def _condensed(scaling: Any, ratio: Any) -> tuple[Any, Any]:
    """The method and the condense ratio; linear by the same factor is the same thing.

    LongChat's files have the ratio; FastChat divided positions by it.
    """
    linear = isinstance(scaling, Linear) and scaling.factor == ratio
    if ratio is None or scaling is None or linear:
        return (scaling, 1.0) if ratio is None else (None, ratio)
    raise JropeError(
        f"rope_condense_ratio {ratio!r} contradicts {scaling}; remove one of them"
    )


@contextmanager
def _own_words(where: str) -> Generator[None]:
    """Turn a field's name in an error into the key of the file."""
    try:
        yield
    except JropeError as error:
        name, colon, rest = str(error).partition(":")
        if not colon:  # not of a single field
            raise JropeError(f"{where}: {error}") from None
        top = name in ("theta", "rotary_dim", "condense")
        name = _HF_NAMES.get(name, name)
        raise JropeError(f"{name if top else f'{where}.{name}'}:{rest}") from None


def positive_integer(config: Mapping[str, Any], key: str) -> int:
    """config[key], checked before anything is computed from it."""
    value = cast(int, config.get(key))
    good = is_positive(value) and type(value) is int
    check(good, key, value, "a positive integer")
    return value
