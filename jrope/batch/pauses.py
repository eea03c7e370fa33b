"""When a batch takes guesses: what a pass over them costs, and pauses after losses."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jrope.batch.block import Guessing
from jrope.generation.guesser import Guesser
from jrope.generation.passes import LONGEST_PAUSE, WIDER, cautious

FREE = 300  # tokens of a pass that cost little more than one: an H100's FLOPs per byte


def wider(slots: int, guesser: Guesser, share: float = 0.0) -> float:
    """What a pass over guesses is taken to cost, in terms of one over single tokens.

        max(1.25, slots (tokens + 1) / 300) + (tokens + 1) share

    As long as weights take longer to read than to multiply, little; then in proportion
    to the tokens, those of slots without a row included.  A draft takes as many steps
    of its own, each of which costs a `share` of the model's.
    """
    wide = max(WIDER, slots * (guesser.tokens + 1) / FREE)
    return wide + (guesser.tokens + 1) * share


def in_vain(slots: int, guesser: Guesser, share: float = 0.0) -> str | None:
    """Why guesses are never taken, where even right ones would not pay."""
    cost, most = wider(slots, guesser, share), guesser.tokens + 1
    if cost <= most:
        return None
    return (
        f"speculate: {guesser.tokens} guesses for each of {slots} slots are taken to "
        f"cost as much as {cost:.1f} tokens without, and give {most} at most, so "
        "nothing is guessed; take fewer slots" + " or a smaller draft" * (share > 0)
    )


def hopeful(
    guessing: Guessing, live: jax.Array, guesses: jax.Array, cost: float
) -> jax.Array:
    """Whether guesses [B, n] are due, and would pay if all of them were right."""
    known = jnp.sum(live & (guesses[:, 0] >= 0), dtype=jnp.float32)
    wanted = (cost - 1) * jnp.sum(live, dtype=jnp.float32)
    enough = (known > 0) & (known * guesses.shape[1] >= wanted)
    return (guessing.pause == 0) & enough


def learned(
    before: Guessing, live: jax.Array, kept: jax.Array, count: int, cost: float
) -> Guessing:
    """How guessing goes, after a pass over so many guesses."""
    rows = jnp.sum(live, dtype=jnp.int32)
    now = replace(
        before, pause=jnp.maximum(before.pause - 1, 0), rows=before.rows + rows
    )
    if not count:
        return now
    # What is tried in vain costs no larger a part where it costs more.
    longest = round(LONGEST_PAUSE * (cost - 1) / (WIDER - 1))
    caution = cautious(before.caution, kept, rows, cost, longest)
    return replace(now, pause=caution, caution=caution, passes=before.passes + 1)
