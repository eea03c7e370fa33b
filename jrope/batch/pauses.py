"""When a batch takes guesses: what a pass over them costs, and pauses after losses."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jrope.batch.block import Guessing
from jrope.generation.guesser import PromptLookup
from jrope.generation.passes import LONGEST_PAUSE, WIDER, cautious

FREE = 300  # tokens of a pass that cost little more than one: an H100's FLOPs per byte


def wider(slots: int, guesser: PromptLookup) -> float:
    """What a pass over guesses is taken to cost, in terms of one over single tokens.

        max(1.25, slots (tokens + 1) / 300)

    As long as weights take longer to read than to multiply, little; then in proportion
    to the tokens, those of slots without a row included.
    """
    return max(WIDER, slots * (guesser.tokens + 1) / FREE)


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
