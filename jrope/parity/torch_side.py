"""What runs in PyTorch: the twin of a configuration, and its stages."""

import dataclasses
import importlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

from jrope.errors import JropeError
from jrope.hf import config_to_hf
from jrope.model.config import LlamaConfig
from jrope.rope import DynamicYarn

Stages: TypeAlias = dict[str, np.ndarray]


def torch_stages(
    model: Any, ids: np.ndarray, places: np.ndarray, *, condense: float = 1.0
) -> Stages:
    """Every stage of a transformers Llama as float32 [B, T, ...], row by row.

    `condense` divides the positions as FastChat does: in float32, before the product
    with the frequencies.
    """
    torch, inner = import_module("torch"), model.model
    parts = {"embeddings": inner.embed_tokens}
    parts |= {f"layer {i}": layer for i, layer in enumerate(inner.layers)}
    parts |= {"final norm": inner.norm, "logits": model.lm_head}
    seen: dict[str, list[np.ndarray]] = {name: [] for name in parts}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            seen[name].append(output.float().numpy(force=True))

        return hook

    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    device = model.device
    for row, steps in zip(ids, places, strict=True):
        tokens = torch.tensor(row[None], dtype=torch.long, device=device)
        at = torch.tensor(steps[None], dtype=torch.long, device=device)
        if condense != 1:
            at = at.float() / condense
        # Dynamic NTK remembers the longest row so far; ours depend on themselves alone.
        inner.rotary_emb = type(inner.rotary_emb)(model.config).to(device)
        with torch.no_grad():
            # The mask says that gaps between positions do not part sequences.
            mask = torch.ones_like(tokens)
            model(tokens, position_ids=at, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(rows) for name, rows in seen.items()}


def twin_config(config: LlamaConfig) -> tuple[dict[str, Any], float]:
    """transformers' words for the model, and what its positions are divided by."""
    condense, rope = config.rope.condense, config.rope
    if isinstance(rope.scaling, DynamicYarn):
        raise JropeError("rope: transformers has no dynamic YaRN to compare with")
    if condense != 1 and rope.needs_length:
        method = type(rope.scaling).__name__
        raise JropeError(
            f"condense: got {condense} with {method}, whose length transformers takes "
            "from the divided positions; there is nothing to compare with"
        )
    plain = dataclasses.replace(rope, condense=1.0)
    return config_to_hf(dataclasses.replace(config, rope=plain)), condense


def import_module(name: str) -> Any:
    """torch or transformers, which only parity needs; else a JropeError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = "pip install torch transformers"
        raise JropeError(f"parity needs {name} ({error}): {wanted}") from None


@contextmanager
def quiet(transformers: Any) -> Generator[None]:
    """Without transformers' progress bars."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
