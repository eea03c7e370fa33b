"""Gemma 1, 2 and 3 (text): what their files say beyond LLaMA's."""

from collections.abc import Mapping
from typing import Any

from jrope.errors import check, is_integer, is_positive
from jrope.hf.layer_types import windows, written
from jrope.hf.two_ropes import local_words, write_ropes
from jrope.model.config import LlamaConfig

Given = Mapping[str, Any]
TANH = "gelu_pytorch_tanh"
_GEMMA: dict[str, Any] = {
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "head_dim": 256,
}
GEMMA: dict[str, Any] = {
    **_GEMMA,
    "num_key_value_heads": 16,
    "hidden_act": TANH,
    "hidden_activation": None,
}
GEMMA2 = {
    **_GEMMA,
    "num_key_value_heads": 4,
    "hidden_activation": TANH,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "layer_types": None,
}
GEMMA3 = {
    **GEMMA2,
    "max_position_embeddings": 131072,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "sliding_window_pattern": None,
    "_sliding_window_pattern": None,
    "rope_local_base_freq": 10000.0,
}


def _common(given: Given) -> dict[str, Any]:
    return {
        "mlp_bias": False,
        "norm": "gemma",
        "embedding_multiplier": given["hidden_size"] ** 0.5,
    }


def read(given: Given) -> dict[str, Any]:
    """Gemma 1: its "gelu" has always meant the approximation."""
    act, newer = given["hidden_act"], given["hidden_activation"]
    act = TANH if act == "gelu" else act
    check(newer in (None, act), "hidden_activation", newer, f"null or {act!r}")
    return {**_common(given), "hidden_act": act}


def read2(given: Given) -> dict[str, Any]:
    """Gemma 2: every other layer has a window, the first one too."""
    return {**_capped(given), "windows": windows(given, lambda i: i % 2 == 0)}


def read3(given: Given) -> dict[str, Any]:
    """Gemma 3: all layers but every sixth have a window; norms of queries and keys."""
    given_ = (given["sliding_window_pattern"], given["_sliding_window_pattern"])
    pattern = next((p for p in given_ if p is not None), 6)
    good = is_integer(pattern, at_least=1)
    check(good, "sliding_window_pattern", pattern, "a positive integer")
    found = windows(given, lambda i: (i + 1) % pattern != 0)
    # transformers computes its cap of scores in one of its paths and not in others
    cap = given["attn_logit_softcapping"]
    check(cap is None, "attn_logit_softcapping", cap, "null, as in every Gemma 3")
    return {**_capped(given), "qk_norm": "head", "windows": found}


def _capped(given: Given) -> dict[str, Any]:
    scalar = given["query_pre_attn_scalar"]
    check(is_positive(scalar), "query_pre_attn_scalar", scalar, "a number > 0")
    return {
        **_common(given),
        "hidden_act": given["hidden_activation"],
        "attention_scale": scalar**-0.5,
        "score_cap": given["attn_logit_softcapping"],
        "logit_cap": given["final_logit_softcapping"],
        "norm_at": "sandwich",
    }


def local3(given: Given) -> Given:
    """Gemma 3's words for the embedding of its windowed layers."""
    return local_words(given, given["rope_local_base_freq"])


def write(config: LlamaConfig) -> dict[str, Any]:
    """Gemma 1's own keys."""
    return {"hidden_activation": config.hidden_act}


def write2(config: LlamaConfig) -> dict[str, Any]:
    """Gemma 2's own keys."""
    scale = config.attention_scale or config.head_dim**-0.5
    return {
        "hidden_activation": config.hidden_act,
        "query_pre_attn_scalar": _scalar(scale),
        "attn_logit_softcapping": config.score_cap,
        "final_logit_softcapping": config.logit_cap,
        **written(config.windows, config.num_hidden_layers),
    }


def write3(config: LlamaConfig) -> dict[str, Any]:
    """Gemma 3's own keys."""
    local = config.local_rope or config.rope
    return {
        **write2(config),
        **write_ropes(config),
        "rope_local_base_freq": float(local.theta),
    }


def _scalar(scale: float) -> int | float:
    """The number whose power -1/2 is the scale: a whole one where it is."""
    whole = round(scale**-2)
    return whole if whole and whole**-0.5 == scale else scale**-2
