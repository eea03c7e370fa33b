"""How likely continuations are: many of them, in few shapes."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jrope.errors import JropeError
from jrope.generation.request import bucket
from jrope.model.config import LlamaConfig
from jrope.model.scores import score
from jrope.tree import Params

TOKENS = 4096  # of a pass, where nobody says how many rows; V logits live for each


class Continuation(NamedTuple):
    """Token ids, and those that come after them."""

    context: list[int]
    ids: list[int]


class Likelihood(NamedTuple):
    """What is found of a continuation.

    Args:
      number: of it, from 0.
      total: log p(ids | context).
      greedy: whether each id is the argmax after all before it.
    """

    number: int
    total: float
    greedy: bool


def likelihoods(
    params: Params,
    config: LlamaConfig,
    asked: Sequence[Continuation],
    *,
    max_length: int,
    rows: Callable[[int], int],
) -> Iterator[Likelihood]:
    """Score continuations, the longest first, in one shape for each width.

    Args:
      params, config: the model.
      asked: each with a context of one token at least.
      max_length: tokens that the model sees; what is longer loses its first ones.
      rows: how many of a width go through the model together.

    Raises:
      JropeError: a continuation longer than max_length, or a logit that is not finite.
    """
    for index, (_, ids) in enumerate(asked):
        if len(ids) > max_length:
            raise JropeError(
                f"request {index}: got a continuation of {len(ids)} tokens, want "
                f"{max_length} at most; give a larger max_length"
            )
    texts = [[*context, *ids][-max_length - 1 :] for context, ids in asked]
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    while order:
        width = bucket(len(texts[order[0]]))
        count = max(rows(width), 1)
        group, order = order[:count], order[count:]
        tokens = np.zeros((count, width), np.int32)
        lengths = np.full(count, 2, np.int32)  # of rows that only fill the shape
        for row, i in enumerate(group):
            tokens[row, : len(texts[i])], lengths[row] = texts[i], len(texts[i])
        seen = lengths - 1  # the last token is predicted, but not read
        given = params, tokens, lengths
        scores = score(*given, config=config, rope_lengths=seen, greedy=True)
        found = jax.device_get(scores)
        for row, i in enumerate(group):
            own = slice(seen[row] - len(asked[i].ids), seen[row])
            total = float(np.sum(found.logprobs[row, own], dtype=np.float64))
            if not math.isfinite(total):
                raise JropeError(
                    f"request {i}: its log-likelihood is {total}: weights hold a NaN, "
                    "or float16 overflowed, which bfloat16 does not"
                )
            yield Likelihood(i, total, bool(np.all(found.greedy[row, own])))
