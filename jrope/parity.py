"""The same weights and tokens through transformers and jrope, stage by stage.

A few tokens are placed at chosen positions, so that position 131071 costs what position
0 costs.  Each segment is a row of its own; transformers gets the rows one by one.

What is judged:

- float32: the largest difference of a logit from PyTorch's, as a part of the largest
  logit, is at most `threshold` in every segment; from position 8192 on, `threshold`
  times position / 8192 (see `parity_report.Segment.slack`).
- bfloat16, float16: both are compared with PyTorch in float32 on the same rounded
  weights, and jrope's error is at most 1.10 times PyTorch's.  The error is the relative
  RMS of a token's logits, geometric mean over tokens: a few tokens of a trained model
  (attention sinks) err a hundred times more than the rest, and what they dominate, a
  maximum or an RMS over all, is the luck of one rounding.  Tokens of one row share that
  luck, hence each segment is run 8 times with other tokens; the ratio then has a
  standard error of 0.03 for a trained model of 135M, less for random ones.

For dynamic NTK and longrope the length is the row's largest position + 1 on both sides.
"""

import dataclasses
import importlib
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jrope.errors import JropeError
from jrope.hf import config_to_hf
from jrope.hf.checkpoint import load
from jrope.model.config import LlamaConfig
from jrope.model.layers import decoder_layer, rms_norm
from jrope.model.llama import embed, forward
from jrope.model.with_rope import with_rope
from jrope.parity_report import Report, segment, stage
from jrope.rope import DynamicYarn, Method, table

DTYPES = ("float32", "bfloat16", "float16")
FAR = 131072
REPEATS = 8

Stages = dict[str, np.ndarray]
_forward = jax.jit(forward, static_argnames=("config",))


def compare(
    folder: str | Path,
    *,
    tokens: Sequence[int] | np.ndarray | None = None,
    count: int = 64,
    dtype: str = "float32",
    rope: str | Method | tuple[str, Mapping[str, Any]] | None = None,
    condense: float | None = None,
    positions: Sequence[int | str] | None = None,
    threshold: float = 2e-5,
) -> Report:
    """Run a Hugging Face folder through transformers and jrope.

    Args:
      folder: a folder or hub id, as `load` takes.
      tokens: ids to feed, cut into segments, begun again where they end; None: random
        ones, always the same.
      count: tokens of a segment; in 16 bits there are 8 times as many, see the module.
      dtype: one of DTYPES, for both.
      rope: another rotary embedding, as `with_rope` takes: a method, a name, or a name
        and its fields.
      condense: divide positions by this, PyTorch's too.
      positions: where segments begin: an integer, "trained", "trained+32" or
        "trained-32"; or "spread", one segment with gaps, from 0 to the last position of
        the others (trained models may be chaotic there: float32 noise times 100).
        None: 0, at and past the trained length, and up to 131071.
      threshold: see the module.

    Raises:
      JropeError: an argument makes no sense, `load` refuses the folder, transformers
        has no such rotary embedding, or torch or transformers is not installed.
    """
    if dtype not in DTYPES:
        raise JropeError(f"dtype: got {dtype!r}, want one of {', '.join(DTYPES)}")
    transformers = _module("transformers")
    params, config = load(folder, dtype)
    name, fields = rope if isinstance(rope, tuple) else (rope, {})
    config = with_rope(config, name, condense=condense, **fields)
    trained = config.rope.trained_length or config.max_position_embeddings
    segments = place(positions, count, trained)
    repeats = 1 if dtype == "float32" else REPEATS
    places = np.repeat(segments, repeats, axis=0)
    ids = _rows(tokens, config.vocab_size, places.shape)
    wanted, condense = _twin_config(config)
    ours = jrope_stages(params, config, ids, places)
    del params  # one model in memory at a time
    with _quiet(transformers):
        model = transformers.LlamaForCausalLM.from_pretrained(
            folder,
            config=transformers.LlamaConfig(**wanted),
            dtype=getattr(_module("torch"), dtype),
        )
    theirs, want = None, torch_stages(model, ids, places, condense=condense)
    if dtype != "float32":
        theirs, want = want, torch_stages(model.float(), ids, places, condense=condense)
    return Report(
        model=str(folder),
        dtype=dtype,
        rope=_words(config),
        trained_length=trained,
        stages=tuple(
            stage(
                name, ours[name], want[name], None if theirs is None else theirs[name]
            )
            for name in want
        ),
        segments=tuple(
            segment(
                trained,
                row,
                ours["logits"][i * repeats :][:repeats],
                want["logits"][i * repeats :][:repeats],
                None if theirs is None else theirs["logits"][i * repeats :][:repeats],
            )
            for i, row in enumerate(segments)
        ),
        threshold=threshold,
    )


def place(
    positions: Sequence[int | str] | None, count: int, trained: int
) -> np.ndarray:
    """The positions of every segment, int32 [segments, count]; see `compare`.

    >>> place(["0", "trained-2", "spread"], 4, 10).tolist()
    [[0, 1, 2, 3], [8, 9, 10, 11], [0, 4, 7, 11]]
    """
    if count < 1:
        raise JropeError(f"tokens: got {count} a segment, want at least 1")
    if positions is None:
        half = min(count // 2, trained)
        around = (f"trained-{half}", f"trained+{half}")
        positions = ("0", *around, max(FAR - count, 0))
    starts = [None if p == "spread" else _start(p, trained) for p in positions]
    last = max((s + count for s in starts if s is not None), default=FAR) - 1
    if not starts or last >= 2**31:
        got = ",".join(map(str, positions))
        raise JropeError(f"positions: got {got!r}, want at least one, all below 2**31")
    rows = [
        np.linspace(0, last, count).round() if s is None else s + np.arange(count)
        for s in starts
    ]
    return np.stack(rows).astype(np.int32)


def jrope_stages(
    params: Mapping[str, Any], config: LlamaConfig, ids: np.ndarray, places: np.ndarray
) -> Stages:
    """Every stage of jrope as float32 [B, T, ...]; the logits are `forward`'s."""
    tokens, positions = jnp.asarray(ids), jnp.asarray(places)
    lengths = jnp.asarray(places.max(axis=1) + 1)
    cos, sin = table(config.rope, positions, length=lengths)
    model = params["model"]
    x = embed(model, tokens)
    seen = {"embeddings": x}
    layer = partial(decoder_layer, config=config, capacity=ids.shape[1])
    for i in range(config.num_hidden_layers):
        x, _ = layer(model["layers"][str(i)], x, cos, sin, None, None)
        seen[f"layer {i}"] = x
    seen["final norm"] = rms_norm(x, model["norm"]["weight"], config.rms_norm_eps)
    seen["logits"], _ = _forward(params, tokens, positions, config=config)
    return {name: np.asarray(y).astype(np.float32) for name, y in seen.items()}


def torch_stages(
    model: Any, ids: np.ndarray, places: np.ndarray, *, condense: float = 1.0
) -> Stages:
    """Every stage of a transformers Llama as float32 [B, T, ...], row by row.

    `condense` divides the positions as FastChat does: in float32, before the product
    with the frequencies.
    """
    torch, inner = _module("torch"), model.model
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


def _start(word: int | str, trained: int) -> int:
    match = re.fullmatch(r"(\d+)|trained([+-]\d+)?", str(word).strip())
    start = -1
    if match:
        start = int(match[1]) if match[1] else trained + int(match[2] or 0)
    if start < 0:
        wanted = "an integer >= 0, trained, trained+N, trained-N or spread"
        raise JropeError(f"positions: got {word!r} (trained: {trained}), want {wanted}")
    return start


def _rows(tokens: Any, vocabulary: int, shape: tuple[int, ...]) -> np.ndarray:
    if tokens is None:
        return np.random.default_rng(0).integers(0, vocabulary, shape, np.int32)
    ids = np.asarray(tokens)
    good = ids.size and np.issubdtype(ids.dtype, np.integer)
    if not good or ids.min() < 0 or ids.max() >= vocabulary:
        raise JropeError(
            f"tokens: got {ids.size} of {ids.dtype}, want at least one, all integers "
            f"from 0 to {vocabulary - 1}; does the tokenizer belong to this model?"
        )
    return np.resize(ids, shape).astype(np.int32)


def _twin_config(config: LlamaConfig) -> tuple[dict[str, Any], float]:
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


def _words(config: LlamaConfig) -> str:
    """The rotary embedding; of its method, the fields that differ from the default."""
    rope, method = config.rope, "plain RoPE"
    if rope.scaling is not None:
        fields = dataclasses.fields(cast(Any, rope.scaling))
        values = {f.name: (getattr(rope.scaling, f.name), f.default) for f in fields}
        told = [f"{k}={v}" for k, (v, usual) in values.items() if v != usual]
        method = f"{type(rope.scaling).__name__}({', '.join(told)})"
        method = method if len(method) <= 100 else f"{method[:100]}...)"
    divided = "" if rope.condense == 1 else f" of positions / {rope.condense:g}"
    return f"{method}{divided}, theta {rope.theta:g}"


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = "pip install torch transformers"
        raise JropeError(f"parity needs {name} ({error}): {wanted}") from None


@contextmanager
def _quiet(transformers: Any) -> Generator[None]:
    """Without transformers' progress bars."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
