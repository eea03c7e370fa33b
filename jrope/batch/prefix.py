"""The first tokens of several prompts, which are computed once."""

from dataclasses import dataclass, field
from typing import final

import numpy as np

from jrope.batch.work import Work
from jrope.generation.sample import Sampler
from jrope.rope import Rope


@final
@dataclass(frozen=True)
class Prefix:
    """The first tokens of several prompts; equal ones have equal keys and values.

    Args:
      tokens: int32, as bytes.
      frequencies: as in `frequencies`.
      planned: a length that has them, more than there are tokens.
    """

    tokens: bytes
    frequencies: bytes
    planned: int = field(compare=False)

    @classmethod
    def of(cls, row: Work, shared: int, rope: Rope | None) -> "Prefix":
        """So many tokens of a row."""
        planned = len(row.prompt) + row.max_new_tokens
        tokens = row.prompt[:shared].astype(np.int32).tobytes()
        return cls(tokens, frequencies(rope, planned), planned)

    def work(self) -> Work:
        """A row that computes it."""
        prompt = np.frombuffer(self.tokens, np.int32)
        return Work(
            key=self,
            prompt=prompt,
            sampler=Sampler(),
            seed=0,
            max_new_tokens=self.planned - len(prompt),
            stop_ids=(),
        )


def frequencies(rope: Rope | None, planned: int) -> bytes:
    """What turns the keys of a row of so many tokens, where that depends on them."""
    if rope is None or not rope.needs_length or rope.lengths != "planned":
        return b""
    return b"".join(
        np.asarray(x).tobytes() for x in rope.frequencies(planned, np.float64)
    )
