"""`compare`: the same weights and tokens through transformers and jrope."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jrope.errors import JropeError
from jrope.hf.checkpoint import load
from jrope.hf.folders import PathLike, find_folder
from jrope.hf.quantized import is_quantized_folder
from jrope.model.config import LlamaConfig
from jrope.model.layers import (
    Step,
    decoder_layer,
    layer_kind,
    local_table,
    norm_of,
    rms_norm,
)
from jrope.model.llama import embed, forward
from jrope.model.placed import share_of
from jrope.model.with_rope import with_rope
from jrope.parity.frequencies import Frequencies, compare_frequencies
from jrope.parity.report import NotFinite, Report, Segment, Stage, segment, stage
from jrope.parity.torch_side import (
    Stages,
    import_peers,
    merged,
    quiet,
    torch_frequencies,
    torch_stages,
    twin_config,
)
from jrope.rope import Method, Rope, describe, table
from jrope.sharding.axes import ONE, Axes, entry
from jrope.sharding.meshes import layout_of, readable
from jrope.tree import Params

DTYPES = ("float32", "bfloat16", "float16")
FAR = 131072
REPEATS = 8

_forward = jax.jit(forward, static_argnames=("config", "axes"))


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
    mesh: Mesh | None = None,
    adapter: PathLike | None = None,
) -> Report:
    """Run a Hugging Face folder through transformers and jrope.

    Args:
      folder: a folder or hub id, as `load` takes.
      tokens: ids to feed, cut into segments, begun again where they end; None: random
        ones, always the same.
      count: tokens of a segment; in 16 bits there are 8 times as many, see the package.
      dtype: one of DTYPES, for both.
      rope: another rotary embedding, as `with_rope` takes: a method, a name, or a name
        and its fields.
      condense: divide positions by this, PyTorch's too.
      positions: where segments begin: an integer, "trained", "trained+32" or
        "trained-32"; or "spread", one segment with gaps, from 0 to the last position of
        the others (trained models may be chaotic there: float32 noise times 100).
        None: 0, at and past the trained length, and up to 131071.
      threshold: see the package.
      mesh: where jrope runs, as in `load`; PyTorch runs where it does without.
      adapter: a LoRA adapter, as in `load`; PEFT merges it for PyTorch.

    Raises:
      JropeError: an argument makes no sense, `load` refuses the folder, transformers
        has no such rotary embedding, or torch or transformers is not installed.

    Weights are loaded without `check_finite`: the report says on which side NaN is.
    """
    if dtype not in DTYPES:
        raise JropeError(f"dtype: got {dtype!r}, want one of {', '.join(DTYPES)}")
    if is_quantized_folder(find_folder(folder)):
        raise JropeError(
            f"{folder} holds quantised weights, which transformers would run its own "
            "way; compare the float folder that `jrope convert` writes of it"
        )
    torch, transformers = import_peers()
    params, config = load(folder, dtype, mesh=mesh, adapter=adapter)
    name, fields = rope if isinstance(rope, tuple) else (rope, {})
    config = with_rope(config, name, condense=condense, **fields)
    trained = config.rope.trained_length or config.max_position_embeddings
    segments = place(positions, count, trained)
    repeats = 1 if dtype == "float32" else REPEATS
    places = np.repeat(segments, repeats, axis=0)
    ids = _rows(tokens, config.vocab_size, places.shape)
    wanted, condense = twin_config(config)
    ours = jrope_stages(params, config, ids, places)
    del params  # one model in memory at a time
    with quiet(transformers):
        kind = getattr(transformers, wanted["architectures"][0])
        model = kind.from_pretrained(
            folder,
            config=kind.config_class(**wanted),
            dtype=getattr(torch, dtype),
        )
        model = model if adapter is None else merged(model, adapter)
    frequencies, inv_freq = _frequencies(config.rope, model, places)
    run = partial(
        torch_stages, ids=ids, places=places, condense=condense, inv_freq=inv_freq
    )
    theirs, want = None, run(model)
    if dtype != "float32":
        theirs, want = want, run(model.float())
    not_finite = _not_finite(ours, theirs, want)
    report = Report(
        model=str(folder),
        dtype=dtype,
        rope=f"{describe(config.rope)}, theta {config.rope.theta:g}",
        trained_length=trained,
        frequencies=frequencies,
        not_finite=not_finite,
        stages=(),
        segments=(),
        threshold=threshold,
    )
    if not_finite is not None:
        return report
    stages, parts = _errors(trained, segments, ours, want, theirs)
    return replace(report, stages=stages, segments=parts)


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
    params: Params, config: LlamaConfig, ids: np.ndarray, places: np.ndarray
) -> Stages:
    """Every stage of jrope as float32 [B, T, ...]; the logits are `forward`'s.

    On a mesh every group of rows computes all of them: a few, which it may not divide.
    """
    tokens, positions = jnp.asarray(ids), jnp.asarray(places)
    run, layout = partial(_stages, config=config), layout_of(params)
    if layout is not None:
        how = {"config": share_of(config, layout), "axes": layout.axes}
        whole = PartitionSpec()
        found = whole, PartitionSpec(None, None, entry(layout.axes.tensor))
        given = layout.params(params), whole, whole
        run = jax.jit(layout.map(partial(_stages, **how), given, found))
        tokens, positions = layout.place((tokens, positions), (whole, whole))
    seen, logits = readable(run(params, tokens, positions))
    seen["logits"] = logits
    return {name: np.asarray(y).astype(np.float32) for name, y in seen.items()}


def _stages(
    params: Params,
    tokens: jax.Array,
    positions: jax.Array,
    *,
    config: LlamaConfig,
    axes: Axes = ONE,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """The hidden states by stage, and the logits."""
    lengths = jnp.max(positions, axis=1) + 1
    cos, sin = table(config.rope, positions, length=lengths)
    model = params["model"]
    x = embed(model, tokens, config=config, axes=axes)
    seen = {"embeddings": x}
    count, local = tokens.shape[1], local_table(config, positions)
    step = Step(cos=cos, sin=sin, local=local)
    layer = partial(decoder_layer, config=config, capacity=count, axes=axes)
    for i in range(config.num_hidden_layers):
        kind = layer_kind(config, i, count)
        x, _ = layer(model["layers"][str(i)], x, step, **kind)
        seen[f"layer {i}"] = x
    seen["final norm"] = rms_norm(x, *norm_of(model["norm"], config))
    logits, _ = _forward(params, tokens, positions, config=config, axes=axes)
    return seen, logits


def _frequencies(
    rope: Rope, model: Any, places: np.ndarray
) -> tuple[Frequencies, np.ndarray | None]:
    """What differs, and jrope's [B, R] where PyTorch is to run with them."""
    lengths = places.max(axis=1).astype(np.int64) + 1
    theirs = torch_frequencies(model, places)
    ours = np.broadcast_to(rope.frequencies(lengths)[0], theirs.shape).copy()
    found = compare_frequencies(rope, ours, theirs, lengths)
    return found, ours if found.differences and found.ok else None


def _not_finite(ours: Stages, theirs: Stages | None, want: Stages) -> NotFinite | None:
    def first(*runs: Stages | None) -> str | None:
        bad = (
            name
            for name in want
            if any(run and not np.isfinite(run[name]).all() for run in runs)
        )
        return next(bad, None)

    found = NotFinite(jrope=first(ours), torch=first(theirs, want))
    return None if found == NotFinite(jrope=None, torch=None) else found


def _errors(
    trained: int,
    segments: np.ndarray,
    ours: Stages,
    want: Stages,
    theirs: Stages | None,
) -> tuple[tuple[Stage, ...], tuple[Segment, ...]]:
    """The errors of every stage, and of the logits of every segment."""
    stages = tuple(
        stage(name, ours[name], want[name], None if theirs is None else theirs[name])
        for name in want
    )
    got, right = (np.split(run["logits"], len(segments)) for run in (ours, want))
    other: Sequence[np.ndarray | None] = [None] * len(segments)
    if theirs is not None:
        other = np.split(theirs["logits"], len(segments))
    parts = zip(segments, got, right, other, strict=True)
    return stages, tuple(segment(trained, *part) for part in parts)


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
    try:
        ids = np.asarray(tokens)
    except (TypeError, ValueError, RuntimeError):  # tensors of torch on a device, too
        kind = f"{type(tokens).__module__}.{type(tokens).__name__}"
        hint = "a list of integers, of a tensor .tolist()"
        raise JropeError(f"tokens: got a {kind} unlike an array, want {hint}") from None
    good = ids.size and np.issubdtype(ids.dtype, np.integer)
    if not good or ids.min() < 0 or ids.max() >= vocabulary:
        raise JropeError(
            f"tokens: got {ids.size} of {ids.dtype}, want at least one, all integers "
            f"from 0 to {vocabulary - 1}; does the tokenizer belong to this model?"
        )
    return np.resize(ids, shape).astype(np.int32)
