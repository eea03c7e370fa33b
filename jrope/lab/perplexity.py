"""How well a model reads a text at a context: the negative log-likelihood of tokens.

Two ways to choose windows, both as the papers do:

- first: the first `context` tokens of every text (Chen et al. 2023, table 2).
- sliding: a window moves by `stride`; each scores the tokens that none before it did,
  the last `stride` of its own (Press et al. 2022, arXiv:2108.12409).  The last window
  ends where the text ends.

A method changes cos and sin alone, which are arguments here: a context is compiled once
for all methods.  The length of length-dependent methods is the window's, which is what
transformers takes for a full pass.
"""

import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jrope.errors import JropeError
from jrope.lab.memory import compile_fitting
from jrope.lab.statistics import Interval, block_bootstrap
from jrope.model.config import LlamaConfig
from jrope.model.context import context_share
from jrope.model.layers import (
    Step,
    decoder_layer,
    layer_kind,
    local_table,
    norm_of,
    rms_norm,
)
from jrope.model.llama import embed
from jrope.model.placed import share_of
from jrope.model.scores import token_logprobs
from jrope.rope import table
from jrope.sharding.axes import ONE, Axes
from jrope.sharding.meshes import (
    Layout,
    layout_of,
    readable,
    stand_in_rows,
    stand_whole,
)
from jrope.tree import Params

FIRST_BUCKET = 256


class Window(NamedTuple):
    """A stretch of a text: its first token, and the first position that it scores."""

    start: int
    scored: int


@final
@dataclass(frozen=True, kw_only=True)
class TokenScores:
    """Every scored token, in the order of the texts.

    Args:
      text: which text, int32 [n].
      index: which token of it, int32 [n].
      position: where in its window, int32 [n]; equal to the tokens it could see.
      nll: -log p of the token, nats, float32 [n].
      seconds: of the passes, compilation aside.
      program_bytes: weights, inputs, results and temporaries of the compiled pass.
    """

    text: np.ndarray
    index: np.ndarray
    position: np.ndarray
    nll: np.ndarray
    seconds: float
    program_bytes: int

    def interval(self, first: int = 0, last: int | None = None) -> Interval | None:
        """Mean and interval over positions from `first` to before `last`, if any."""
        last = int(self.position.max()) + 1 if last is None else last
        chosen = (self.position >= first) & (self.position < last)
        if not chosen.any():
            return None
        # Tokens that follow one another in a text differ from their rank by a constant.
        gaps = self.index[chosen] - np.arange(np.count_nonzero(chosen))
        runs = gaps + self.text[chosen].astype(np.int64) * 2**32
        return block_bootstrap(self.nll[chosen], runs)


def reflow(text: str) -> str:
    """One paragraph a line: white space inside a paragraph becomes single spaces.

    Blank lines end paragraphs.  Hard line breaks are tokens that a model trained on
    flowing text does not expect.

    >>> reflow("It was\\n  so.\\n\\nEnd.\\n")
    'It was so.\\nEnd.'
    """
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return "\n".join(part for part in paragraphs if part)


def windows(count: int, context: int, stride: int | None = None) -> list[Window]:
    """Windows of `context` tokens over a text of `count`.

    Args:
      count: tokens of the text.
      context: tokens of every window.
      stride: tokens from one window to the next; None: the first window alone.  Equal
        to the context, windows do not overlap, and each one's first token is not
        scored.

    Raises:
      JropeError: the text is shorter than the context, or a stride would skip tokens.

    >>> [tuple(window) for window in windows(10, 4, 2)]
    [(0, 1), (2, 2), (4, 2), (6, 2)]
    >>> [tuple(window) for window in windows(7, 4, 4)]
    [(0, 1), (3, 1)]
    """
    if context < 2:
        raise JropeError(f"context: got {context}, want at least 2 tokens")
    if count < context:
        raise JropeError(f"text: got {count} tokens, want at least {context}")
    found, end = [Window(0, 1)], context
    if stride is None:
        return found
    if not 1 <= stride <= context:
        raise JropeError(f"stride: got {stride}, want 1 to the context, {context}")
    while end < count:
        start = min(found[-1].start + stride, count - context)
        found.append(Window(start, max(end - start, 1)))
        end = start + context
    return found


def perplexity(
    params: Params,
    config: LlamaConfig,
    texts: Sequence[np.ndarray],
    context: int,
    *,
    stride: int | None = None,
    tokens_at_once: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> TokenScores:
    """Score texts in windows of `context` tokens.

    `math.exp(scores.interval().mean)` is the perplexity.

    Args:
      params, config: the model; the configuration's rotary embedding is what counts.
      texts: token ids of each, int [n].
      context: tokens of a window.
      stride: see `windows`.
      tokens_at_once: windows are batched up to this many tokens; None: one by one.
      progress: called with the tokens of every batch that is done.

    Raises:
      JropeError: a text is too short, or a batch does not fit in memory.
    """
    jobs = [
        (i, window)
        for i, text in enumerate(texts)
        for window in windows(len(text), context, stride)
    ]
    layout = layout_of(params)
    shares = 1 if layout is None else layout.size(layout.axes.batch)
    rows = _rows(len(jobs), context, tokens_at_once, shares)
    tables = table(config.rope, np.arange(context)[None, :], length=context)
    cos, sin = stand_whole(tables, layout)
    program = compile_fitting(
        _window_nll,
        f"context {context}",
        params,
        stand_in_rows(jax.ShapeDtypeStruct((rows, context), jnp.int32), layout),
        *(cos, sin),
        config=_unstretched(config),
        layout=layout,
    )
    begin = time.perf_counter()
    nll: list[np.ndarray] = []
    for at in range(0, len(jobs), rows):
        batch = jobs[at : at + rows]
        tokens = np.zeros((rows, context), np.int32)
        for row, (i, window) in enumerate(batch):
            tokens[row] = texts[i][window.start : window.start + context]
        given = stand_in_rows(jnp.asarray(tokens), layout)
        scores = np.asarray(readable(program.call(params, given, cos, sin)))
        nll += [scores[row, w.scored - 1 :] for row, (_, w) in enumerate(batch)]
        if progress is not None:
            progress(len(batch) * context)
    return _gathered(jobs, context, nll, time.perf_counter() - begin, program.total)


def _gathered(
    jobs: Sequence[tuple[int, Window]],
    context: int,
    nll: Sequence[np.ndarray],
    seconds: float,
    program_bytes: int,
) -> TokenScores:
    """What the windows scored, (text, window) by (text, window), in flat arrays."""
    positions = [np.arange(w.scored, context, dtype=np.int32) for _, w in jobs]
    sizes = [context - w.scored for _, w in jobs]
    starts = np.repeat([w.start for _, w in jobs], sizes).astype(np.int32)
    return TokenScores(
        text=np.repeat([i for i, _ in jobs], sizes).astype(np.int32),
        index=starts + np.concatenate(positions),
        position=np.concatenate(positions),
        nll=np.concatenate(nll),
        seconds=seconds,
        program_bytes=program_bytes,
    )


def buckets(context: int) -> list[tuple[int, int]]:
    """Position buckets [first, last): to 256, then octaves up to the context.

    >>> buckets(1000)
    [(0, 256), (256, 512), (512, 1000)]
    """
    edges = [0]
    while (edge := FIRST_BUCKET << (len(edges) - 1)) < context:
        edges.append(edge)
    return [*zip(edges, [*edges[1:], context], strict=True)]


def describe(scores: TokenScores, context: int) -> dict[str, Any]:
    """What a record tells of the scores: nats per token, overall and by position."""
    whole = scores.interval()
    parts = [(span, scores.interval(*span)) for span in buckets(context)]
    return {
        **_fields(whole),
        "buckets": [
            {"first": first, "last": last, **_fields(part)}
            for (first, last), part in parts
            if part is not None
        ],
        "seconds": round(scores.seconds, 3),
        "peak_bytes": scores.program_bytes,
    }


def _fields(interval: Interval | None) -> dict[str, Any]:
    if interval is None or not np.isfinite(interval.mean):
        raise JropeError("the model's log-likelihoods are not finite")
    return {
        "tokens": interval.count,
        "nll": interval.mean,
        "low": interval.low,
        "high": interval.high,
    }


def _rows(jobs: int, context: int, tokens_at_once: int | None, shares: int) -> int:
    """Windows in a batch: as many as may be, spread evenly over the batches.

    Of a mesh that splits rows each share has as many as a device alone.
    """
    most = shares * max(1, (tokens_at_once or 0) // context)
    batches = -(-jobs // most)
    return -(-jobs // batches // shares) * shares


def _unstretched(config: LlamaConfig) -> LlamaConfig:
    """The configuration without its rotary method: one compiled pass serves all."""
    rope = dataclasses.replace(config.rope, scaling=None, condense=1.0)
    return dataclasses.replace(config, rope=rope)


@partial(jax.jit, static_argnames=("config", "axes", "layout"))
def _window_nll(
    params: Params,
    tokens: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    config: LlamaConfig,
    axes: Axes = ONE,
    layout: Layout | None = None,
) -> jax.Array:
    """-log p(token t + 1 | tokens up to t), float32 [B, T - 1].

    `jrope.score` without a cache, and with 256 x V logits at once for all rows.
    """
    if layout is not None:
        how = {"config": share_of(config, layout), "axes": layout.axes}
        whole, rows = PartitionSpec(), layout.rows()
        given = layout.params(params), rows, whole, whole
        run = layout.map(partial(_window_nll, **how), given, rows)
        return run(params, tokens, cos, sin)
    model, (batch, count) = params["model"], tokens.shape
    share = context_share(tokens, None, axes)
    cos, sin = (jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in (cos, sin))
    places = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (batch, count))
    own, local = tokens, local_table(config, places)
    if share is not None:
        own, cos, sin = share.take(tokens), share.take(cos), share.take(sin)
    x = embed(model, own, config=config, axes=axes)
    step = Step(cos=cos, sin=sin, local=local, share=share)
    for i in range(config.num_hidden_layers):
        weights, kind = model["layers"][str(i)], layer_kind(config, i, count)
        how = {"config": config, "capacity": x.shape[1], "axes": axes}
        x, _ = decoder_layer(weights, x, step, **how, **kind)
    x = rms_norm(x, *norm_of(model["norm"], config))
    score = partial(token_logprobs, params, config=config, axes=axes)
    if share is not None:
        targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
        return -score(x, targets, share=share)[:, :-1]
    x = x[:, :-1].reshape(1, batch * (count - 1), -1)
    scores = score(x, tokens[:, 1:].reshape(1, -1))
    return -scores.reshape(batch, count - 1)
