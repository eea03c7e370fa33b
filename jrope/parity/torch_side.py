"""What runs in PyTorch: the twin of a configuration, its frequencies, its stages."""

import dataclasses
import importlib
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np

from jrope.errors import JropeError
from jrope.hf import config_to_hf
from jrope.hf.folders import PathLike
from jrope.hf.layer_types import FULL
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
    """Every stage of a transformers model as float32 [B, T, ...], row by row.

    `condense` divides the positions as FastChat does: in float32, before the product
    with the frequencies.  `inv_freq` [B, R] are frequencies to take instead of its own.
    """
    torch, inner = import_module("torch"), model.model
    parts = {f"layer {i}": layer for i, layer in enumerate(inner.layers)}
    parts |= {"final norm": inner.norm}
    names = ["embeddings", *parts, "logits"]
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            seen[name].append(output.float().numpy(force=True))

        return hook

    def enter(_module: Any, inputs: tuple[Any, ...]) -> None:
        seen["embeddings"].append(inputs[0].float().numpy(force=True))

    hooks = [part.register_forward_hook(keep(name)) for name, part in parts.items()]
    # What the first layer gets, and what the model gives: with multipliers and caps.
    hooks.append(inner.layers[0].register_forward_pre_hook(enter))
    device = model.device
    for i, (row, steps) in enumerate(zip(ids, places, strict=True)):
        tokens = torch.tensor(row[None], dtype=torch.long, device=device)
        at = torch.tensor(steps[None], dtype=torch.long, device=device)
        if condense != 1:
            at = at.float() / condense
        inner.rotary_emb = _new_rotary(model)
        if inv_freq is not None:
            given = torch.tensor(inv_freq[i], device=device)
            _take_frequencies(inner.rotary_emb, given)
        with torch.no_grad():
            # The mask says that gaps between positions do not part sequences.
            mask = torch.ones_like(tokens)
            how = {"attention_mask": mask, "use_cache": False}
            logits = model(tokens, position_ids=at, **how).logits
        seen["logits"].append(logits.float().numpy(force=True))
    for hook in hooks:
        hook.remove()
    return {name: np.concatenate(rows) for name, rows in seen.items()}


def torch_frequencies(model: Any, places: np.ndarray) -> np.ndarray:
    """The float32 frequencies that it rotates each row [B, T] with: [B, R].

    Of layers of two kinds those without a window, whose frequencies may be scaled.
    """
    torch = import_module("torch")
    rows: list[np.ndarray] = []
    for steps in places:
        at, rotary = torch.tensor(steps[None], dtype=torch.long), _new_rotary(model)
        kind = (FULL,) if _has_kinds(rotary) else ()
        rotary(torch.zeros(1, device=model.device), at.to(model.device), *kind)
        rows.append(getattr(rotary, _name(rotary)).float().numpy(force=True))
    return np.stack(rows)


def _has_kinds(rotary: Any) -> bool:
    return hasattr(rotary, f"{FULL}_inv_freq")


def _name(rotary: Any) -> str:
    return f"{FULL}_inv_freq" if _has_kinds(rotary) else "inv_freq"


def _take_frequencies(rotary: Any, inv_freq: Any) -> None:
    """Make a module rotate with these, and not replace them by its method."""
    if _has_kinds(rotary):
        rotary.rope_type[FULL] = "default"
    else:
        rotary.rope_type = "default"
    rotary.register_buffer(_name(rotary), inv_freq, persistent=False)


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


def merged(model: Any, adapter: PathLike) -> Any:
    """The model with a LoRA adapter in its weights, by PEFT."""
    with warnings.catch_warnings():  # PEFT's own, of names in transformers
        warnings.simplefilter("ignore")
        kind = import_module("peft").PeftModel
        return kind.from_pretrained(model, str(adapter)).merge_and_unload()


def import_module(name: str) -> Any:
    """torch, transformers or PEFT, which only parity needs; else a JropeError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = "peft" if name == "peft" else "torch transformers"
        raise JropeError(
            f"parity needs {name} ({error}): pip install {wanted}"
        ) from None


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
