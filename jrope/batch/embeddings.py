"""Rows of `/v1/embeddings`: one vector for each text, of length 1."""

from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np

from jrope.batch.answers import Record, enveloped, usage
from jrope.batch.fields import RowError
from jrope.batch.rows import BatchSettings, Row
from jrope.generation.request import bucket
from jrope.model.config import LlamaConfig
from jrope.model.llama import hidden_states, last_token
from jrope.tree import Params

Pooling: TypeAlias = Literal["mean", "last"]
_BATCH = 8  # texts at a time


@final
class Embedder:
    """Vectors from the hidden states after the final norm.

    Args:
      params, config: the model.
      pooling: the mean of a text's tokens, or its last one.
    """

    def __init__(
        self, params: Params, config: LlamaConfig, pooling: Pooling = "mean"
    ) -> None:
        self._params, self._config, self._pooling = params, config, pooling

    def __call__(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors float32 [n, D] of prompts as ids; 8 texts at a time."""
        vectors = list[np.ndarray]()
        for at in range(0, len(prompts), _BATCH):
            group = prompts[at : at + _BATCH]
            tokens = np.zeros((_BATCH, bucket(max(map(len, group)))), np.int32)
            lengths = np.ones(_BATCH, np.int32)
            for i, prompt in enumerate(group):
                tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
            how = {"config": self._config, "pooling": self._pooling}
            pooled = _pooled(self._params, tokens, lengths, **how)
            vectors.append(np.asarray(pooled)[: len(group)])
        return np.concatenate(vectors)


@partial(jax.jit, static_argnames=("config", "pooling"))
def _pooled(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    config: LlamaConfig,
    pooling: Pooling,
) -> jax.Array:
    x, _ = hidden_states(
        params, tokens, config=config, lengths=lengths, rope_lengths=lengths
    )
    if pooling == "last":
        pooled = last_token(x, lengths).astype(jnp.float32)
    else:
        steps = jnp.arange(tokens.shape[1], dtype=jnp.int32)
        inside = (steps[None, :] < lengths[:, None])[..., None]
        total = jnp.sum(jnp.where(inside, x.astype(jnp.float32), 0), axis=1)
        pooled = total / lengths.astype(jnp.float32)[:, None]
    return pooled / jnp.linalg.norm(pooled, axis=-1, keepdims=True)


def embedding(row: Row, vectors: np.ndarray, settings: BatchSettings) -> Record:
    """The record of a row of embeddings.

    Raises:
      RowError: a vector is not finite.
    """
    if not np.isfinite(vectors).all():
        raise RowError("the vector is not finite: weights hold a NaN", "not_finite")
    shown: list[Any] = [[float(str(x)) for x in vector] for vector in vectors]
    if row.extra.get("encoding_format") == "base64":
        little = vectors.astype("<f4")
        shown = [b64encode(vector.tobytes()).decode() for vector in little]
    data = [
        {"object": "embedding", "index": index, "embedding": vector}
        for index, vector in enumerate(shown)
    ]
    wanted = sum(map(len, row.prompts))
    told = usage(wanted, 0)
    del told["completion_tokens"]
    body = {"object": "list", "data": data, "model": settings.model, "usage": told}
    return enveloped(row, body)
