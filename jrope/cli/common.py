"""What subcommands share: the words for rotary embeddings, sizes, the cache."""

import argparse
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import jax

from jrope.errors import JropeError
from jrope.model.config import LlamaConfig
from jrope.model.int8_cache import CacheDtype
from jrope.model.with_rope import with_rope
from jrope.rope import ALIASES, ROPE_TYPES, DynamicNTK, DynamicYarn
from jrope.tree import flatten
from jrope.weights.int8 import KINDS

DTYPES = ("float32", "bfloat16", "float16")
ROPE_HELP = f"""\
rotary embeddings (--rope):
  NAME:FIELD=VALUE,...   {", ".join(["default", "condense", *ROPE_TYPES])}
  NAME:NUMBER            short for NAME:factor=NUMBER
  Lists are separated by colons; 'original' (the trained length) defaults to what the
  folder says.  Fields have the names that jrope.with_rope takes, such as
    linear:2   dynamic:4   yarn:factor=4,original=8192   condense:8
    llama3:factor=8,original=8192,low=1,high=4   longrope:short=1:1:1,long=2:4:8
"""
Item = TypeVar("Item")
_LISTS = ("short_factor", "long_factor")
_UNITS = {"": 1, "B": 1}
_UNITS.update({unit: 1000**i for i, unit in enumerate("KMGT", 1)})
_UNITS.update({f"{unit}I": 1024**i for i, unit in enumerate("KMGT", 1)})


def parse_rope(text: str) -> tuple[str, dict[str, Any]]:
    """Read what `--rope` was given.

    Args:
      text: NAME, NAME:NUMBER or NAME:FIELD=VALUE,...; a value is an integer, a number,
        true or false, or numbers separated by colons.

    Returns:
      The method's name and its fields, as `with_rope` takes them.

    Raises:
      JropeError: the text is not of this form.  Names are left to `with_rope`.

    >>> parse_rope("yarn:factor=4,original=8192")
    ('yarn', {'factor': 4, 'original_length': 8192})
    >>> parse_rope("linear:2.5")
    ('linear', {'factor': 2.5})
    """
    name, colon, rest = text.partition(":")
    if not name or (colon and not rest):
        raise JropeError(f"--rope {text!r}: want NAME or NAME:FIELD=VALUE,...")
    fields: dict[str, Any] = {}
    for part in rest.split(",") if rest else []:
        key, equals, value = part.partition("=")
        if not equals:
            key, value = "factor", part
        key = ALIASES.get(key.strip(), key.strip())
        if key in ("condense", "precision", "lengths", "config", "method"):
            flag = "rope-lengths" if key == "lengths" else key
            raise JropeError(f"--rope {text!r}: {key} is not a field; see --{flag}")
        if key in fields:
            raise JropeError(f"--rope {text!r}: {key} is given twice")
        fields[key] = _value(text, key, value.strip())
    return name, fields


def _value(text: str, key: str, value: str) -> Any:
    if value in ("true", "false"):
        return value == "true"
    try:
        numbers = [_number(word) for word in value.split(":")]
    except ValueError:
        wanted = "a number, true, false, or numbers separated by colons"
        raise JropeError(
            f"--rope {text!r}: {key} is {value!r}, want {wanted}"
        ) from None
    return tuple(numbers) if len(numbers) > 1 or key in _LISTS else numbers[0]


def _number(word: str) -> int | float:
    try:
        return int(word)
    except ValueError:
        return float(word)


def number(word: str) -> int | float:
    """An argument that is an integer or a float."""
    try:
        return _number(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number") from None


def whole(least: int) -> Callable[[str], int]:
    """The type of an argument that is an integer from `least` to 2**31 - 1."""

    def parse(word: str) -> int:
        if not word.lstrip("-").isdecimal() or not least <= int(word) < 2**31:
            wanted = f"a whole number from {least} to {2**31 - 1}"
            raise argparse.ArgumentTypeError(f"{word!r} is not {wanted}")
        return int(word)

    return parse


def count(word: str) -> int:
    """An argument such as 2048 or 2k; k is 1024."""
    if word[-1:] in ("k", "K"):
        return 1024 * whole(1)(word[:-1])
    return whole(1)(word)


def listed(item: Callable[[str], Item]) -> Callable[[str], tuple[Item, ...]]:
    """The type of an argument that is several, separated by commas; each once."""

    def parse(text: str) -> tuple[Item, ...]:
        return tuple(dict.fromkeys(item(word.strip()) for word in text.split(",")))

    return parse


def size(word: str) -> int:
    """An argument in bytes: 5GB, 512MiB, 100000."""
    digits = word.rstrip("BKMGTIbkmgti")
    unit = word[len(digits) :].upper()
    unit = unit if unit == "B" else unit.removesuffix("B")
    try:
        count = int(float(digits) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        count = 0
    if count < 1:
        wanted = "a size such as 5GB, 512MiB or 100000"
        raise argparse.ArgumentTypeError(f"{word!r} is not {wanted}")
    return count


def add_rope_arguments(
    parser: argparse.ArgumentParser, *, precision: bool = True
) -> None:
    """Add --rope, --condense; --precision, --rope-lengths where something is run."""
    text = "another rotary embedding instead of the folder's, see below"
    parser.add_argument("--rope", metavar="SPEC", help=text)
    parser.add_argument(
        "--condense", metavar="C", type=number, help="divide positions by this"
    )
    if precision:
        parser.add_argument(
            "--precision",
            choices=("parity", "accurate"),
            help="cos and sin as PyTorch computes them, or true at any position",
        )
        parser.add_argument(
            "--rope-lengths",
            choices=("planned", "growing", "hf"),
            help="the length that dynamic, dynamic-yarn, longrope go by: the planned "
            "total (default), each sequence's own as it grows (slower), or the whole "
            "batch's, remembered, as in transformers",
        )
    parser.epilog = ROPE_HELP


def add_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Add --dtype."""
    text = "cast the weights (default: as the file has them)"
    parser.add_argument("--dtype", choices=DTYPES, help=text)


def add_quantize_argument(parser: argparse.ArgumentParser) -> None:
    """Add --quantize."""
    text = "hold the matrices as 8-bit integers with a scale for each output, or as "
    text += "4-bit integers with one for each 128 inputs of each output"
    parser.add_argument("--quantize", choices=KINDS, help=text)


def add_cache_dtype_argument(parser: argparse.ArgumentParser) -> None:
    """Add --cache-dtype."""
    text = "hold keys and values as 8-bit integers with a scale for each token and head"
    parser.add_argument("--cache-dtype", choices=get_args(CacheDtype), help=text)


def add_adapter_argument(parser: argparse.ArgumentParser) -> None:
    """Add --adapter."""
    text = "a LoRA adapter of PEFT, a folder or hub id, merged into the weights"
    parser.add_argument("--adapter", metavar="FOLDER", help=text)


def apply_rope(config: LlamaConfig, args: argparse.Namespace) -> LlamaConfig:
    """The configuration with what `add_rope_arguments` added, where given.

    Raises:
      JropeError: they do not make a rotary embedding.
    """
    name, fields = (None, {}) if args.rope is None else parse_rope(args.rope)
    if name == "condense" and args.condense is not None:
        raise JropeError("--rope condense and --condense are the same; give one")
    chosen = {
        "condense": args.condense,
        "precision": getattr(args, "precision", None),
        "lengths": getattr(args, "rope_lengths", None),
    }
    try:
        return with_rope(config, name, **chosen, **fields)
    except JropeError as error:
        words = [] if args.rope is None else [f"--rope {args.rope!r}"]
        for flag, value in (
            ("condense", args.condense),
            ("rope-lengths", chosen["lengths"]),
        ):
            words += [] if value is None else [f"--{flag} {value}"]
        raise JropeError(f"{' '.join(words)}: {error}") from None


def reach(config: LlamaConfig) -> int | None:
    """The longest sequence that model and rotary embedding are meant for.

    None: as long as one likes (dynamic NTK and YaRN).
    """
    rope = config.rope
    if isinstance(rope.scaling, DynamicNTK | DynamicYarn):
        return None
    stretched = trained_length(config) * (getattr(rope.scaling, "factor", None) or 1)
    return int(max(stretched, config.max_position_embeddings) * rope.condense)


def trained_length(config: LlamaConfig) -> int:
    """What the rotary embedding knows of it, else what the checkpoint declares."""
    return config.rope.trained_length or config.max_position_embeddings


def array_bytes(tree: Mapping[str, Any]) -> list[int]:
    """Bytes of each array, or of what a ShapeDtypeStruct describes."""
    return [leaf.size * leaf.dtype.itemsize for leaf in flatten(tree).values()]


def enable_compile_cache() -> None:
    """Keep compiled programs between runs, in ~/.cache/jrope or JROPE_CACHE_DIR.

    An empty JROPE_CACHE_DIR switches it off, JAX's own setting wins.  The cache is an
    aid: where it cannot be written, everything works without.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = os.environ.get("JROPE_CACHE_DIR", str(base / "jrope"))
    if not folder or jax.config.jax_compilation_cache_dir:  # pyright: ignore
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
