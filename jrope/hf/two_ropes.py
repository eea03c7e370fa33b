"""Families whose layers with a window have a rotary embedding of their own.

transformers 5 nests both in rope_parameters, as "full_attention" and
"sliding_attention".  Version 4 has rope_theta and rope_scaling for the full layers.
"""

from collections.abc import Mapping
from typing import Any

from jrope.errors import JropeError, check
from jrope.hf.layer_types import FULL, SLIDING
from jrope.hf.rope import SCHEMAS, rope_to_hf
from jrope.model.config import LlamaConfig

SCALING, PARAMETERS = SCHEMAS


def full_words(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The file with the full layers' embedding alone, as `rope_from_hf` takes it."""
    nested = _nested(given)
    return {**given, PARAMETERS: None if nested is None else nested.get(FULL)}


def local_words(given: Mapping[str, Any], theta: float) -> Mapping[str, Any]:
    """The file with the windowed layers' embedding alone; else theta is `theta`."""
    nested = _nested(given) or {}
    rope = {"rope_theta": theta, **(nested.get(SLIDING) or {})}
    kept = {k: x for k, x in given.items() if k not in (SCALING, "rope_theta")}
    return {**kept, PARAMETERS: rope}


def _nested(given: Mapping[str, Any]) -> Mapping[str, Any] | None:
    nested = given.get(PARAMETERS)
    if not isinstance(nested, dict) or not nested:
        return None  # of another type, it is told when the embedding is read
    wanted = f"objects {FULL!r} and {SLIDING!r}, one for each kind of layer"
    good = {*nested} <= {FULL, SLIDING}
    good = good and all(isinstance(rope, dict | None) for rope in nested.values())
    check(good, PARAMETERS, nested, wanted)
    return nested


def write_ropes(config: LlamaConfig) -> dict[str, Any]:
    """`rope_parameters` of both."""
    local = config.local_rope or config.rope
    if config.rope.condense != 1 or local.condense != 1:
        raise JropeError(
            "condense: config.json has no field for it beside two rotary embeddings; "
            "leave it out of the file, and set it with `with_rope` after loading"
        )
    ropes = {FULL: config.rope, SLIDING: local}
    return {PARAMETERS: {k: rope_to_hf(x)[PARAMETERS] for k, x in ropes.items()}}
