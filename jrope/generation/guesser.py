"""What guesses tokens for speculative decoding, and what that cannot be used with."""

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax

from jrope.errors import JropeError, check_count
from jrope.model.cache import layer_slots
from jrope.model.config import LlamaConfig
from jrope.model.inputs import check_params
from jrope.sharding.meshes import Layout, layout_of
from jrope.tree import Params


@jax.tree_util.register_static
@dataclass(frozen=True)
class PromptLookup:
    """Guess that what followed the newest tokens the last time follows them again.

    It costs no second model, and pays where answers quote: summaries, edits, code.
    Where no row's newest token stands in its text before, and for a while after guesses
    were wrong, tokens come one at a time as without it.

    Args:
      tokens: guessed at a time; a pass of the model is over one more.
      max_ngram: the newest tokens that are looked for, the most of them first, then
        fewer, down to one.
    """

    tokens: int = 7
    max_ngram: int = 3

    def __post_init__(self) -> None:
        check_count("PromptLookup: tokens", self.tokens, 1)
        check_count("PromptLookup: max_ngram", self.max_ngram, 1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("params",),
    meta_fields=("config", "tokens"),
)
@dataclass(frozen=True)
class Draft:
    """Guess with a smaller model of the same vocabulary.

    It draws as the large one will, by the same sampler with the same random numbers
    (Daliri et al. 2024, arXiv:2408.07978), so that similar models draw the same.

    Args:
      params, config: the smaller model.
      tokens: guessed at a time; a pass of the large model is over one more.
    """

    params: Params
    config: LlamaConfig
    tokens: int = 4

    def __post_init__(self) -> None:
        check_count("Draft: tokens", self.tokens, 1)


Guesser: TypeAlias = PromptLookup | Draft


def check_guesser(
    guesser: Any, config: LlamaConfig, capacity: int, layout: Layout | None
) -> None:
    """Raise a JropeError unless `guesser` can guess for this model.

    Args:
      guesser: what was given as `speculate`.
      config: the large model.
      capacity: cache slots of a row, those of guesses included.
      layout: the mesh of the large model.
    """
    if not isinstance(guesser, PromptLookup | Draft):
        got, hint = f"a {type(guesser).__name__}", "such as jrope.PromptLookup()"
        raise JropeError(f"speculate: got {got}, want a PromptLookup or Draft, {hint}")
    models = {"the model": config}
    if isinstance(guesser, Draft):
        check_params(guesser.params)
        models["the draft"] = guesser.config
        layout = layout_of(guesser.params) if layout is None else layout
        sizes = [c.vocab_size for c in models.values()]
        if sizes[0] != sizes[1]:
            raise JropeError(
                f"speculate: the draft has a vocabulary of {sizes[1]}, the model one "
                f"of {sizes[0]}; give a draft that shares the model's tokenizer"
            )
    if layout is not None:
        hint = "leave speculate out, or load without a mesh"
        raise JropeError(
            f"speculate: got parameters on a mesh, want one device; {hint}"
        )
    for name, own in models.items():
        _check_rollback(name, own, capacity)


def _check_rollback(name: str, config: LlamaConfig, capacity: int) -> None:
    """Raise a JropeError where a rejected token could not be taken back."""
    rope = config.rope
    if rope.needs_length and rope.lengths == "hf":
        raise JropeError(
            f'speculate: {name} has "hf" lengths, which remember rejected tokens; '
            'choose "planned" or "growing" ones, by `with_rope(..., lengths=)`'
        )
    if (least := min(layer_slots(config, capacity + 1))) <= capacity:
        raise JropeError(
            f"speculate: {name} has layers with a window of {least}, whose slots a "
            f"rejected token overwrites, and {capacity} slots are wanted; leave "
            "speculate out, or ask for fewer tokens"
        )
