"""Guessing the next tokens from the text itself: prompt lookup."""

import jax
import jax.numpy as jnp

from jrope.generation.guesser import PromptLookup


def look_up(text: jax.Array, newest: jax.Array, how: PromptLookup) -> jax.Array:
    """What followed the last occurrence of each row's longest known n-gram.

    Args:
      text: int32 [B, W], prompts and what was generated.
      newest: int32 [B], where the newest token stands.
      how: how many tokens to guess, of n-grams of which length.

    Returns:
      int32 [B, tokens], -1 in rows whose newest token is new.  Past the newest token
      the text is taken to go round.
    """
    at = jnp.arange(text.shape[1], dtype=jnp.int32)[None, :]
    earlier = at < newest[:, None]
    alike, matched = earlier, jnp.zeros_like(text)
    for back in range(how.max_ngram):
        own = jnp.maximum(newest - back, 0)[:, None]
        wanted = jnp.take_along_axis(text, own, axis=1)
        shifted = jnp.pad(text, ((0, 0), (back, 0)), constant_values=-1)
        alike &= (shifted[:, : text.shape[1]] == wanted) & (newest >= back)[:, None]
        matched += alike.astype(jnp.int32)
    longest = jnp.max(matched, axis=1, keepdims=True)
    best = earlier & (matched == longest)
    found = jnp.max(jnp.where(best, at, -1), axis=1)
    period = jnp.maximum(newest - found, 1)[:, None]
    ahead = jnp.arange(how.tokens, dtype=jnp.int32)[None, :] % period
    index = jnp.clip(found[:, None] + 1 + ahead, 0, text.shape[1] - 1)
    guesses = jnp.take_along_axis(text, index, axis=1)
    return jnp.where(longest > 0, guesses, -1)
