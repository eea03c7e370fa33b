"""Phi-3, Phi-4 and Phi-4-mini: their words for rotary embeddings, which are their own.

"su" and "yarn" are longrope there, whose original length stands at the top level.  Past
it transformers computes a text anew with the long factors, as `planned` lengths do for
a total past it.
"""

from collections.abc import Mapping
from typing import Any

from jrope.errors import check
from jrope.hf.layer_types import windows, written
from jrope.hf.rope import ORIGINAL, PARTIAL, SCHEMAS, rope_to_hf
from jrope.model.config import LlamaConfig
from jrope.rope import LongRope

DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 4096,
    ORIGINAL: 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "num_key_value_heads": None,
    "head_dim": None,
    "pad_token_id": 32000,
    "eos_token_id": 32000,
    "sliding_window": None,
}
_TYPES = ("rope_type", "type")


def read(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LlamaConfig`."""
    found = windows(given, lambda _: True)
    return {"attention_bias": False, "mlp_bias": False, "windows": found}


def rope_words(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """The file with the names that `rope_from_hf` knows."""
    words, kinds = dict(given), set[Any]()
    for where in SCHEMAS:
        rope = words.get(where)
        if not isinstance(rope, dict) or not rope:
            continue
        renamed = {key: _kind(where, rope[key]) for key in _TYPES if key in rope}
        words[where] = {**rope, **renamed}
        kinds |= {*renamed.values()}
    if "longrope" not in kinds:
        del words[ORIGINAL]  # stands in every file, and means nothing then
    return words


def _kind(where: str, kind: Any) -> str:
    wanted = "'default' or 'longrope', which 'su' and 'yarn' are other names of here"
    good = kind in ("default", "longrope", "su", "yarn")
    check(good, f"{where}.rope_type", kind, wanted)
    return "default" if kind == "default" else "longrope"


def write(config: LlamaConfig) -> dict[str, Any]:
    """The keys of config.json that are not LLaMA's."""
    scaling, told = config.rope.scaling, rope_to_hf(config.rope)
    good = config.rope.condense == 1 and (scaling is None or type(scaling) is LongRope)
    wanted = "plain RoPE or LongRope: Phi-3 reads no other method"
    check(good, "rope", config.rope, wanted)
    sliding = written(config.windows, config.num_hidden_layers)["sliding_window"]
    keys = {PARTIAL: _part(config), "sliding_window": sliding}
    ratio = config.max_position_embeddings / (config.rope.trained_length or 1)
    if isinstance(scaling, LongRope) and scaling.factor == ratio:
        # All that transformers 4 takes; the rest follows from the lengths.
        three = {key: told[SCHEMAS[0]][key] for key in ("short_factor", "long_factor")}
        keys[SCHEMAS[0]] = {"type": "longrope", **three}
    return keys


def _part(config: LlamaConfig) -> float:
    """The part of a head that is rotated, whose product is not rounded down."""
    part = config.rope.rotary_dim / config.head_dim
    whole = int(config.head_dim * part) == config.rope.rotary_dim
    return part if whole else (config.rope.rotary_dim + 0.5) / config.head_dim
