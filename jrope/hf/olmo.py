"""OLMo 2 and 3: what their files say beyond LLaMA's."""

from collections.abc import Mapping
from typing import Any

from jrope.errors import check
from jrope.hf.layer_types import windows, written
from jrope.hf.two_ropes import PARAMETERS, SCALING, local_words, write_ropes
from jrope.model.config import LlamaConfig

Given = Mapping[str, Any]
THETA = 500000.0  # OLMo 3's
OLMO2: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": None,
    "num_key_value_heads": None,
    "head_dim": None,
    "pad_token_id": 1,
    "eos_token_id": 50279,
}
OLMO3 = {**OLMO2, "sliding_window": 4096, "layer_types": None}
_SWITCHES = {
    "mlp_bias": False,
    "qk_norm": "whole",
    "norm": "wide",
    "norm_at": "post",
    "wide_rotation": True,
}


def read(_: Given) -> dict[str, Any]:
    """OLMo 2."""
    return dict(_SWITCHES)


def read3(given: Given) -> dict[str, Any]:
    """OLMo 3: all layers but every fourth have a window."""
    found = windows(given, lambda i: (i + 1) % 4 != 0)
    return {**_SWITCHES, "windows": found}


def local3(given: Given) -> Given:
    """The embedding of windowed layers, never scaled.

    Of a file without nested ropes transformers 5 takes rope_theta for the full layers
    alone, and its default for the others; version 4 takes it for all.
    """
    if not given.get(PARAMETERS):
        theta = given.get("rope_theta", THETA)
        wanted = f"{THETA:g}, or {PARAMETERS} in the words of transformers 5"
        check(theta == THETA, "rope_theta", theta, wanted)
    return local_words(given, THETA)


def write3(config: LlamaConfig) -> dict[str, Any]:
    """OLMo 3's own keys."""
    words = {**written(config.windows, config.num_hidden_layers), **write_ropes(config)}
    return {**words, SCALING: None} if config.rope.scaling is None else words
