"""`--speculate`: what guesses tokens, which may be a second folder."""

import argparse
from dataclasses import dataclass, replace
from typing import Any

from jrope.cli.common import whole
from jrope.cli.loading import Loading
from jrope.generation.guesser import Draft, Guesser, PromptLookup
from jrope.hf.checkpoint import load_shapes, read_llama_config
from jrope.hf.folders import find_folder
from jrope.tree import Params

_HELP = (
    "guess N tokens at a time and check them in one pass: prompt guesses what followed "
    "before in the text (7), draft:FOLDER asks a smaller model with the same tokenizer "
    "(4); such as prompt:5 or draft:models/small:3"
)


@dataclass(frozen=True)
class DraftFolder:
    """The folder or hub id of a smaller model, and how many tokens it guesses."""

    folder: str
    tokens: int = 4


def add_speculate_argument(parser: argparse.ArgumentParser) -> None:
    """Add --speculate."""
    how: dict[str, Any] = {"metavar": "prompt[:N]|draft:FOLDER[:N]", "help": _HELP}
    parser.add_argument("--speculate", type=speculation, **how)


def speculation(word: str) -> PromptLookup | DraftFolder:
    """The type of --speculate.

    >>> speculation("prompt:5")
    PromptLookup(tokens=5, max_ngram=3)
    >>> speculation("draft:models/small")
    DraftFolder(folder='models/small', tokens=4)
    """
    kind, _, rest = word.partition(":")
    if word == "prompt":
        return PromptLookup()
    if kind == "prompt" and rest.isdecimal():
        return PromptLookup(whole(1)(rest))
    folder, _, count = rest.rpartition(":")
    if kind == "draft" and folder and count.isdecimal():
        return DraftFolder(folder, whole(1)(count))
    if kind == "draft" and rest:
        return DraftFolder(rest)
    wanted = "prompt, draft:FOLDER, or such as prompt:7 and draft:FOLDER:4"
    raise argparse.ArgumentTypeError(f"{word!r} is not {wanted}")


def described(
    asked: PromptLookup | DraftFolder | None, shapes: Params
) -> Guesser | None:
    """What --speculate asks for; a draft's parameters are ShapeDtypeStructs."""
    if not isinstance(asked, DraftFolder):
        return asked
    folder = find_folder(asked.folder, None)
    return Draft(*load_shapes(folder, _dtype(shapes)), asked.tokens)


def _dtype(shapes: Params) -> str:
    return shapes["model"]["norm"]["weight"].dtype.name


class Guessing:
    """The guesser, whose weights may still be loading; a context, as `Loading` is.

    Args:
      asked: what --speculate gave.
      shapes: the large model's parameters; a draft gets their dtype.
      rows: as in `Loading`, for a draft.

    Attributes:
      guesser: for `compile_ahead`; a draft's parameters are ShapeDtypeStructs.
    """

    def __init__(
        self,
        asked: PromptLookup | DraftFolder | None,
        shapes: Params,
        rows: int | None = None,
    ) -> None:
        self._loading: Loading | None = None
        self.guesser: Guesser | None = None
        if not isinstance(asked, DraftFolder):
            self.guesser = asked
            return
        folder = find_folder(asked.folder, None)
        config = read_llama_config(folder)
        self._loading = Loading(folder, _dtype(shapes), rows=rows)
        self.guesser = Draft(self._loading.shapes, config, asked.tokens)

    def wait(self) -> Guesser | None:
        """The guesser with its parameters."""
        if self._loading is None or not isinstance(self.guesser, Draft):
            return self.guesser
        return replace(self.guesser, params=self._loading.wait()[0])

    def __enter__(self) -> "Guessing":
        return self

    def __exit__(self, *how: Any) -> None:
        if self._loading is not None:
            self._loading.__exit__(*how)
