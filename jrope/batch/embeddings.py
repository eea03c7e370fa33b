"""Rows of `/v1/embeddings`: one vector for each text, of length 1."""

from base64 import b64encode
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np

from jrope.batch.admission import check_mesh
from jrope.batch.answers import Record, enveloped, usage
from jrope.batch.rows import BatchSettings, Row
from jrope.errors import RowError
from jrope.generation.request import bucket
from jrope.model.config import LlamaConfig
from jrope.model.llama import hidden_states, last_token
from jrope.model.placed import share_of
from jrope.sharding.axes import ONE, Axes
from jrope.sharding.meshes import Layout, layout_of
from jrope.tree import Params

Pooling: TypeAlias = Literal["mean", "last"]
_BATCH = 8  # texts at a time, or what a mesh divides


@final
class Embedder:
    """Vectors from the hidden states after the final norm.

    Args:
      params, config: the model, on one device or on a mesh as the engine takes it.
      pooling: the mean of a text's tokens, or its last one.
    """

    def __init__(
        self, params: Params, config: LlamaConfig, pooling: Pooling = "mean"
    ) -> None:
        self._params, self._batch, layout = params, _BATCH, layout_of(params)
        if layout is not None:
            check_mesh(layout)
            self._batch += -_BATCH % layout.size(layout.axes.batch)
        self._how: Any = {"config": config, "pooling": pooling, "layout": layout}

    def __call__(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
        """Vectors float32 [n, D] of prompts as ids; a few texts at a time."""
        vectors = list[np.ndarray]()
        for at in range(0, len(prompts), self._batch):
            group = prompts[at : at + self._batch]
            tokens = np.zeros((self._batch, bucket(max(map(len, group)))), np.int32)
            lengths = np.ones(self._batch, np.int32)
            for i, prompt in enumerate(group):
                tokens[i, : len(prompt)], lengths[i] = prompt, len(prompt)
            pooled = _pooled(self._params, tokens, lengths, **self._how)
            vectors.append(np.asarray(pooled)[: len(group)])
        return np.concatenate(vectors)


@partial(jax.jit, static_argnames=("config", "pooling", "axes", "layout"))
def _pooled(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    *,
    config: LlamaConfig,
    pooling: Pooling,
    axes: Axes = ONE,
    layout: Layout | None = None,
) -> jax.Array:
    if layout is not None:
        how: Any = {"config": share_of(config, layout), "axes": layout.axes}
        specs, rows = layout.params(params), layout.rows()
        share = partial(_pooled, pooling=pooling, **how)
        return layout.map(share, (specs, rows, rows), rows)(params, tokens, lengths)
    x, _ = hidden_states(
        params,
        tokens,
        config=config,
        lengths=lengths,
        rope_lengths=lengths,
        axes=axes,
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
