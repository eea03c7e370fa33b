"""config.json of every family: defaults, each key, and what is refused by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import succeed
from family_helpers import CASES, TRAINED, WINDOW, build, config_json

from jrope.bench.versus import Peer
from jrope.errors import JropeError
from jrope.hf import config_from_hf, config_to_hf
from jrope.hf.families import FAMILIES
from jrope.model.config import LlamaConfig
from jrope.model.with_rope import with_rope
from jrope.rope import LongRope

each_family = pytest.mark.parametrize("kind", FAMILIES)
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 768,
    "intermediate_size": 96,
    "num_hidden_layers": 30,
    "num_attention_heads": 96,
}


def read(kind: str, **changes: Any) -> LlamaConfig:
    given = {"model_type": kind, **SIZES, **changes}
    return config_from_hf({key: x for key, x in given.items() if x != "absent"})


# Defaults, in both versions' words


@each_family
def test_absent_keys_mean_what_they_mean_to_transformers(kind: str) -> None:
    """The file that transformers makes of the sizes alone says the same."""
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(kind, **SIZES)
    full = json.loads(theirs.to_json_string(use_diff=False))
    full["architectures"] = [FAMILIES[kind].architecture]
    assert config_from_hf(full) == read(kind)
    if kind != "phi3":  # whose original length stands in every file
        assert config_from_hf(config_to_hf(read(kind))) == read(kind)


V4: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # model_type, a file of transformers 4, and what comes of it
    "qwen2 without": (
        "qwen2",
        {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 2},
        {"windows": None, "o_bias": False, "attention_bias": True},
    ),
    "qwen2 with": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 28},
        {"windows": (None,) * 28 + (9, 9)},
    ),
    "qwen3": ("qwen3", {"head_dim": "absent"}, {"head_dim": 128, "qk_norm": "head"}),
    "mistral 0.1": ("mistral", {}, {"windows": (4096,) * 30}),
    "mistral 0.2": ("mistral", {"sliding_window": None}, {"windows": None}),
    "mistral, in words of 5": (
        "mistral",
        {"sliding_window": 9, "layer_types": ["sliding_attention"] * 30},
        {"windows": (9,) * 30},
    ),
    "ministral": ("ministral", {"sliding_window": 9}, {"windows": (9,) * 30}),
    "smollm3": (
        "smollm3",
        {"no_rope_layer_interval": 3, "max_window_layers": 28},
        {"rotary": (True, True, False) * 10, "windows": None},
    ),
    "smollm3 with windows": (
        "smollm3",
        {
            "use_sliding_window": True,
            "sliding_window": 9,
            "no_rope_layers": [1, 0] * 15,
        },
        {"rotary": (True, False) * 15, "windows": (None, 9) * 15},
    ),
    "smollm3, all rotated": ("smollm3", {"no_rope_layers": [1] * 36}, {"rotary": None}),
    "granite": ("granite", {}, {"attention_scale": 1.0, "logits_divisor": 1.0}),
    "gemma": (
        "gemma",
        {"hidden_act": "gelu", "hidden_activation": None},
        {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
    ),
    "gemma2": ("gemma2", {"hidden_act": "x"}, {"windows": (4096, None) * 15}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window_pattern": 3, "sliding_window": 9, "rope_theta": 1e5},
        {"windows": (9, 9, None) * 10},
    ),
    "olmo3": (
        "olmo3",
        {"sliding_window": 9},
        {"windows": (*((9, 9, 9, None) * 7), 9, 9), "local_rope": None},
    ),
}


@pytest.mark.parametrize("name", V4)
def test_older_words(name: str) -> None:
    kind, words, fields = V4[name]
    config = read(kind, **words)
    assert {key: getattr(config, key) for key in fields} == fields
    again = json.loads(json.dumps(config_to_hf(config, dtype="bfloat16")))
    assert config_from_hf(again) == config


def test_gemma_3_has_two_ropes_in_older_words_too() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    words = {"rope_local_base_freq": 1e3, "rope_theta": 1e5, "rope_scaling": scaling}
    old = read("gemma3_text", **words)
    full = {**scaling, "rope_theta": 1e5}
    local = {"rope_type": "default", "rope_theta": 1e3}
    nested = {"full_attention": full, "sliding_attention": local}
    assert old == read("gemma3_text", rope_parameters=nested)
    assert old.local_rope is not None and old.local_rope.theta == 1e3
    assert old.rope.theta == 1e5 and old.rope != read("gemma3_text").rope
    assert config_from_hf(config_to_hf(old)) == old


@pytest.mark.parametrize("name", ["su", "yarn", "longrope"])
def test_other_names_of_longrope_in_phi3(name: str) -> None:
    lists = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    words = {"max_position_embeddings": 8192, "rope_scaling": {"type": name, **lists}}
    rope = read("phi3", **words).rope
    assert isinstance(rope.scaling, LongRope)
    assert rope.scaling.original_length == 4096 and rope.scaling.factor == 2.0


def test_part_of_a_head_in_phi3() -> None:
    for words in (
        {"partial_rotary_factor": 0.75},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.75}},
    ):
        config = read("phi3", **words)
        assert (config.head_dim, config.rope.rotary_dim) == (8, 6)
        assert config_from_hf(config_to_hf(config)) == config


# Every key is read


KEYS: dict[str, dict[str, Any]] = {  # case -> key -> another value
    "qwen2-window": {
        "sliding_window": WINDOW + 1,
        "layer_types": ["sliding_attention"] * 2,
    },
    "qwen3": {"attention_bias": True, "head_dim": 8, "hidden_act": "gelu"},
    "seed_oss": {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 4, "rms_norm_eps": 0.1},
    "ministral": {"layer_types": ["full_attention"] * 2, "sliding_window": 9},
    "smollm3": {"no_rope_layers": [1, 1], "attention_bias": False, "mlp_bias": True},
    "granite": {
        "embedding_multiplier": 2.0,
        "residual_multiplier": 2.0,
        "attention_multiplier": 2.0,
        "logits_scaling": 2.0,
    },
    "phi3-longrope": {
        "sliding_window": 9,
        "original_max_position_embeddings": 16,
    },
    "gemma": {"hidden_act": "relu", "attention_bias": True},
    "gemma2": {
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "hidden_activation": "relu",
        "sliding_window": 9,
        "layer_types": ["full_attention"] * 2,
    },
    "gemma3": {"query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
    "olmo2": {"attention_bias": False},
    "olmo3": {"sliding_window": 9, "layer_types": ["sliding_attention"] * 2},
}


@pytest.mark.parametrize(
    ("name", "key"), [(name, key) for name, keys in KEYS.items() for key in keys]
)
def test_every_key_changes_the_configuration(name: str, key: str) -> None:
    """Each field of that changes what is computed: test_model_fields.py."""
    words = config_json(build(name).folder)
    other = {**words, key: KEYS[name][key]}
    assert config_from_hf(other) != config_from_hf(words)


# What is refused


BAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts": ("qwen3_moe", {}, r"'qwen3_moe' \(a mixture of experts\), which is not"),
    "wrapper": ("gemma3", {}, "text beside images or sound: save its language model"),
    "cohere": ("cohere", {}, "LayerNorm without biases and blocks side by side"),
    "typo": ("qwen22", {}, "did you mean 'qwen2'.*want one of llama, qwen2, qwen3"),
    "no name": (["qwen2"], {}, "model_type is .'qwen2'.*want one of llama"),
    "other class": (
        "qwen2",
        {"architectures": ["Qwen2ForSequenceClassification"]},
        "architectures is .*, want .'Qwen2ForCausalLM'.",
    ),
    "biases of Qwen2": (
        "qwen2",
        {"attention_bias": True},
        "attention_bias is True, wa",
    ),
    "biases of Mistral": (
        "mistral",
        {"mlp_bias": True},
        "mlp_bias is True, want False",
    ),
    "window of Granite": (
        "granite",
        {"sliding_window": 9},
        "sliding_window is 9, want",
    ),
    "unknown": ("qwen3", {"num_experts": 8}, "unknown 'num_experts'"),
    "near": ("granite", {"logit_scaling": 8}, "did you mean 'logits_scaling'"),
    "no window": (
        "qwen3",
        {"layer_types": ["sliding_attention"] * 30},
        "sliding_window: got None, want a window, as layer_types names",
    ),
    "short": (
        "ministral",
        {"layer_types": ["full_attention"]},
        "layer_types: .*want 30 of 'full_attention' and 'sliding_attention'",
    ),
    "chunked": (
        "olmo3",
        {"layer_types": ["chunked_attention"] * 30},
        "layer_types: got",
    ),
    "window": ("mistral", {"sliding_window": 0}, "sliding_window: got 0, want null or"),
    "mistral's layers": (
        "mistral",
        {"layer_types": ["full_attention"] * 30},
        "layer_types: got .*or model_type ministral",
    ),
    "layers": (
        "mistral",
        {"num_hidden_layers": 10**9},
        "num_hidden_layers: got 1000000",
    ),
    "nope": (
        "smollm3",
        {"no_rope_layers": [1, 2] * 15},
        "no_rope_layers: .*want 30 of 1",
    ),
    "interval": (
        "smollm3",
        {"no_rope_layer_interval": 0},
        "interval: got 0, want a pos",
    ),
    "phi3's method": (
        "phi3",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling.rope_type: got 'linear', want 'default' or 'longrope'",
    ),
    "part": ("phi3", {"partial_rotary_factor": 1.5}, "partial_rotary_factor: got .1.5"),
    "part of Qwen": (
        "qwen2",
        {"partial_rotary_factor": 0.5},
        "partial_rotary_factor: ",
    ),
    "gemma's": (
        "gemma",
        {"hidden_activation": "relu"},
        "hidden_activation: got 'relu'",
    ),
    "scalar": ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: got 0"),
    "cap": (
        "gemma3_text",
        {"attn_logit_softcapping": 50.0},
        "capping: got 50.0, want n",
    ),
    "pattern": ("gemma3_text", {"sliding_window_pattern": "LG"}, "pattern: got 'LG'"),
    "nested": (
        "gemma3_text",
        {"rope_parameters": {"rope_type": "default"}},
        "rope_parameters: got .*want objects 'full_attention' and 'sliding_attention'",
    ),
    "two ropes": (
        "llama",
        {"rope_parameters": {"full_attention": {}}},
        "nested objects",
    ),
    "both ways": (
        "gemma2",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention is True, want False: only decoders",
    ),
    "olmo's theta": ("olmo3", {"rope_theta": 1e6}, "rope_theta: got 1000000.0, want 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name: str) -> None:
    kind, changes, message = BAD[name]
    with pytest.raises(JropeError, match=message):
        read(kind, **changes)


@each_family
def test_unknown_keys_are_refused(kind: str) -> None:
    with pytest.raises(JropeError, match="unknown 'some_switch'"):
        read(kind, some_switch=True)


UNTOLD: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama", {"windows": (5,) * 30}, r"'llama' has no words for windows"),
    "mistral": ("mistral", {"windows": (5, None) * 15}, "no words for windows"),
    "qwen2": ("qwen2", {"o_bias": True}, r"no words for o_bias \(True\)"),
    "granite": ("granite", {"qk_norm": "head"}, "no words for qk_norm"),
    "gemma": ("gemma", {"embedding_multiplier": 2.0}, "no words for embedding_multip"),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_what_a_family_has_no_words_for(name: str) -> None:
    kind, fields, message = UNTOLD[name]
    with pytest.raises(JropeError, match=message):
        config_to_hf(dataclasses.replace(read(kind), **fields))


def test_ropes_that_a_family_has_no_words_for() -> None:
    local = dataclasses.replace(read("olmo3").rope, theta=10.0)
    mistral = dataclasses.replace(read("mistral"), local_rope=local)
    with pytest.raises(JropeError, match="'mistral' has no words for local_rope"):
        config_to_hf(mistral)
    with pytest.raises(JropeError, match=r"rope: .*LongRope: Phi-3 reads no other"):
        config_to_hf(with_rope(read("phi3"), "linear", factor=2.0))
    with pytest.raises(JropeError, match=r"condense: config.json has no field"):
        config_to_hf(with_rope(read("gemma3_text"), condense=2.0))


# The command


@pytest.mark.parametrize("name", ["qwen2-window", "phi3-longrope", "gemma3"])
def test_inspect_and_plan(name: str, capsys: Any) -> None:
    folder = build(name).folder
    config = build(name).config
    out, _ = succeed(capsys, "inspect", folder)
    assert f"\nmodel       {CASES[name].model_type}, 2 layers, hidden" in out
    windowed = f"\nwindow      {WINDOW} tokens in 1 of 2 layers" in out
    assert windowed is (config.windows is not None)
    told = json.loads(succeed(capsys, "inspect", folder, "--json")[0])
    assert told["config"]["model_type"] == CASES[name].model_type
    words = ("--on", "h100", "--context", "64", "--new", "8", "--json")
    plan = json.loads(succeed(capsys, "plan", folder, *words)[0])
    slots = [plan["work"]["slots"], WINDOW if windowed else plan["work"]["slots"]]
    want = 2 * sum(slots) * config.num_key_value_heads * config.head_dim * 2
    assert plan["meshes"][0]["memory"]["cache"] == want


def test_bench_does_not_run_other_classes() -> None:
    with pytest.raises(JropeError, match=r"--versus: model_type: got 'mistral', want"):
        Peer({}, read("mistral"))


def test_convert_keeps_joined_matrices(tmp_path: Path, capsys: Any) -> None:
    from checkpoint_helpers import assert_same_tensors, tensors_of

    source = build("phi3-longrope").folder
    succeed(capsys, "convert", source, tmp_path / "out")
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(source))
    assert config_json(tmp_path / "out")["original_max_position_embeddings"] == TRAINED
