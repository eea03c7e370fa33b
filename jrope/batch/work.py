"""One sequence to generate, and what comes of it."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, final

import numpy as np

from jrope.forms.structure import Structure
from jrope.generation.sample import Sampler


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """A sequence to generate.

    Args:
      key: what the caller knows it by.
      prompt: int32 [T], at least one token.
      sampler: of numbers, not arrays.
      seed: token t is drawn with fold_in(fold_in(base key, seed), t).
      max_new_tokens: at least 1.
      stop_ids: ids that end it; they count as its last token.
      min_new_tokens: before these no stop id comes; its structure may end it.
      logit_bias: {token id: number from -100 to 100}, at most 300 that are added to
        logits before everything else.
      logprobs: alternatives to report for every token, 0 for the token's own alone;
        None: no log-probabilities.
      structure: the form of its text; stop ids come where that may end.
      shared: first tokens of the prompt, not all, that other rows have, too: they are
        computed apart and copied, which rounds otherwise.
    """

    key: Hashable
    prompt: np.ndarray
    sampler: Sampler
    seed: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    min_new_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict[int, float])
    logprobs: int | None = None
    structure: Structure | None = None
    shared: int = 0

    def is_over(self, tokens: np.ndarray) -> bool:
        """Whether these tokens end it, whatever its limit."""
        if tokens.size and tokens[-1] in self.stop_ids:
            return True
        return self.structure is not None and self.structure.is_over(tokens.tolist())


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """A generated sequence.

    Args:
      key: of its `Work`.
      tokens: int32 [n], the new ones, a stop id included.
      finish_reason: "stop" at a stop id, where nothing can follow, or where the caller
        stopped it, else "length".
      finite: whether every logit that its tokens were drawn from was finite.
      logprobs: float32 [n] under the model itself, where asked for.
      top_ids, top_logprobs: int32 and float32 [n, alternatives], best first.
    """

    key: Hashable
    tokens: np.ndarray
    finish_reason: Literal["stop", "length"]
    finite: bool
    logprobs: np.ndarray | None = None
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


Stopped: TypeAlias = Callable[[Work, np.ndarray], int | None]
"""(work, its new tokens so far) -> how many of them to keep and stop, None: go on.

Called after each chunk of decoding, for stop strings, which tokens alone do not show.
"""
