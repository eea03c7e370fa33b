"""Guesses of a smaller model for rows that come and go, from a cache beside theirs.

The draft reads prompts as they enter, see `filling`.  While no guesses are taken it
reads nothing; before its next ones it reads what it has missed.  What it has read of
wrong guesses is taken back by its cache's lengths, which never exceed the model's.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jrope.batch.slots import Slots, past_of
from jrope.generation.draft import draft
from jrope.generation.guesser import Draft, Guesser, PromptLookup
from jrope.generation.lookup import look_up
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.llama import hidden_states
from jrope.tree import Params


def beside(guesser: Guesser | None) -> tuple[LlamaConfig, Any] | None:
    """Whose cache stands beside the model's, as `empty` is told; None: nobody's."""
    if not isinstance(guesser, Draft):
        return None
    return guesser.config, guesser.params["model"]["norm"]["weight"].dtype


def known(text: jax.Array, newest: jax.Array, guesser: Guesser) -> jax.Array:
    """What is guessed, int32 [B, n], before it is clear whether guesses are taken.

    A draft is asked only then: until it is, 0 stands for whatever it may say.
    """
    if isinstance(guesser, PromptLookup):
        return look_up(text, newest, guesser)
    return jnp.zeros((len(text), guesser.tokens), jnp.int32)


def drafted(
    model: Draft, slots: Slots, coming: jax.Array, text: jax.Array, keys: jax.Array
) -> tuple[jax.Array, Slots]:
    """What the draft draws behind the coming tokens: int32 [B, n], -1: no idea.

    Args:
      model: the draft.
      slots: the rows, where the coming tokens count as seen.
      coming: int32 [B], drawn but not in the cache yet.
      text: int32 [B, W], prompts and what was drawn so far.
      keys: of the rows.

    Returns:
      the guesses, and the slots where it has read them all; see `taken_back`.
    """
    held: Any = slots.draft
    cache = _caught_up(model, held, slots.cache.lengths, text)
    steps = slots.steps + 1
    own = slots.asked.sampler, keys, steps, past_of(slots, steps)
    guesses, cache = draft(model, cache, coming, *own)
    cache = replace(cache, lengths=cache.lengths + model.tokens + 1)
    return guesses, replace(slots, draft=cache)


def _caught_up(
    model: Draft, cache: KVCache, wanted: jax.Array, text: jax.Array
) -> KVCache:
    """The draft's cache with the first `wanted` tokens of each row, int32 [B]."""
    steps = jnp.arange(model.tokens + 1, dtype=jnp.int32)[None, :]

    def behind(cache: KVCache) -> jax.Array:
        return jnp.any(cache.lengths < wanted)

    def read(cache: KVCache) -> KVCache:
        at = cache.lengths[:, None] + steps
        tokens = jnp.take_along_axis(text, at, axis=1, mode="clip")
        how: dict[str, Any] = {"cache": cache, "config": model.config}
        _, after = hidden_states(model.params, tokens, **how)
        return replace(after, lengths=jnp.minimum(after.lengths, wanted))

    return jax.lax.while_loop(behind, read, cache)


def taken_back(slots: Slots) -> Slots:
    """The slots where the draft has read no more than the model."""
    if (cache := slots.draft) is None:
        return slots
    lengths = jnp.minimum(cache.lengths, slots.cache.lengths)
    return replace(slots, draft=replace(cache, lengths=lengths))


def share_of_step(guesser: Guesser, params: Params, config: LlamaConfig) -> float:
    """What one step of a draft is taken to cost, in terms of one of the model.

    Both are bound by the weights that they read.
    """
    if not isinstance(guesser, Draft):
        return 0.0
    return _read(guesser.params, guesser.config) / _read(params, config)


def _read(params: Params, config: LlamaConfig) -> int:
    """Bytes of weights that a step reads: all, but of an embedding a few rows."""

    def held(tree: Params) -> int:
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    unread = 0 if config.tie_word_embeddings else held(params["model"]["embed_tokens"])
    return held(params) - unread
