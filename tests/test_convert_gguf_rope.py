"""gguf_to_hf: rotary scaling, as llama.cpp reads its keys and its factors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_helpers import LLAMA3, assert_logits, write_gguf
from convert_helpers import _as_a_script as _as_a_script
from convert_helpers import refuse as refuse
from convert_helpers import run as run

import jrope
from jrope.hf.checkpoint import read_config
from jrope.rope import Rope
from jrope.rope.methods import Linear, Llama3, Yarn

LENGTH = 64  # of the tiny model
THETA = 500000.0
PLAIN: dict[str, Any] = {"rope_type": "default"}
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 2.5}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_KEYS = {
    "scaling.type": "yarn",
    "scaling.factor": 4.0,
    "scaling.original_context_length": 16,
}
NEUTRAL = {
    "scaling.attn_factor": 1.0,
    "scaling.yarn_attn_factor": 1.0,
    "scaling.yarn_log_multiplier": 0.0,
    "scaling.alpha": 0.0,
    "scaling.yarn_beta_fast": 32.0,
    "scaling.yarn_beta_slow": 1.0,
    "scaling.finetuned": True,
}


def llama3_factors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """llama.cpp's rope_freqs: what frequencies are divided by, pair by pair."""
    turn = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
    ratio = rope["original_max_position_embeddings"] / turn
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((ratio - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def hf_frequencies(config: Any) -> tuple[np.ndarray, float]:
    """What transformers computes for its own configuration."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    module = LlamaRotaryEmbedding(config)
    return module.inv_freq.numpy(), module.attention_scaling


def assert_rotates(folder: Path, wanted: Mapping[str, Any], **config: Any) -> None:
    """jrope and transformers on the folder rotate as transformers with `wanted`."""
    from transformers import AutoConfig, LlamaConfig

    length = {"max_position_embeddings": LENGTH} | config
    oracle = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters=wanted, **length
    )
    frequencies, scaling = hf_frequencies(oracle)
    converted = hf_frequencies(AutoConfig.from_pretrained(folder))
    np.testing.assert_array_equal(converted[0], frequencies)
    own = jrope.hf.config_from_hf(read_config(folder)).rope.frequencies(None)
    np.testing.assert_array_equal(own[0], frequencies)
    assert own[1] == converted[1] == scaling


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ({"scaling.type": "none"}, PLAIN),
        ({"scaling.type": "none", "scaling.factor": 4.0}, PLAIN),  # never scales
        ({"scaling.type": "linear"}, PLAIN),
        ({"scaling.type": "linear", "scaling.factor": 1.0}, PLAIN),
        ({"scaling.factor": 0.0}, PLAIN),
        ({"scaling.type": "linear", "scaling.factor": 2.5}, LINEAR),
        ({"scaling.factor": 2.5}, LINEAR),  # an absent type is linear
        ({"scale_linear": 2.5}, LINEAR),  # the old key
        ({"scale_linear": 1.0}, PLAIN),
        ({"scale_linear": 8.0, "scaling.factor": 2.5}, LINEAR),  # the new one wins
        ({"scale_linear": 2.5, **NEUTRAL, "scaling.yarn_ext_factor": 0.0}, LINEAR),
        ({"scale_linear": 2.5, "scaling.original_context_length": 16}, LINEAR),
        ({**NEUTRAL, "scaling.yarn_ext_factor": -1.0}, PLAIN),
        ({"scaling.type": "yarn"}, PLAIN),
        ({**YARN_KEYS, "scaling.factor": 1.0}, PLAIN),
        (YARN_KEYS, YARN),
        ({**YARN_KEYS, **NEUTRAL, "scaling.yarn_ext_factor": 1.0}, YARN),
        ({**YARN_KEYS, "scaling.yarn_beta_fast": 24.0}, YARN | {"beta_fast": 24.0}),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0},
            YARN | {"original_max_position_embeddings": LENGTH},
        ),
    ],
)
def test_gguf_scaling(keys, wanted, tiny_hf, tmp_path, run):
    keys = {f"rope.{key}": value for key, value in keys.items()}
    src = write_gguf(tmp_path / "m.gguf", tiny_hf(), keys=keys)
    run("gguf_to_hf", src, tmp_path / "dst")
    assert_rotates(tmp_path / "dst", wanted | {"rope_theta": 10000.0})
    scaling = jrope.hf.config_from_hf(read_config(tmp_path / "dst")).rope.scaling
    kinds = {"default": type(None), "linear": Linear, "yarn": Yarn}
    assert type(scaling) is kinds[wanted["rope_type"]]


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_gguf_llama3(factor, tiny_hf, tmp_path, run):
    rope = LLAMA3 | {"factor": factor}
    tiny = tiny_hf(rope_parameters=rope, max_position_embeddings=131072)
    extra = {"rope_freqs.weight": llama3_factors(rope, tiny.config["head_dim"])}
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}
    src = write_gguf(tmp_path / "m.gguf", tiny, extra=extra, keys=keys)
    run("gguf_to_hf", src, tmp_path / "dst", "--dtype=float32", "--no-tokenizer")
    config = jrope.hf.config_from_hf(read_config(tmp_path / "dst"))
    assert config.rope == jrope.hf.config_from_hf(tiny.config).rope
    assert_rotates(tmp_path / "dst", rope, max_position_embeddings=131072)
    assert_logits(tmp_path / "dst", tiny.model)


@pytest.mark.parametrize("length", [1000, 4096, 8192, 8193, 100003, 131072, 262144])
@pytest.mark.parametrize(
    ("factor", "high", "head_dim"),
    [(8.0, 4.0, 128), (2.3, 4.0, 64), (32.0, 32.0, 64), (8.0, 2.5, 128)],
)
def test_llama3s_factors_tell_the_original_length(length, factor, high, head_dim):
    from _gguf_rope import llama3

    wanted = Llama3(
        factor=factor,
        original_length=length,
        low_freq_factor=1.0,
        high_freq_factor=high,
    )
    rope = LLAMA3 | {"factor": factor, "high_freq_factor": high}
    rope |= {"original_max_position_embeddings": length}
    factors = llama3_factors(rope, head_dim)
    plain = Rope(theta=THETA, rotary_dim=head_dim)
    assert llama3(factors, plain, Path("m.gguf")) == wanted


@pytest.mark.parametrize(("length", "head_dim"), [(1000, 8), (6000, 8), (114757, 16)])
def test_llama3s_factors_of_few_pairs_tell_the_frequencies(length, head_dim):
    """With no pair on the ramp, several lengths give the same frequencies."""
    from _gguf_rope import llama3

    rope = LLAMA3 | {"original_max_position_embeddings": length}
    plain = Rope(theta=THETA, rotary_dim=head_dim)
    scaling = llama3(llama3_factors(rope, head_dim), plain, Path("m.gguf"))
    wanted = Llama3(
        factor=8.0, original_length=length, low_freq_factor=1.0, high_freq_factor=4.0
    )
    assert scaling is not None
    got, oracle = (s(head_dim, THETA, None)[0] for s in (scaling, wanted))
    np.testing.assert_allclose(got, oracle, rtol=1e-6)


FACTORS = np.array([1, 1, 2, 3, 4, 8, 8, 8])


@pytest.mark.parametrize(
    ("keys", "factors", "message"),
    [
        ({"scaling.type": "su"}, None, "type is 'su', want 'none', 'linear' or 'yarn'"),
        ({"scaling.attn_factor": 2.0}, None, "attn_factor = 2.0 (want 1)"),
        ({**YARN_KEYS, "scaling.yarn_ext_factor": 0.5}, None, "= 0.5 (want 1) with ro"),
        ({"scaling.yarn_ext_factor": 1.0}, None, "= 1.0 (want 0) with rope scaling 'l"),
        ({"scaling.yarn_log_multiplier": 0.1}, None, "log_multiplier = 0.1 (want 0)"),
        ({"scaling.factor": "x"}, None, "llama.rope.scaling, linear: factor: got 'x'"),
        ({"scale_linear": 2.0}, FACTORS, "rope_freqs.weight and Linear(factor=2.0)"),
        ({}, np.arange(8), "got 8 numbers from 0 to 7, want 8 that rise from 1"),
        ({}, FACTORS[:4], "got 4 numbers from 1 to 3, want 8"),
        ({}, FACTORS, "is not of Llama 3's kind: got 8 numbers from 1 to 8"),
        ({}, np.full(8, np.nan), "from nan to nan"),
        ({}, np.ones(8, np.int8), "rope_freqs.weight is I8, want F32"),
    ],
)
def test_gguf_refuses_scaling(keys, factors, message, tiny_hf, tmp_path, refuse):
    keys = {f"rope.{key}": value for key, value in keys.items()}
    extra = {}
    if factors is not None:
        dtype = np.int8 if factors.dtype == np.int8 else np.float32
        extra = {"rope_freqs.weight": factors.astype(dtype)}
    src = write_gguf(tmp_path / "m.gguf", tiny_hf(), keys=keys, extra=extra)
    assert message in refuse("gguf_to_hf", src, tmp_path / "dst")
