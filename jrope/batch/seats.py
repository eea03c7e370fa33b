"""Who sits in a slot, as the host knows it: what was drawn so far, what is left."""

from collections import deque
from dataclasses import dataclass, field
from typing import final

import numpy as np

from jrope.batch.block import Block
from jrope.batch.packing import Shapes
from jrope.batch.prefix import Prefix
from jrope.batch.work import Finished, Stopped, Work


@final
@dataclass(kw_only=True, eq=False)
class Seat:
    """A row in its slot.

    Args:
      work: the row.
      pieces: of its prompt that are still to be computed.
      slot: where it is, or will be.
      source: the slot that holds the tokens before them.
      filled: how many these are.
      shared: those of them that another slot gives.
      keeps: a prefix, which is all that this slot is for; it has no row.
      tokens, scores: what was drawn.
      count: tokens drawn.
      state: of its structure behind them.
      asked: tokens that the caller has seen.
      over: whether it has ended.
      finite: whether all its logits were finite.
      kept: tokens that the caller keeps, where it stopped the row.
    """

    work: Work
    pieces: deque[np.ndarray]
    slot: int = 0
    source: int = 0
    filled: int = 0
    shared: int = 0
    keeps: Prefix | None = None
    tokens: np.ndarray = field(init=False)
    scores: list[list[np.ndarray]] = field(default_factory=list)
    count: int = 0
    state: int = 0
    asked: int = 0
    over: bool = False
    finite: bool = True
    kept: int | None = None

    def __post_init__(self) -> None:
        self.tokens = np.zeros(self.work.max_new_tokens, np.int32)

    @classmethod
    def of(cls, row: Work, shapes: Shapes, keeps: Prefix | None = None) -> "Seat":
        """A row that has no slot yet."""
        shared = shapes.shared(row)
        pieces = deque(shapes.pieces(row.prompt, shared))
        return cls(work=row, pieces=pieces, filled=shared, shared=shared, keeps=keeps)

    def take(self, block: Block) -> None:
        """Take what a block, on the host, holds of this row."""
        new = int(block.counts[self.slot])
        own = slice(self.count, self.count + new)
        self.tokens[own] = block.tokens[self.slot, :new]
        self.count += new
        self.state = 0 if block.states is None else int(block.states[self.slot])
        self.over = not block.live[self.slot]
        self.finite = bool(block.finite[self.slot])
        if self.work.logprobs is not None:
            every = block.logprobs, block.top_ids, block.top_logprobs
            self.scores.append(
                [np.array(x[self.slot, :new]) for x in every if x is not None]
            )

    def ask(self, stopped: Stopped | None) -> None:
        """Let the caller stop it."""
        if stopped is None or self.count == self.asked:
            return
        self.asked = self.count
        kept = stopped(self.work, self.tokens[: self.count])
        if kept is not None:
            self.kept, self.over = min(max(kept, 0), self.count), True

    def finished(self) -> Finished:
        """What came of it."""
        count = self.count if self.kept is None else self.kept
        tokens, work = self.tokens[:count].copy(), self.work
        stopped = self.kept is not None or work.is_over(tokens)
        scores = dict[str, np.ndarray]()
        if work.logprobs is not None:
            parts = [np.concatenate(x)[:count] for x in zip(*self.scores, strict=True)]
            scores["logprobs"] = parts[0]
            if work.logprobs:
                scores["top_ids"] = parts[1][:, : work.logprobs]
                scores["top_logprobs"] = parts[2][:, : work.logprobs]
        return Finished(
            key=work.key,
            tokens=tokens,
            finish_reason="stop" if stopped else "length",
            finite=self.finite,
            **scores,
        )
