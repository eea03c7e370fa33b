"""What `jrope evaluate` is asked for, checked before anything is computed."""

import argparse
import dataclasses
import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from jrope.cli.common import parse_rope
from jrope.cli.text import load_tokenizer, vocabulary
from jrope.errors import JropeError
from jrope.hf import adapters
from jrope.hf.folders import CONFIG, find_folder
from jrope.lab.perplexity import reflow
from jrope.model.config import LlamaConfig
from jrope.model.with_rope import with_rope
from jrope.rope import ROPE_TYPES

OWN = "model"  # the rotary embedding that the folder has
_SAMPLES, _SAMPLE = 16, 2**16  # pieces and bytes of a weight file that are hashed


@final
@dataclass(frozen=True, kw_only=True)
class Text:
    """A text as the model reads it; `sha256` is that of the file's bytes."""

    name: str
    sha256: str
    tokens: np.ndarray


def split_ropes(given: Sequence[str]) -> list[str]:
    """The methods in what `--rope` was given, each once.

    A part of the form FIELD=VALUE belongs to the method before it, any other begins a
    new one.

    >>> split_ropes(["default,linear:2,yarn:factor=2,original=256,ntk:2", "condense:4"])
    ['default', 'linear:2', 'yarn:factor=2,original=256', 'ntk:2', 'condense:4']
    """
    found: list[str] = []
    for text in given:
        begun = False
        for part in text.split(","):
            part = part.strip()
            if begun and re.match(r"[^:=]+=", part):
                found[-1] += f",{part}"
            else:
                found.append(part)
                begun = True
    return list(dict.fromkeys(found))


def make_methods(
    config: LlamaConfig, labels: Sequence[str]
) -> tuple[dict[str, LlamaConfig], dict[str, str]]:
    """The model with each method, and why it cannot take some.

    Args:
      config: as the folder says.
      labels: of `split_ropes`; "model" leaves the configuration as it is.

    Returns:
      Configurations, and errors, both by label.

    Raises:
      JropeError: an unknown method or field, or a factor below 1.
    """
    good: dict[str, LlamaConfig] = {}
    refused: dict[str, str] = {}
    for label in labels:
        name, fields = parse_rope(label)
        known = _fields(label, name)
        try:
            good[label] = config if name == OWN else with_rope(config, name, **fields)
        except JropeError as error:
            if {*fields} - known:
                raise JropeError(f"--rope {label!r}: {error}") from None
            refused[label] = str(error)
        factor = fields.get("factor")
        if isinstance(factor, int | float) and not factor >= 1:
            raise JropeError(
                f"--rope {label!r}: factor is {factor}, want at least 1: a factor "
                "below 1 would shorten the context"
            )
        if name == OWN and fields:
            raise JropeError(f"--rope {label!r}: {OWN} has no fields")
    return good, refused


def _fields(label: str, name: str) -> set[str]:
    """Names of the method's fields."""
    if name in ROPE_TYPES:
        return {field.name for field in dataclasses.fields(ROPE_TYPES[name])}
    known = [OWN, "default", "condense", *ROPE_TYPES]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise JropeError(
            f"--rope {label!r}: unknown method {name!r}, known: "
            f"{', '.join(known)}{hint}"
        )
    return {"factor"} if name == "condense" else set()


def read_texts(
    paths: Sequence[Path], *, reflowed: bool = False
) -> list[tuple[str, str, str]]:
    """Name, hash and contents of the files, and of the .txt files in folders.

    Args:
      paths: of files and folders.
      reflowed: contents have a paragraph in a line; hashes are the files' all the same.

    Raises:
      JropeError: not UTF-8, empty, or a folder without texts.
      OSError: a file cannot be read.
    """
    files: list[Path] = []
    for path in paths:
        inside = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not inside:
            raise JropeError(f"--text {path}: no .txt files in this folder")
        files += inside
    texts: list[tuple[str, str, str]] = []
    for file in files:
        data = file.read_bytes()
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            at = f"byte {error.start}"
            raise JropeError(f"--text {file} is not UTF-8 text: {at}") from None
        if not text.strip():
            raise JropeError(f"--text {file} is empty: it has 0 tokens")
        text = reflow(text) if reflowed else text
        texts.append((file.name, hashlib.sha256(data).hexdigest(), text))
    return texts


def tokenizer_for(folder: Path, config: LlamaConfig) -> Any:
    """The folder's tokenizer, all of whose ids the model knows.

    Raises:
      JropeError: there is none, or its vocabulary is larger than the model's.
    """
    tokenizer = load_tokenizer(folder)
    known = vocabulary(tokenizer)
    if known > config.vocab_size:
        raise JropeError(
            f"{folder}: the tokenizer has {known} ids, the model's vocabulary "
            f"{config.vocab_size}: they do not belong together"
        )
    return tokenizer


def tokenize(
    tokenizer: Any,
    texts: Sequence[tuple[str, str, str]],
    wanted: int,
    args: argparse.Namespace,
) -> list[Text]:
    """Token ids of every text, as the tokenizer begins a text, once for all methods.

    Args:
      tokenizer: of `tokenizer_for`.
      texts: of `read_texts`.
      wanted: tokens that every text must have.
      args: `tokens` cuts texts, `skip_short` leaves short ones out.

    Raises:
      JropeError: texts that are too short, all named.
    """
    found: list[Text] = []
    short: list[str] = []
    for name, sha256, text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"][: args.tokens]
        if len(ids) < wanted:
            short.append(f"{name} has {len(ids)} tokens")
        else:
            found.append(Text(name=name, sha256=sha256, tokens=np.asarray(ids)))
    if short and (not args.skip_short or not found):
        cut = "" if args.tokens is None else f" (--tokens {args.tokens})"
        hint = "" if not found else "; --skip-short leaves them out"
        raise JropeError(
            f"--text: {', '.join(short)}{cut}, the longest context wants at least "
            f"{wanted}{hint}"
        )
    return found


def hash_adapter(path_or_repo: str) -> str:
    """`hash_model` of a LoRA adapter."""
    return hash_model(find_folder(path_or_repo, None), adapters.CONFIG)


def hash_model(folder: Path, config: str = CONFIG) -> str:
    """A hash of config.json and of evenly spread pieces of the weights' files."""
    digest = hashlib.sha256((folder / config).read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for at in np.linspace(0, max(size - _SAMPLE, 0), _SAMPLES).astype(int):
                file.seek(int(at))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def cost(config: LlamaConfig, context: int) -> float:
    """Work of one token's pass at a context, for the time left: multiplications."""
    heads = config.num_attention_heads * config.head_dim
    layer = 2 * config.hidden_size * (heads + config.head_dim)
    layer += 3 * config.hidden_size * config.intermediate_size + heads * context
    head = config.hidden_size * config.vocab_size
    return float(config.num_hidden_layers * layer + head)


def check_settings(args: argparse.Namespace) -> None:
    """Raise a JropeError for arguments that contradict each other."""
    work = {"perplexity": args.text and not args.no_perplexity}
    work |= {"--passkey": args.passkey, "--distance": args.distance}
    if not any(work.values()):
        raise JropeError("nothing to do: give --text, --passkey or --distance")
    for name in ("distance", "stride", "tokens", "skip_short", "reflow"):
        if getattr(args, name) and not args.text:
            option = "--" + name.replace("_", "-")
            raise JropeError(f"{option} needs a --text")
    if args.filler == "text" and not args.text:
        raise JropeError("--filler text needs a --text")
    least = min(args.context)
    if least < 2:
        raise JropeError(f"--context: got {least}, want at least 2 tokens")
    if args.stride is not None and args.stride > least:
        raise JropeError(
            f"--stride: got {args.stride}, want at most the smallest context, {least}: "
            "tokens between two windows would be left out"
        )
    bad = [depth for depth in args.depths if not 0 <= depth <= 1]
    if bad:
        raise JropeError(f"--depths: got {bad}, want numbers from 0 to 1")


def plan_of(args: argparse.Namespace, new: int) -> Mapping[str, Any]:
    """The settings that a journal's records depend on, by name."""
    names = ("precision", "tokens", "stride", "trials", "seed", "filler")
    settings = {name: getattr(args, name) for name in names}
    adapter = None if args.adapter is None else hash_adapter(args.adapter)
    own = {"reflow": args.reflow or None, "answer_tokens": new, "adapter": adapter}
    return {**settings, **own}
