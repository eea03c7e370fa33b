"""The families of decoders that are a LLaMA but for switches, by their model_type.

Everything that differs is said in one record: what an absent key means there (never
LLaMA's default), which keys are read, and how config.json is written back.

Source: transformers 5.24, `models/*/configuration_*.py` and `modeling_*.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

from jrope.errors import check, is_integer
from jrope.hf import gemma, olmo, phi3
from jrope.hf.layer_types import check_layers, windows, written
from jrope.hf.two_ropes import full_words
from jrope.model.config import LlamaConfig

Given: TypeAlias = Mapping[str, Any]


def _nothing(_: Any) -> dict[str, Any]:
    return {}


def _as_given(given: Given) -> Given:
    return given


@final
@dataclass(frozen=True, kw_only=True)
class Family:
    """How a family's config.json is read and written.

    Args:
      architecture: the class in transformers that has a head.
      defaults: every key that is read, and what its absence means.
      read: fields of `LlamaConfig` that no key of the same name holds.
      write: the keys that these fields become.
      theta: what an absent rope_theta means.
      rope: its words for rotary embeddings as `rope_from_hf` takes them.
      local: its words for those of the layers with a window; None: it has no others.
      partial: whether partial_rotary_factor says how much of a head is rotated.
      joined: whether files hold q, k, v and gate, up as one matrix each.
      ignored: keys of its files that transformers does not read either.
      aliases: other names of the architecture.
    """

    architecture: str
    defaults: Mapping[str, Any]
    read: Callable[[Given], dict[str, Any]] = _nothing
    write: Callable[[LlamaConfig], dict[str, Any]] = _nothing
    theta: float = 10000.0
    rope: Callable[[Given], Given] = _as_given
    local: Callable[[Given], Given] | None = None
    partial: bool = False
    joined: bool = False
    ignored: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()


_COMMON: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "bos_token_id": 1,
    "num_key_value_heads": None,
    "head_dim": None,
    "pad_token_id": None,
    "eos_token_id": 2,
}


def _defaults(*without: str, **changes: Any) -> dict[str, Any]:
    kept = {key: value for key, value in _COMMON.items() if key not in without}
    return {**kept, **changes}


_MISTRAL = _defaults(
    "attention_bias",
    "mlp_bias",
    max_position_embeddings=131072,
    num_key_value_heads=8,
    sliding_window=4096,
    layer_types=None,
)
_QWEN: dict[str, Any] = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}


def _read_qwen(given: Given) -> dict[str, Any]:
    first, used = given["max_window_layers"], given["use_sliding_window"]
    return {"windows": windows(given, lambda i: i >= first, used=used is True)}


def _write_qwen(config: LlamaConfig) -> dict[str, Any]:
    if config.windows is None:  # of any size: it is not used
        return {"use_sliding_window": False}
    layers = config.num_hidden_layers
    full = [i for i, window in enumerate(config.windows) if window is None]
    return {
        "use_sliding_window": True,
        "max_window_layers": full[-1] + 1 if full else 0,
        **written(config.windows, layers),
    }


def _read_qwen2(given: Given) -> dict[str, Any]:
    biases = {"attention_bias": True, "o_bias": False, "mlp_bias": False}
    return {**biases, **_read_qwen(given)}


def _read_qwen3(given: Given) -> dict[str, Any]:
    return {"mlp_bias": False, "qk_norm": "head", **_read_qwen(given)}


def _read_seed_oss(given: Given) -> dict[str, Any]:
    return {"o_bias": given["attention_out_bias"]}


def _write_seed_oss(config: LlamaConfig) -> dict[str, Any]:
    return {"attention_out_bias": config.o_bias}


def _read_mistral(given: Given) -> dict[str, Any]:
    found = windows({**given, "layer_types": None}, lambda _: True)
    if (types := given["layer_types"]) is not None:  # which Mistral does not read
        wanted = f"{written(found, len(types))['layer_types']}; or model_type ministral"
        check(windows(given, lambda _: True) == found, "layer_types", types, wanted)
    return {"attention_bias": False, "mlp_bias": False, "windows": found}


def _write_mistral(config: LlamaConfig) -> dict[str, Any]:
    told = written(config.windows, config.num_hidden_layers)
    return {"sliding_window": told["sliding_window"]}


def _read_ministral(given: Given) -> dict[str, Any]:
    found = windows(given, lambda _: True)
    return {"attention_bias": False, "mlp_bias": False, "windows": found}


def _write_ministral(config: LlamaConfig) -> dict[str, Any]:
    return written(config.windows, config.num_hidden_layers)


def _read_smollm3(given: Given) -> dict[str, Any]:
    count, uses = given["num_hidden_layers"], given["no_rope_layers"]
    check_layers(count)
    if uses is None:
        interval = given["no_rope_layer_interval"]
        good = is_integer(interval, at_least=1)
        check(good, "no_rope_layer_interval", interval, "a positive integer")
        uses = [int((i + 1) % interval != 0) for i in range(count)]
    good = isinstance(uses, list) and len(uses) >= count and {*uses} <= {0, 1}
    wanted = f"{count} of 1, where RoPE is used, and 0"
    check(good, "no_rope_layers", uses, wanted)
    rotary = tuple(bool(use) for use in uses[:count])
    used = given["use_sliding_window"] is True
    found = windows(given, lambda i: not rotary[i], used=used)
    return {"rotary": None if all(rotary) else rotary, "windows": found}


def _write_smollm3(config: LlamaConfig) -> dict[str, Any]:
    layers = config.num_hidden_layers
    return {
        "no_rope_layers": [int(r) for r in config.rotary or (True,) * layers],
        "use_sliding_window": config.windows is not None,
        **written(config.windows, layers),
    }


def _read_granite(given: Given) -> dict[str, Any]:
    scale, divisor = given["attention_multiplier"], given["logits_scaling"]
    return {"attention_scale": scale, "logits_divisor": divisor}


def _write_granite(config: LlamaConfig) -> dict[str, Any]:
    scale = config.attention_scale
    return {
        "attention_multiplier": config.head_dim**-0.5 if scale is None else scale,
        "logits_scaling": config.logits_divisor,
    }


FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        aliases=("LLaMAForCausalLM",),  # of the first conversions
        defaults=_COMMON,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        defaults=_defaults("attention_bias", "mlp_bias", **_QWEN),
        read=_read_qwen2,
        write=_write_qwen,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        defaults=_defaults("mlp_bias", **_QWEN, head_dim=128),
        read=_read_qwen3,
        write=_write_qwen,
    ),
    "seed_oss": Family(
        architecture="SeedOssForCausalLM",
        defaults=_defaults(
            max_position_embeddings=524288,
            num_key_value_heads=8,
            head_dim=128,
            attention_bias=True,
            attention_out_bias=False,
            bos_token_id=0,
            pad_token_id=1,
        ),
        read=_read_seed_oss,
        write=_write_seed_oss,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        defaults=_MISTRAL,
        read=_read_mistral,
        write=_write_mistral,
    ),
    "ministral": Family(
        architecture="MinistralForCausalLM",
        defaults=_MISTRAL,
        read=_read_ministral,
        write=_write_ministral,
    ),
    "smollm3": Family(
        architecture="SmolLM3ForCausalLM",
        defaults=_defaults(
            max_position_embeddings=32768,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            bos_token_id=128000,
            eos_token_id=128001,
            pad_token_id=128004,
            use_sliding_window=False,
            sliding_window=None,
            layer_types=None,
            no_rope_layers=None,
            no_rope_layer_interval=4,
        ),
        read=_read_smollm3,
        write=_write_smollm3,
        theta=2000000.0,
        ignored=("max_window_layers",),
    ),
    "granite": Family(
        architecture="GraniteForCausalLM",
        defaults=_defaults(
            embedding_multiplier=1.0,
            residual_multiplier=1.0,
            attention_multiplier=1.0,
            logits_scaling=1.0,
        ),
        read=_read_granite,
        write=_write_granite,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        defaults=phi3.DEFAULTS,
        read=phi3.read,
        write=phi3.write,
        rope=phi3.rope_words,
        partial=True,
        joined=True,
    ),
    "gemma": Family(
        architecture="GemmaForCausalLM",
        defaults=gemma.GEMMA,
        read=gemma.read,
        write=gemma.write,
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM",
        defaults=gemma.GEMMA2,
        read=gemma.read2,
        write=gemma.write2,
        ignored=("hidden_act",),
    ),
    "gemma3_text": Family(
        architecture="Gemma3ForCausalLM",
        defaults=gemma.GEMMA3,
        read=gemma.read3,
        write=gemma.write3,
        theta=1000000.0,
        rope=full_words,
        local=gemma.local3,
        ignored=("hidden_act",),
    ),
    "olmo2": Family(
        architecture="Olmo2ForCausalLM", defaults=olmo.OLMO2, read=olmo.read
    ),
    "olmo3": Family(
        architecture="Olmo3ForCausalLM",
        defaults=olmo.OLMO3,
        read=olmo.read3,
        write=olmo.write3,
        theta=olmo.THETA,
        rope=full_words,
        local=olmo.local3,
    ),
}
