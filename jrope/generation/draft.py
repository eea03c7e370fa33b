"""Guessing the next tokens with a smaller model."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jrope.generation.guesser import Draft
from jrope.generation.loop import draw
from jrope.generation.past import Past
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
    past: Past,
) -> tuple[jax.Array, KVCache]:
    """The tokens that the smaller model draws next, and its cache.

    It reads its last guess as well, lest the cache lack it where all are accepted.

    Args:
      model, cache: the smaller ones.
      last: int32 [B], each row's newest token, which the cache does not hold yet.
      sampler, keys: each row's.
      steps: int32 [B], tokens that each row has drawn.
      past: what the first of them is drawn in view of.

    Returns:
      int32 [B, tokens], -1 where a logit was not finite: no idea; and the cache, whose
      lengths are what they were.
    """
    every = jnp.arange(model.tokens + 1, dtype=jnp.int32)
    shape = len(last), 1, len(every)

    def step(
        carry: tuple[KVCache, jax.Array, jax.Array], at: jax.Array
    ) -> tuple[tuple[KVCache, jax.Array, jax.Array], jax.Array]:
        cache, last, before = carry
        x, cache = hidden_states(
            model.params, last[:, None], cache=cache, config=model.config
        )
        logits = unembed(model.params, x[:, 0], config=model.config)
        own = jax.vmap(jax.random.fold_in)(keys, steps + at)
        known = jnp.broadcast_to(every[None, None] < at, shape)
        drawn, _, finite = draw(
            logits, sampler, own, past.behind(before, known, at[None])
        )
        before = before.at[:, at].set(drawn)
        return (cache, drawn, before), jnp.where(finite, drawn, -1)

    none = jnp.zeros((len(last), len(every)), jnp.int32)
    (after, _, _), drawn = jax.lax.scan(step, (cache, last, none), every)
    return drawn[:-1].T, replace(after, lengths=cache.lengths)
