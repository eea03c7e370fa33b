"""Guessing the next tokens with a smaller model."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jrope.generation.guesser import Draft
from jrope.generation.loop import draw
from jrope.generation.sample import Sampler
from jrope.model.cache import KVCache
from jrope.model.llama import hidden_states, unembed


def draft(
    model: Draft,
    cache: KVCache,
    last: jax.Array,
    sampler: Sampler,
    keys: jax.Array,
    steps: jax.Array,
    seen: jax.Array,
) -> tuple[jax.Array, KVCache]:
    """The tokens that the smaller model draws next, and its cache.

    It reads its last guess as well, lest the cache lack it where all are accepted.

    Args:
      model, cache: the smaller ones.
      last: int32 [B], each row's newest token, which the cache does not hold yet.
      sampler, keys: each row's.
      steps: int32 [B], tokens that each row has drawn.
      seen: bool [B, V], what each holds, the newest token included.

    Returns:
      int32 [B, tokens], -1 where a logit was not finite: no idea; and the cache, whose
      lengths are what they were.
    """
    batch = jnp.arange(len(last), dtype=jnp.int32)

    def step(
        carry: tuple[KVCache, jax.Array, jax.Array], at: jax.Array
    ) -> tuple[tuple[KVCache, jax.Array, jax.Array], jax.Array]:
        cache, last, seen = carry
        x, cache = hidden_states(
            model.params, last[:, None], cache=cache, config=model.config
        )
        logits = unembed(model.params, x[:, 0], config=model.config)
        own = jax.vmap(jax.random.fold_in)(keys, steps + at)
        drawn, _, finite = draw(logits, sampler, own, seen)
        seen = seen.at[batch, drawn].set(True)
        return (cache, drawn, seen), jnp.where(finite, drawn, -1)

    every = jnp.arange(model.tokens + 1, dtype=jnp.int32)
    (after, _, _), drawn = jax.lax.scan(step, (cache, last, seen), every)
    return drawn[:-1].T, replace(after, lengths=cache.lengths)
