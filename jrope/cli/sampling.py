"""How `jrope generate` draws tokens: its flags, and what the folder says."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from jrope.cli.common import number, whole
from jrope.cli.terminal import note, warn
from jrope.errors import JropeError
from jrope.generation.sample import Sampler
from jrope.hf.folders import GENERATION
from jrope.hf.generation import read_generation_config, sampler_fields, unsupported

_FLAGS = {
    "temperature": "0, the default, takes the best token",
    "top-k": "draw from the k best tokens",
    "top-p": "draw from the best tokens whose probabilities sum to p",
    "min-p": "draw from tokens at least this times as likely as the best",
    "repetition-penalty": "make tokens that already stand there less likely",
    "frequency-penalty": "and those of the answer once more for each time",
    "presence-penalty": "and once if they are there at all",
}
_FILTERS = ("top_k", "top_p", "min_p", "seed")
_IGNORE = "--no-generation-config"


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `Sampler`, --seed, and whether the folder's defaults count."""
    add = parser.add_argument
    for name, text in _FLAGS.items():
        kind = whole(0) if name == "top-k" else number
        add(f"--{name}", metavar="X", type=kind, help=text)
    add("--seed", metavar="N", type=whole(0), help="of the random numbers (0)")
    text = f"take the defaults of these from here, not from {GENERATION}"
    add(_IGNORE, action="store_true", help=text)


def make_sampler(args: argparse.Namespace, folder: Path) -> Sampler:
    """What the flags say, and the folder's generation_config.json where they do not.

    Raises:
      JropeError: values that are not allowed, of the flags or of the file.
    """
    given = {f.name: getattr(args, f.name) for f in fields(Sampler)}
    given = {name: value for name, value in given.items() if value is not None}
    flags = Sampler(**given)  # says what is wrong with them before the file is read
    found = {} if args.no_generation_config else read_generation_config(folder)
    sample = None if args.temperature is None else args.temperature > 0
    own = sampler_fields(found, sample=sample)
    _check(own, folder)
    used = {n: x for n, x in own.items() if n not in given and x != getattr(flags, n)}
    _tell(used, unsupported(found, sample=sample))
    sampler = Sampler(**used, **given)
    idle = [name for name in _FILTERS if getattr(args, name) is not None]
    if idle and not sampler.temperature:
        words = ", ".join("--" + name.replace("_", "-") for name in idle)
        warn(f"{words} without --temperature above 0: the best token is taken")
    return sampler


def _check(own: dict[str, Any], folder: Path) -> None:
    try:
        Sampler(**own)
    except JropeError as error:
        hint = f"correct the file, or give {_IGNORE}"
        raise JropeError(f"{folder / GENERATION}: {error}; {hint}") from None


def _tell(used: dict[str, Any], missing: list[str]) -> None:
    if used:
        words = ", ".join(f"{name} {value:g}" for name, value in used.items())
        note(f"{GENERATION}: {words} ({_IGNORE} ignores it)")
    if missing:
        warn(f"{GENERATION}: {', '.join(missing)}: not supported, has no effect here")
