"""What runs in PyTorch: the twin of a configuration, its frequencies, its stages."""

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
    model: Any,
    ids: np.ndarray,
    places: np.ndarray,
    *,
    condense: float = 1.0,
    inv_freq: np.ndarray | None = None,
) -> Stages:
    """Every stage of a transformers Llama as float32 [B, T, ...], row by row.

    `condense` divides the positions as FastChat does: in float32, before the product
    with the frequencies.  `inv_freq` [B, R] are frequencies to take instead of its own.
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
    for i, (row, steps) in enumerate(zip(ids, places, strict=True)):
        tokens = torch.tensor(row[None], dtype=torch.long, device=device)
        at = torch.tensor(steps[None], dtype=torch.long, device=device)
        if condense != 1:
            at = at.float() / condense
        inner.rotary_emb = _new_rotary(model)
        if inv_freq is not None:
            inner.rotary_emb.rope_type = "default"  # or it would replace them
            given = torch.tensor(inv_freq[i], device=device)
            inner.rotary_emb.register_buffer("inv_freq", given, persistent=False)
        with torch.no_grad():
            # The mask says that gaps between positions do not part sequences.
            mask = torch.ones_like(tokens)
            model(tokens, position_ids=at, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(rows) for name, rows in seen.items()}


def torch_frequencies(model: Any, places: np.ndarray) -> np.ndarray:
    """The float32 frequencies that it rotates each row [B, T] with: [B, R]."""
    torch = import_module("torch")
    rows: list[np.ndarray] = []
    for steps in places:
        at, rotary = torch.tensor(steps[None], dtype=torch.long), _new_rotary(model)
        rotary(torch.zeros(1, device=model.device), at.to(model.device))
        rows.append(rotary.inv_freq.float().numpy(force=True))
    return np.stack(rows)


def _new_rotary(model: Any) -> Any:
    """Dynamic NTK remembers the longest row so far; ours depend on themselves alone."""
    return type(model.model.rotary_emb)(model.config).to(model.device)


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


def import_peers() -> tuple[Any, Any]:
    """The torch and transformers modules, which work together; else a JropeError."""
    torch = import_module("torch")  # first: transformers without it says so by itself
    transformers = import_module("transformers")
    if not transformers.is_torch_available():
        raise JropeError(
            f"parity: transformers {transformers.__version__} does not take torch "
            f"{torch.__version__}: pip install --upgrade torch transformers"
        )
    return torch, transformers


def import_module(name: str) -> Any:
    """torch or transformers, which only parity needs; else a JropeError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = "pip install torch transformers"
        raise JropeError(f"parity needs {name} ({error}): {wanted}") from None


@contextmanager
def quiet(transformers: Any) -> Generator[None]:
    """Without transformers' progress bars and its warnings about configurations."""
    log = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
