"""What rows' next tokens are drawn in view of: what they hold, and what they ask for.

Nothing here is computed before a sampler needs it: where no row asks for anything, none
of these arrays is read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.generation.checks import MOST_BIASES
from jrope.sharding.axes import ONE, Axes

PROMPT, DRAWN = 1, 2  # what a token of the prompt counts in `seen`, and one drawn


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bias:
    """Numbers that are added to logits; each row's come first."""

    ids: jax.Array  # int32 [B, n], -1 where unused
    values: jax.Array  # float32 [B, n]


def biases(every: Sequence[Mapping[int, float]]) -> Bias:
    """Those of some rows, on the host, at most 300 of each."""
    shape = len(every), MOST_BIASES
    ids: Any = np.full(shape, -1, np.int32)
    values: Any = np.zeros(shape, np.float32)
    for row, bias in enumerate(every):
        used = {id: value for id, value in bias.items() if value}
        ids[row, : len(used)] = [*used]
        values[row, : len(used)] = [*used.values()]
    return Bias(ids, values)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Past:
    """What is known of B rows where tokens are drawn at P positions of each.

    Args:
      seen: int32 [B, V], for penalties: 2 for each time that a row drew a token, and 1
        more where its prompt holds it.
      bias: what they add to logits; None: nothing.
      stop_ids: int32 [n] or [B, n], -1 where unused.
      early: int32 [B * P], tokens still to come before one of these may; None: none.
      later: tokens that `seen` lacks, int32 [B, T], and at which positions they count,
        bool [B, P, T]; None: none.
    """

    seen: jax.Array
    bias: Bias | None = None
    stop_ids: jax.Array | None = None
    early: jax.Array | None = None
    later: tuple[jax.Array, jax.Array] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the logits."""
        positions = 1 if self.later is None else self.later[1].shape[1]
        return positions * len(self.seen), *self.seen.shape[1:]

    def behind(self, ids: jax.Array, counted: jax.Array, steps: jax.Array) -> "Past":
        """The same where more tokens were drawn, which `seen` lacks.

        Args:
          ids: int32 [B, T].
          counted: bool [B, P, T], which of them each position counts.
          steps: int32 [P], how many tokens further on each position is.
        """
        early = self.early
        if early is not None:
            early = (early[:, None] - steps[None, :]).reshape(-1)
        return replace(self, early=early, later=(ids, counted))

    def at_guesses(self, guesses: jax.Array) -> "Past":
        """The same for n + 1 positions, as if the guesses [B, n] were right.

        Those of -1 are no tokens.
        """
        at = jnp.arange(guesses.shape[1] + 1, dtype=jnp.int32)
        before = at[None, :-1] < at[:, None]  # [n + 1, n]
        return self.behind(guesses, before[None] & (guesses >= 0)[:, None], at)

    def counts(self) -> jax.Array:
        """`seen` of every position, int32 [B * P, V]."""
        seen = self.seen.astype(jnp.int32)
        if self.later is None:
            return seen
        ids, counted = self.later
        ids = jnp.where(counted, ids[:, None], seen.shape[1])
        batch, positions, count = ids.shape
        each = jnp.repeat(seen, positions, axis=0)
        return add_seen(each, ids.reshape(batch * positions, count))

    def changes(self) -> jax.Array:
        """Whether `changed` changes anything, bool []."""
        flags = [jnp.zeros((), bool)]
        if self.bias is not None:
            flags.append(jnp.any(self.bias.ids[:, 0] >= 0))
        if self.early is not None:
            flags.append(jnp.any(self.early > 0))
        return jnp.any(jnp.stack(flags))

    def changed(self, x: jax.Array, axes: Axes = ONE) -> jax.Array:
        """Logits [B * P, V] with the bias, -inf for stop ids that come too early."""
        parts: list[tuple[jax.Array, jax.Array]] = []
        if (bias := self.bias) is not None:
            parts.append((_each(bias.ids, len(x)), _each(bias.values, len(x))))
        if self.early is not None and self.stop_ids is not None:
            shape = len(self.seen), self.stop_ids.shape[-1]
            ids = _each(jnp.broadcast_to(self.stop_ids, shape), len(x))
            values = jnp.where(self.early > 0, -jnp.inf, jnp.float32(0))
            parts.append((ids, jnp.broadcast_to(values[:, None], ids.shape)))
        if not parts:
            return x
        ids, values = (
            jnp.concatenate(every, axis=1) for every in zip(*parts, strict=True)
        )
        rows, size = jnp.arange(len(x), dtype=jnp.int32)[:, None], x.shape[1]
        ids = jnp.where(ids < 0, size, axes.local_ids(ids, size))
        return x.at[rows, ids].add(values, mode="drop")


def add_seen(seen: jax.Array, ids: jax.Array) -> jax.Array:
    """`seen` int32 [B, V] with tokens [B, T] drawn; ids of V or above are none."""
    rows = jnp.arange(len(seen), dtype=jnp.int32)[:, None]
    return seen.at[rows, ids].add(DRAWN, mode="drop")


def _each(x: jax.Array, count: int) -> jax.Array:
    """What belongs to rows, once for each of `count` positions in all."""
    return jnp.repeat(x, count // len(x), axis=0)
