"""Guessing the next tokens with a smaller model."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from jrope.generation.guesser import Draft
from jrope.generation.loop import DecodeState, draw
from jrope.generation.request import SamplingParams
from jrope.model.cache import KVCache
from jrope.model.llama import hidden_states, unembed


def draft(
    model: Draft, cache: KVCache, rows: DecodeState, sampling: SamplingParams
) -> tuple[jax.Array, KVCache]:
    """The tokens int32 [B, tokens] that the smaller model draws next, and its cache.

    It reads its last guess as well, lest the cache lack it where all are accepted.
    """
    batch = jnp.arange(len(rows.last), dtype=jnp.int32)

    def step(
        carry: tuple[KVCache, jax.Array, jax.Array], at: jax.Array
    ) -> tuple[tuple[KVCache, jax.Array, jax.Array], jax.Array]:
        cache, last, seen = carry
        x, cache = hidden_states(
            model.params, last[:, None], cache=cache, config=model.config
        )
        logits = unembed(model.params, x[:, 0], config=model.config)
        keys = jax.vmap(jax.random.fold_in)(sampling.keys, rows.lengths + at)
        drawn, _, _ = draw(logits, sampling.sampler, keys, seen)
        return (cache, drawn, seen.at[batch, drawn].set(True)), drawn

    steps = jnp.arange(model.tokens + 1, dtype=jnp.int32)
    (after, _, _), drawn = jax.lax.scan(step, (cache, rows.last, rows.seen), steps)
    return drawn[:-1].T, replace(after, lengths=cache.lengths)
