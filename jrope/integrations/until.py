"""Texts continued up to a stop text, through the engine of `jrope batch`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast, final

import numpy as np

from jrope.batch.engine import Engine
from jrope.batch.work import Work
from jrope.errors import JropeError
from jrope.generation.request import bucket
from jrope.generation.sample import Sampler
from jrope.model.config import LlamaConfig
from jrope.tree import Params


@final
@dataclass(frozen=True, kw_only=True)
class Until:
    """A text to continue.

    Args:
      prompt: ids, at least one.
      stops: texts; the result ends before the first of them.
      new: tokens at most.
      sampler: of numbers.
    """

    prompt: list[int]
    stops: list[str]
    new: int
    sampler: Sampler


@final
class Writer:
    """Continues texts; the programs are kept for the next ones, where these fit.

    Args:
      params, config: the model, on one device.
      tokenizer: of transformers.
      slots: texts at once; None: as many as the memory holds.
    """

    def __init__(
        self, params: Params, config: LlamaConfig, tokenizer: Any, slots: int | None
    ) -> None:
        self._params, self._config, self._slots = params, config, slots
        self._tokenizer = tokenizer
        self._engine: Engine | None = None

    def __call__(self, asked: Sequence[Until]) -> Iterator[tuple[int, str]]:
        """The number and the new text of each, as they finish.

        Raises:
          JropeError: a logit was not finite.
        """

        def stopped(work: Work, tokens: np.ndarray) -> int | None:
            text, stops = self._text(tokens), asked[cast(int, work.key)].stops
            return len(tokens) if any(stop in text for stop in stops) else None

        works = [*map(self._work, range(len(asked)), asked)]
        for one in self._made(asked).run(works, stopped) if works else ():
            if not one.finite:
                why = "weights hold a NaN, or float16 overflowed"
                raise JropeError(f"request {one.key}: a logit is not finite: {why}")
            number, text = cast(int, one.key), self._text(one.tokens)
            for stop in asked[number].stops:
                text = text.partition(stop)[0]
            yield number, text

    def _work(self, number: int, asked: Until) -> Work:
        return Work(
            key=number,
            prompt=np.array(asked.prompt, np.int32),
            sampler=asked.sampler,
            seed=number,
            max_new_tokens=asked.new,
            stop_ids=self._config.eos_token_id,
        )

    def _made(self, asked: Sequence[Until]) -> Engine:
        """An engine with room for these."""
        longest = max(len(one.prompt) + one.new for one in asked)
        if self._engine is None or self._engine.capacity < longest:
            self._engine = Engine(
                self._params,
                self._config,
                capacity=bucket(longest),
                slots=self._slots,
                logprobs=False,
            )
        return self._engine

    def _text(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
