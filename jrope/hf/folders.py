"""Where a checkpoint is and what lies in it: folders, the hub, JSON, other formats."""

import json
import os
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeAlias, cast

from jrope.errors import JropeError
from jrope.hf.replacing import recover

PathLike: TypeAlias = str | os.PathLike[str]

CONFIG, GENERATION = "config.json", "generation_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHTS = "model*.safetensors"
COMPANIONS = (  # what lies beside weights and goes with them
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("chat_template.*", "generation_config.json", "LICENSE*", "NOTICE*"),
)
PICKLE = "convert it with convert/pytorch_bin_to_hf.py"

# Tables that old checkpoints carry, often rounded; nobody reads them.
TABLES = re.compile(
    r"(.+\.)?rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
)

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_HUB_FILES = ["*.json", WEIGHTS, "tokenizer*", "*.model", "*.jinja", "merges.txt"]
_CONVERTERS = {  # weights of other formats -> what to do
    "adapter_model.*": "give its folder as adapter=, beside the model's own",
    "ggml*.bin": "GGML came before GGUF, and nothing here reads it",
    "*.bin": PICKLE,
    "*.pth": "convert them with convert/meta_to_hf.py",
    "*.pt": PICKLE,
    "*.gguf": "convert it with convert/gguf_to_hf.py",
    "*.msgpack": "convert it with convert/flax_msgpack_to_hf.py",
    "streaming_*": "EasyLM wrote it; convert it with convert/flax_msgpack_to_hf.py",
    "*.h5": "TensorFlow weights are not supported",
    "consolidated*.safetensors": "its tensors have Meta's names, which are not read; "
    "take the Hugging Face version of the model",
    "*.safetensors": f"want {SINGLE}, or shards and their {INDEX}",
}
_HINTS = {  # what the name of a left-over tensor tells
    r"\.bias$": "attention_bias or mlp_bias is false; with biases on q, k and v alone "
    "it is another architecture",
    r"\.(qkv_proj|gate_up_proj|W_pack|query_key_value)\.": "fused projections are "
    "another architecture",
    r"\.(qweight|qzeros|scales|g_idx|SCB|absmax|weight_scale|quant_map)": "quantized "
    "weights are not supported; dequantize them first",
    r"\.lora_[AB]\.": "these are an adapter's: give its folder as adapter=",
    r"^(layers|embed_tokens|norm)\.": "the names lack 'model.'; save the "
    "LlamaForCausalLM, not the LlamaModel inside",
}


def find_folder(path_or_repo: PathLike, revision: str | None = None) -> Path:
    """The folder itself, or a copy from the hub in huggingface_hub's cache."""
    path = Path(path_or_repo).expanduser()
    recover(Path(os.path.realpath(path)))
    if path.is_dir():
        if revision is not None:
            raise JropeError(f"revision is for hub ids, but {path} is a folder")
        return path
    if path.exists():
        known = [a for p, a in _CONVERTERS.items() if fnmatch(path.name, p)]
        advice = "" if fnmatch(path.name, WEIGHTS) or not known else f"; {known[0]}"
        wanted = "give the folder that holds config.json"
        raise JropeError(f"{path} is a file{advice or f'; {wanted}'}")
    name = os.fspath(path_or_repo)
    if not _HUB_ID.fullmatch(name):
        raise JropeError(
            f"no folder {path}, and {name!r} is not a hub id ('owner/name')"
        )
    return _download(name, revision)


def _download(repo: str, revision: str | None) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise JropeError(
            f"no folder {repo!r}; to fetch it from the hub, pip install huggingface_hub"
        ) from None
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=_HUB_FILES
        )
    except Exception as error:  # not found, gated, offline, timeout: all of one kind
        raise JropeError(
            f"no folder {repo!r}, and the hub did not give it (revision "
            f"{revision or 'main'}): {type(error).__name__}: {error}"
        ) from error
    return Path(folder)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; a key given twice is an error."""
    try:
        return parse_json(path.read_bytes(), str(path))
    except FileNotFoundError:
        found = other_weights(path.parent)
        raise JropeError(f"no {path.name} in {path.parent}{found}") from None


def parse_json(data: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object; `what` names it in errors."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            twice = sorted({name for name in names if names.count(name) > 1})
            raise JropeError(f"{what} gives {', '.join(twice)} twice")
        return result

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except JropeError:
        raise
    except (ValueError, RecursionError) as error:
        raise JropeError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise JropeError(f"{what} holds a JSON {type(value).__name__}, want an object")
    return cast(dict[str, Any], value)


def other_weights(folder: Path) -> str:
    """Weights of another format that lie in the folder, and what to do, or nothing."""
    if any((folder / name).exists() for name in (SINGLE, INDEX)):
        return ""
    for pattern, advice in _CONVERTERS.items():
        if found := sorted(path.name for path in folder.glob(pattern)):
            return f", only {some(found)}; {advice}"
    return ""


def some(items: list[str], separator: str = ", ") -> str:
    """The first few, and how many in all."""
    more = f" ... ({len(items)} in all)" if len(items) > 5 else ""
    return separator.join(items[:5]) + more


def differences(
    wanted: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
    odd_dtypes: Mapping[str, str],
) -> list[str]:
    """What is wrong with tensors of these names and shapes, a sentence per kind."""
    faults = {
        "missing": [name for name in wanted if name not in shapes],
        "unexpected": [name for name in shapes if name not in wanted],
        "of wrong shape": [
            f"{name} (found {shapes[name]}, want {shape})"
            for name, shape in wanted.items()
            if name in shapes and shapes[name] != shape
        ],
        "of a dtype that is not float32, float16 or bfloat16": [
            f"{name} ({dtype})" for name, dtype in odd_dtypes.items()
        ],
    }
    hints = [
        hint
        for pattern, hint in _HINTS.items()
        if any(re.search(pattern, name) for name in faults["unexpected"])
    ]
    found = [f"{len(v)} {fault}: {some(v)}" for fault, v in faults.items() if v]
    return found + hints


def check_extras(extras: list[Path]) -> None:
    """Raise unless these are files that may lie beside weights and config.json."""
    names = [path.name for path in extras]
    for path in extras:
        if not path.is_file():
            raise JropeError(f"extra file {path} is not a file")
        ours = path.name in (CONFIG, INDEX) or fnmatch(path.name, WEIGHTS)
        if ours or names.count(path.name) > 1:
            raise JropeError(f"extra file {path}: {path.name} would be written twice")


def check_target(target: Path, extras: set[str]) -> None:
    """Raise if replacing this folder would lose more than a checkpoint."""
    recover(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise JropeError(f"{target} is a file; give a folder's name")
    names = sorted(path.name for path in target.iterdir())
    ours = {CONFIG, INDEX, *extras}
    foreign = [n for n in names if n not in ours and not fnmatch(n, WEIGHTS)]
    if foreign or (names and CONFIG not in names):
        raise JropeError(
            f"{target} holds {some(foreign or names)}, which would be lost; name them "
            "in extra_files if they belong to the checkpoint, or save elsewhere"
        )


def companions(folder: Path) -> list[Path]:
    """What lies beside the weights and goes with them: tokenizer, template, licence."""
    found = {path for pattern in COMPANIONS for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())
