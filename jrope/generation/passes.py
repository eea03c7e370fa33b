"""What counts of a pass over guesses, and when to make one: of any engine's rows."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jrope.generation.loop import draw
from jrope.generation.past import Past
from jrope.generation.sample import Sampler

LONGEST_PAUSE = 32  # single tokens after guesses that were wrong again and again
WIDER = 1.25  # what a pass over guesses costs, in terms of one over single tokens

T = TypeVar("T")


def in_turns(
    unfinished: Callable[[T], jax.Array],
    hopeful: Callable[[T], jax.Array],
    step: Callable[[T, int], T],
    count: int,
    carry: T,
) -> T:
    """Steps while `unfinished`: over `count` guesses where `hopeful`, else over none.

    These are two loops: a condition might copy the cache.
    """

    def turn(carry: T) -> T:
        def single(carry: T) -> jax.Array:
            return unfinished(carry) & ~hopeful(carry)

        def several(carry: T) -> jax.Array:
            return unfinished(carry) & hopeful(carry)

        carry = jax.lax.while_loop(single, lambda carry: step(carry, 0), carry)
        return jax.lax.while_loop(several, lambda carry: step(carry, count), carry)

    return jax.lax.while_loop(unfinished, turn, carry)


def draw_each(
    logits: jax.Array,
    guesses: jax.Array,
    sampler: Sampler,
    keys: jax.Array,
    steps: jax.Array,
    past: Past,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A token for each of n + 1 positions, as if the guesses before it were right.

    Args:
      logits: of them, [B * (n + 1), V].
      guesses: int32 [B, n], -1: no idea.
      sampler, keys: each row's.
      steps: int32 [B], tokens that each row has drawn.
      past: what the first of them is drawn in view of.

    Returns:
      tokens int32 [B, n + 1], the logits to go on with [B * (n + 1), V], and whether
      those of a position are finite, bool [B, n + 1].
    """
    batch, count = len(guesses), guesses.shape[1] + 1
    at = jnp.arange(count, dtype=jnp.int32)
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    keys = fold(keys, steps[:, None] + at[None, :]).reshape(-1)
    sampler = jax.tree.map(lambda x: _each(x, count), sampler)
    drawn, logits, finite = draw(logits, sampler, keys, past.at_guesses(guesses))
    return drawn.reshape(batch, count), logits, finite.reshape(batch, count)


def _each(x: Any, count: int) -> Any:
    """What belongs to rows, once for each of their positions."""
    return jnp.repeat(x, count, axis=0) if jnp.ndim(x) else x


def counted(
    tokens: jax.Array, right: jax.Array, stop_ids: jax.Array, left: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Which of n + 1 tokens plain decoding would have drawn, and whether a row stops.

    Args:
      tokens: int32 [B, n + 1].
      right: bool [B, n], whether the guess that each but the first one rests on was.
      stop_ids: int32 [B or 1, any].
      left: int32 [B], tokens that each row may still get.

    Returns:
      bool [B, n + 1], first those that count, and bool [B].
    """
    at = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
    right = jnp.cumprod(right.astype(jnp.int32), axis=1)
    stop = jnp.any(tokens[:, :, None] == stop_ids[:, None], axis=-1)
    before = jnp.cumsum(stop, axis=1, dtype=jnp.int32) - stop.astype(jnp.int32)
    new = (at <= jnp.sum(right, axis=1, keepdims=True)) & (before == 0)
    new &= at < left[:, None]
    return new, jnp.any(stop & new, axis=1)


def put(
    into: Any, new: jax.Array, starts: jax.Array, counts: jax.Array | int
) -> jax.Array:
    """The first `counts` of `new` [B, T, ...] into `into` [B, W, ...] from `starts`."""
    batch, count = new.shape[:2]
    at = jnp.arange(count, dtype=jnp.int32)[None, :]
    counts = jnp.broadcast_to(jnp.asarray(counts, jnp.int32), batch)[:, None]
    index = jnp.where(at < counts, starts[:, None] + at, into.shape[1])
    own = jnp.arange(batch, dtype=jnp.int32)[:, None]
    return into.at[own, index].set(new, mode="drop")


def cautious(
    caution: jax.Array,
    kept: jax.Array,
    going: jax.Array,
    wider: float = WIDER,
    longest: int = LONGEST_PAUSE,
) -> jax.Array:
    """The pause after a pass over guesses: none where it paid, else twice the last one.

    Args:
      caution: int32 [], the pause after the last such pass.
      kept: int32 [B], the tokens that rows got from it.
      going: int32 [], rows that could get some.
      wider: what it costs, in terms of a pass over single tokens.
      longest: of all pauses.
    """
    got = jnp.sum(kept, dtype=jnp.int32).astype(jnp.float32)
    paid = got >= wider * going.astype(jnp.float32)
    return jnp.where(paid, 0, jnp.clip(2 * caution, 1, longest))
