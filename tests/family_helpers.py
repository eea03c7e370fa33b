"""A tiny random model of every family, built by its own class in transformers."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from jrope.hf.checkpoint import load
from jrope.model.config import LlamaConfig

WINDOW, TRAINED = 5, 32
COUNT = 2 * WINDOW + 3
_SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TRAINED,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


class Case(NamedTuple):
    """A model_type, and fields of its configuration in transformers."""

    model_type: str
    fields: dict[str, Any] = {}  # noqa: RUF012


_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": TRAINED,
}
_SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
_MIXED = ["sliding_attention", "full_attention"]
CASES: dict[str, Case] = {
    "qwen2": Case("qwen2", {"rope_parameters": _YARN}),
    "qwen2-window": Case("qwen2", {**_SLIDING, "max_window_layers": 1}),
    "qwen3": Case("qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": Case("mistral", {"head_dim": 16, "sliding_window": WINDOW}),
    "ministral": Case(
        "ministral",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "rope_parameters": _YARN,
        },
    ),
    "smollm3": Case(
        "smollm3",
        {**_SLIDING, "no_rope_layers": [1, 0], "attention_bias": True},
    ),
    "granite": Case(
        "granite",
        {
            "embedding_multiplier": 1.5,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.15,
            "logits_scaling": 3.0,
            "mlp_bias": True,
        },
    ),
    "phi3": Case("phi3", {"sliding_window": WINDOW}),
    "phi3-longrope": Case(
        "phi3",
        {
            "hidden_size": 64,
            "partial_rotary_factor": 0.75,
            "original_max_position_embeddings": TRAINED,
            "max_position_embeddings": 4 * TRAINED,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0 + 0.1 * i for i in range(6)],
                "long_factor": [1.0 + 0.5 * i for i in range(6)],
            },
        },
    ),
    "gemma": Case("gemma", {"head_dim": 16}),
    "gemma2": Case(
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": Case(
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 1e6,
                },
            },
        },
    ),
    "olmo2": Case("olmo2", {"attention_bias": True}),
    "olmo3": Case(
        "olmo3",
        {
            "sliding_window": WINDOW,
            "layer_types": _MIXED,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": _YARN,
            },
        },
    ),
    "seed_oss": Case("seed_oss", {"head_dim": 16}),
}


class Built(NamedTuple):
    """A case four times over."""

    torch: Any
    folder: Path
    params: dict[str, Any]
    config: LlamaConfig


_FOLDERS = TemporaryDirectory()


@cache
def build(name: str) -> Built:
    """The model as transformers made it and saved it, and as jrope loads it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    case = CASES[name]
    config = AutoConfig.for_model(case.model_type, **{**_SIZES, **case.fields})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.eval().requires_grad_(False)
    random = np.random.default_rng(0)
    for key, tensor in sorted(model.named_parameters()):
        values = random.standard_normal(tensor.shape, np.float32)
        if tensor.ndim == 1:
            ones = "norm" in key and "gemma" not in case.model_type
            values = 0.2 * values + ones
        elif "embed_tokens" not in key or config.tie_word_embeddings:
            values *= 2 / tensor.shape[-1] ** 0.5
        tensor.copy_(torch.from_numpy(values))
    folder = Path(_FOLDERS.name) / name
    model.save_pretrained(folder)
    return Built(model, folder, *load(folder))


def torch_logits(
    model: Any, tokens: np.ndarray, positions: np.ndarray | None = None
) -> np.ndarray:
    """float32 logits [B, T, V]; rows that begin elsewhere do not share a pass."""
    import torch

    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    logits: dict[int, np.ndarray] = {}
    for first in dict.fromkeys(positions[:, 0].tolist()):
        rows = np.flatnonzero(positions[:, 0] == first)
        given = torch.tensor(tokens[rows])
        at = torch.tensor(positions[rows], dtype=torch.long)
        mask = torch.ones_like(given)  # gaps between positions part no sequences
        out = model(given, attention_mask=mask, position_ids=at, use_cache=False)
        logits |= zip(rows.tolist(), out.logits.float().numpy(), strict=True)
    return np.stack([logits[row] for row in range(len(tokens))])


def torch_greedy(model: Any, prompt: np.ndarray, new: int) -> list[int]:
    """The new tokens of transformers' generate, without any stop."""
    import torch
    from transformers import GenerationConfig

    ids = torch.tensor(prompt[None], dtype=torch.long)
    options = GenerationConfig(max_new_tokens=new, do_sample=False, pad_token_id=0)
    mask = torch.ones_like(ids)
    model.generation_config = GenerationConfig(pad_token_id=0)
    out = model.generate(ids, attention_mask=mask, generation_config=options)
    return out[0, len(prompt) :].tolist()


def config_json(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edited(folder: Path, target: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of config.json alone, changed in place by `edit`."""
    words = config_json(folder)
    edit(words)
    target.mkdir(exist_ok=True)
    (target / "config.json").write_text(json.dumps(words))
    return target
