"""Rows that lie one behind another in a single line of tokens, without padding.

Products see the line [1, N, D] as it is.  Attention sees each row by itself: by cuDNN's
packed layout; where it has none, by cuDNN with rows that are padded for it; or row
after row, each in the narrowest of a few widths that holds it.  A row's width follows
from its own length, and so does what it is rounded to.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jrope.model.config import LlamaConfig
from jrope.model.kernels import cudnn_flat, cudnn_flat_takes, cudnn_rows, cudnn_takes
from jrope.model.queries import steps

NARROWEST = 16  # queries of a row


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("lengths", "planned"),
    meta_fields=("longest",),
)
@dataclass(frozen=True, kw_only=True)
class Flat:
    """Where the rows of a line begin and end; the first begins with it.

    Args:
      lengths: int32 [R], tokens of each row; those of 0 come last.
      planned: int32 [R], their `rope_lengths`, see `forward`.
      longest: what no row exceeds.
    """

    lengths: jax.Array
    planned: jax.Array
    longest: int

    @property
    def starts(self) -> jax.Array:
        """The first token of each row: int32 [R]."""
        return jnp.cumsum(self.lengths) - self.lengths

    @property
    def count(self) -> jax.Array:
        """Rows that have tokens: int32 []."""
        return jnp.sum(self.lengths > 0, dtype=jnp.int32)

    def places(self, count: int) -> tuple[jax.Array, jax.Array]:
        """Each token's row, R behind the last, and its position there: int32 [N]."""
        at = steps(count)
        ended = jnp.cumsum(self.lengths)[None, :] <= at[:, None]
        rows = jnp.sum(ended, axis=1, dtype=jnp.int32)
        return rows, at - self.starts.at[rows].get(mode="clip")

    def widths(self) -> list[int]:
        """What rows are attended in, narrowest first."""
        found = [self.longest]
        while found[0] // 2 >= max(NARROWEST, self.longest // NARROWEST):
            found.insert(0, -(-found[0] // 2))
        return found


def attend_flat(
    see: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    flat: Flat,
    config: LlamaConfig,
    window: int | None,
) -> jax.Array:
    """Causal attention of each row to itself.

    Args:
      see: `attend`, or `attend_growing`, with all that the layer tells it.
      q: [1, N, N heads, H], rotated as `see` wants it.
      k, v: [1, N, K, H].
      flat: the rows.
      config: the model's.
      window: as in `attend`.

    Returns:
      As q; behind the last row anything finite.
    """
    plain = config.score_cap is None and config.rope.lengths != "growing"
    if not plain or not cudnn_takes(q):
        return _one_by_one(see, q, k, v, flat)

    own = None if window is None or window >= flat.longest else window
    cuda = partial(
        _packed if cudnn_flat_takes(q) else _padded,
        scale=config.attention_scale,
        window=own,
    )
    ways = {"cuda": cuda, "default": partial(_one_by_one, see)}
    return jax.lax.platform_dependent(q, k, v, flat, **ways)


def _packed(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    flat: Flat,
    scale: float | None,
    window: int | None,
) -> jax.Array:
    """All rows at once, by cuDNN.

    Its blocks of keys reach into the next row, whose weights are 0, but 0 x NaN is NaN:
    so it is given none, and what should have seen one is made NaN afterwards.
    """
    wrong = ~jnp.all(jnp.isfinite(k) & jnp.isfinite(v), axis=(2, 3))[0]
    k, v = (jnp.where(wrong[:, None, None], jnp.zeros((), x.dtype), x) for x in (k, v))
    y = cudnn_flat(q, k, v, flat.lengths, scale, window)
    (rows, at), count = flat.places(q.shape[1]), len(flat.lengths)
    own = wrong[:, None] & (rows[:, None] == steps(count)[None, :])
    first = jnp.min(jnp.where(own, at[:, None], flat.longest), axis=0)
    seen = at >= first.at[rows].get(mode="clip")
    y = jnp.where(seen[:, None, None], jnp.asarray(jnp.nan, y.dtype), y)
    valid = rows < count  # behind the last row y is not written
    return jnp.where(valid[:, None, None], y, jnp.zeros((), y.dtype))


def _padded(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    flat: Flat,
    scale: float | None,
    window: int | None,
) -> jax.Array:
    """All rows at once, each as long as the longest may be, by cuDNN."""
    at, count = steps(flat.longest)[None, :], len(flat.lengths)
    valid = at < flat.lengths[:, None]  # what another row holds there, is not seen

    def own(x: jax.Array) -> jax.Array:
        x = x[0].at[flat.starts[:, None] + at].get(mode="clip")
        return jnp.where(valid[..., None, None], x, jnp.zeros((), x.dtype))

    y = cudnn_rows(own(q), own(k), own(v), flat.lengths, scale, window)
    rows, place = flat.places(q.shape[1])
    y = y.at[rows, place].get(mode="clip")
    return jnp.where((rows < count)[:, None, None], y, jnp.zeros((), y.dtype))[None]


def _one_by_one(
    see: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, flat: Flat
) -> jax.Array:
    """Row after row; what one leaves behind its end, the next one overwrites."""
    count, widths, starts = q.shape[1], flat.widths(), flat.starts
    q, k, v = (_longer(x, flat.longest) for x in (q, k, v))

    def at_width(width: int, start: jax.Array, length: jax.Array) -> jax.Array:
        def own(x: jax.Array) -> jax.Array:  # a NaN behind it must not reach the row
            x = jax.lax.dynamic_slice_in_dim(x, start, width, axis=1)
            return jnp.where(valid, x, jnp.zeros((), x.dtype))

        valid = (steps(width) < length)[None, :, None, None]
        return _longer(see(own(q), own(k), own(v)), flat.longest - width)

    branches = [partial(at_width, width) for width in widths]

    def row(i: jax.Array, out: jax.Array) -> jax.Array:
        start, length = starts[i], flat.lengths[i]
        which = jnp.sum(length > jnp.array(widths[:-1], jnp.int32), dtype=jnp.int32)
        y = jax.lax.switch(which, branches, start, length)
        return jax.lax.dynamic_update_slice_in_dim(out, y, start, axis=1)

    return jax.lax.fori_loop(0, flat.count, row, jnp.zeros_like(q))[:, :count]


def _longer(x: jax.Array, more: int) -> jax.Array:
    """Tokens [1, N, ...] with zeros behind them."""
    return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)))
