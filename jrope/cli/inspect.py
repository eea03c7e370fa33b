"""`jrope inspect`: what a folder holds, from its config.json and its headers alone."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from jrope.cli.common import (
    add_rope_arguments,
    apply_rope,
    reach,
    trained_length,
    whole,
)
from jrope.cli.terminal import bytes_text
from jrope.hf.checkpoint import Tensors, read_llama_config
from jrope.hf.checks import open_checked
from jrope.hf.folders import find_folder
from jrope.hf.quantized import Dequantized
from jrope.hf.tensors import DTYPES
from jrope.model.config import LlamaConfig, parameter_shapes
from jrope.rope import Rope, base_frequencies, describe

Facts = dict[str, Any]
_SAME = 1e-9  # frequencies whose ratio to the plain one is this close to 1 are kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `jrope inspect` takes."""
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="a Hugging Face folder or hub id")
    text = "sequence length at which dynamic and longrope are described"
    add("--length", metavar="N", type=whole(1), help=text)
    add("--json", action="store_true", help="one JSON object instead of text")
    add_rope_arguments(parser)
    parser.description = (
        "Tell what a Hugging Face folder holds.  Only config.json and the headers of\n"
        "the files are read (and a head that is stored although it is tied)."
    )


def run(args: argparse.Namespace) -> int:
    """Describe the folder, once its headers agree with its configuration."""
    folder = find_folder(args.folder, None)
    config = apply_rope(read_llama_config(folder), args)
    tensors, names = open_checked(folder, config)
    facts = {
        "folder": str(folder),
        "config": _model(config),
        "weights": _weights(tensors, names, config),
        "kv_cache_bytes_per_token": _cache_bytes(tensors, names, config),
        "rope": describe_rope(config, args.length),
    }
    print(json.dumps(facts, indent=2) if args.json else _as_text(facts))
    return 0


def _model(config: LlamaConfig) -> Facts:
    fields = dataclasses.fields(config)
    names = {f.name for f in fields} - {"rope", "local_rope"}
    facts = {f.name: getattr(config, f.name) for f in fields if f.name in names}
    local = config.local_rope
    told = None if local is None else f"{describe(local)}, theta {local.theta:g}"
    return {**facts, "local_rope": told}


def _weights(tensors: Tensors, names: list[str], config: LlamaConfig) -> Facts:
    slots = [tensors.slots[name] for name in names]
    packed = len(tensors.matrices) if isinstance(tensors, Dequantized) else 0
    shapes = parameter_shapes(config).values()
    return {
        "parameters": sum(math.prod(shape) for shape in shapes),
        "tensors": len(names),
        "dtypes": sorted({DTYPES[slot.dtype].name for slot in slots}),
        **({"quantized": packed} if packed else {}),
        "bytes": sum(slot.stop - slot.start for slot in slots),
        "files": _files(sorted({slot.path for slot in slots})),
    }


def _files(paths: list[Path]) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in paths}


def _cache_bytes(tensors: Tensors, names: list[str], config: LlamaConfig) -> int:
    """Keys and values of one token, in the dtype of the embedding's rows."""
    width = DTYPES[tensors.slots[names[0]].dtype].itemsize
    heads = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * heads * width


def describe_rope(config: LlamaConfig, length: int | None = None) -> Facts:
    """What the rotary embedding does to the plain frequencies.

    Args:
      config: holds it.
      length: total length for the methods that depend on it; None: what the model is
        meant for.

    Returns:
      Facts for JSON: the method and its fields, lengths, and how many of the R pairs
      keep their plain frequency, are stretched (by which factors), or stand still.
      Wavelengths are tokens per turn.
    """
    rope, longest = config.rope, reach(config)
    if length is None:
        factor = max(2, getattr(rope.scaling, "factor", None) or 1)
        length = longest or int(trained_length(config) * factor)
    frequencies, scaling = rope.frequencies(length, np.float64)
    frequencies = np.asarray(frequencies).reshape(-1) / rope.condense
    plain = base_frequencies(rope.rotary_dim, rope.theta, np.float64)
    turning = frequencies > 0
    stretch = plain[turning] / frequencies[turning]
    changed = stretch[np.abs(stretch - 1) > _SAME].tolist()
    waves = (2 * math.pi / frequencies[turning]).tolist()
    return {
        "method": describe(rope),
        **_fields(rope),
        "theta": rope.theta,
        "condense": rope.condense,
        "rotary_dim": rope.rotary_dim,
        "layout": rope.layout,
        "precision": rope.precision,
        "lengths": rope.lengths if rope.needs_length else None,
        "trained_length": trained_length(config),
        "meant_for": longest,
        "described_at": length if rope.needs_length else None,
        "attention_scaling": scaling,
        "wavelengths": [min(waves, default=None), max(waves, default=None)],
        "pairs": len(plain),
        "pairs_kept": len(stretch) - len(changed),
        "pairs_stretched": len(changed),
        "stretched_by": [min(changed), max(changed)] if changed else None,
        "pairs_still": int((~turning).sum()),
    }


def _fields(rope: Rope) -> Facts:
    scaling: Any = rope.scaling
    return {} if scaling is None else {"fields": dataclasses.asdict(scaling)}


def _as_text(facts: Facts) -> str:
    model, weights, rope = facts["config"], facts["weights"], facts["rope"]
    heads, per_token = model["num_attention_heads"], facts["kv_cache_bytes_per_token"]
    longest = model["max_position_embeddings"]
    windows = [w or longest for w in model["windows"] or [longest]]
    slots = sum(min(w, longest) for w in windows) / len(windows)
    whole_cache = bytes_text(int(per_token * slots))
    files = len(weights["files"])
    biases = [n for n in ("attention_bias", "mlp_bias") if model[n]]
    family = f"{model['model_type']}, " * (model["model_type"] != "llama")
    rows = {
        "folder": facts["folder"],
        "model": f"{family}{model['num_hidden_layers']} layers, "
        f"hidden {model['hidden_size']}, "
        f"MLP {model['intermediate_size']} ({model['hidden_act']}), "
        f"vocabulary {model['vocab_size']:,}"
        + ", tied" * model["tie_word_embeddings"]
        + "".join(f", {name}" for name in biases),
        "heads": f"{heads} query, {model['num_key_value_heads']} key/value, of "
        f"{model['head_dim']}",
        "tokens": f"bos {model['bos_token_id']}, eos "
        f"{', '.join(map(str, model['eos_token_id'])) or None}, "
        f"pad {model['pad_token_id']}",
        "parameters": f"{weights['parameters']:,}",
        "weights": f"{', '.join(weights['dtypes'])}, {bytes_text(weights['bytes'])}, "
        f"{weights['tensors']} tensors in {files} file{'s' * (files > 1)}"
        + f", {weights.get('quantized')} stored quantised"
        * ("quantized" in weights),
        **_window_rows(model),
        "kv cache": f"{bytes_text(per_token)} a token, {whole_cache} at {longest:,}",
        **_rope_rows(rope),
    }
    return "\n".join(f"{name:<11} {value}" for name, value in rows.items())


def _window_rows(model: Facts) -> Facts:
    """How many layers have which window, and how they rotate, where any has one."""
    given = [w for w in model["windows"] or () if w is not None]
    if not given:
        return {}
    sizes = ", ".join(f"{w:,}" for w in sorted({*given}))
    local = model["local_rope"]
    own = "" if local is None else f"; rope {local}"
    layers = model["num_hidden_layers"]
    return {"window": f"{sizes} tokens in {len(given)} of {layers} layers{own}"}


def _rope_rows(rope: Facts) -> Facts:
    longest, at = rope["meant_for"], rope["described_at"]
    low, high = rope["wavelengths"]
    pairs = f"{rope['pairs']}: {rope['pairs_kept']} kept"
    if rope["pairs_stretched"]:
        least, most = rope["stretched_by"]
        pairs += f", {rope['pairs_stretched']} stretched {least:.4g}x to {most:.4g}x"
    if rope["pairs_still"]:
        pairs += f", {rope['pairs_still']} still"
    return {
        "rope": f"{rope['method']}, theta {rope['theta']:g}",
        "length": f"trained {rope['trained_length']:,}, meant for "
        + (f"{longest:,}" if longest else "any"),
        "pairs": pairs + (f" (at length {at:,})" if at else ""),
        "wavelength": f"{low:.4g} to {high:,.6g} tokens a turn",
        "attention": f"cos and sin times {rope['attention_scaling']:.6g}",
    }
