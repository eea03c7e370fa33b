"""What a chunk of decoding gives back to the host."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jrope.generation.passes import put
from jrope.sharding.axes import ONE, Axes
from jrope.sharding.meshes import Layout
from jrope.sharding.vocabulary import log_softmax, pick, top_k

ALTERNATIVES = 20  # of a token, at most


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Guessing:
    """How guesses do, over all rows."""

    pause: jax.Array  # int32 [], passes to come that take none
    caution: jax.Array  # int32 [], the pause after those that did not pay last
    passes: jax.Array  # int32 [], of this chunk, that took some
    rows: jax.Array  # int32 [], live ones, over all passes of this chunk


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Block:
    """What a run of `decode` drew; a live row's tokens come first in its row."""

    tokens: jax.Array  # int32 [B, n]
    counts: jax.Array  # int32 [B], tokens of each row
    steps: jax.Array  # int32 []
    live: jax.Array  # bool [B], afterwards
    finite: jax.Array  # bool [B]
    spoilt: jax.Array  # bool [B], whether a NaN may stand in the row's cache
    states: jax.Array | None  # int32 [B], of their structures, where rows have some
    logprobs: jax.Array | None  # float32 [B, n]
    top_ids: jax.Array | None  # int32 [B, n, alternatives], best first
    top_logprobs: jax.Array | None
    guessing: Guessing | None = None


def block_specs(layout: Layout) -> Any:
    """How a `Block` is split."""
    rows: Any = dict.fromkeys([f.name for f in fields(Block)], layout.rows())
    return Block(**rows | {"steps": PartitionSpec()})


def blank(
    live: jax.Array,
    states: jax.Array | None,
    vocabulary: int,
    size: int,
    scored: bool,
) -> Block:
    """A block of so many columns with nothing in it, for the rows that are live [B]."""
    count = live.shape[0]
    best = count, size, min(ALTERNATIVES, vocabulary)
    return Block(
        tokens=jnp.zeros((count, size), jnp.int32),
        counts=jnp.zeros(count, jnp.int32),
        steps=jnp.zeros((), jnp.int32),
        live=live,
        finite=live,
        spoilt=live,
        states=states,
        logprobs=jnp.zeros((count, size), jnp.float32) if scored else None,
        top_ids=jnp.zeros(best, jnp.int32) if scored else None,
        top_logprobs=jnp.zeros(best, jnp.float32) if scored else None,
    )


def recorded(
    block: Block,
    live: jax.Array,
    token: jax.Array,
    logits: jax.Array,
    axes: Axes = ONE,
) -> Block:
    """The block with one more column: tokens [B], drawn from float32 logits [B, V]."""
    put = partial(jax.lax.dynamic_update_index_in_dim, index=block.steps, axis=1)
    block = replace(
        block,
        tokens=put(block.tokens, token),
        counts=block.counts + live.astype(jnp.int32),
        steps=block.steps + 1,
    )
    if block.logprobs is None or block.top_ids is None or block.top_logprobs is None:
        return block
    own, ids, best = scores(logits, token, block.top_ids.shape[2], axes)
    return replace(
        block,
        logprobs=put(block.logprobs, own),
        top_ids=put(block.top_ids, ids),
        top_logprobs=put(block.top_logprobs, best),
    )


def add_tokens(
    block: Block, tokens: jax.Array, scores: Sequence[jax.Array], kept: jax.Array
) -> Block:
    """The block with the first `kept` [B] of tokens [B, T], with their scores or none.

    They are those of all but the last column: the last is drawn anew.
    """
    add = partial(put, starts=block.counts, counts=kept)
    own: dict[str, Any] = {"tokens": add(block.tokens, tokens[:, :-1])}
    names = "logprobs", "top_ids", "top_logprobs"
    for name, found in zip(names, scores, strict=False):
        own[name] = add(getattr(block, name), found[:, :-1])
    return replace(block, **own, counts=block.counts + kept, steps=block.steps + 1)


def scores(
    logits: jax.Array, token: jax.Array, count: int, axes: Axes = ONE
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of tokens [B]; the best ids, and theirs [B, count]."""
    every = log_softmax(logits, axes)
    best, ids = top_k(every, count, axes)
    return pick(every, token, axes), ids, best
