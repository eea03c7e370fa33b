"""Attention where a mesh splits the sequence: see `sharding.stripes`.

A prompt's queries see the keys of all devices, in one of two ways:

- gathered: every device has all keys and values of a layer at once;
- in a ring, where they go from device to device and none holds more than two shares
  (Liu et al. 2023, arXiv:2310.01889): sums of exponentials, relative to the largest
  score so far, and weighted values are carried on in float32.

Both send the same bytes.  Gathering is one collective, and is chosen where what it
holds is no more than the MLP's gate and up: a layer's peak is then the MLP's, as it is
in a ring.  So it is for few key/value heads (an 8B up to 14 devices).  Growing lengths
gather always: each query rotates all keys for itself.

A decode step sees the slots where they lie, see `attention.one_query`: the cache stays
split, and what goes between devices does not grow with it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.model.attention import attend, one_query
from jrope.model.blockwise import (
    BLOCK,
    SoftmaxSums,
    in_blocks,
    in_key_blocks,
    no_sums,
    out_of_blocks,
    see_block,
)
from jrope.model.cache import KVCache, Slots, grow, write
from jrope.model.config import LlamaConfig
from jrope.model.growing import attend_growing
from jrope.model.int8_cache import linear_in_head
from jrope.model.queries import Queries
from jrope.rope import Rope, rotate, table
from jrope.sharding import stripes
from jrope.sharding.axes import Axes


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("starts", "own"),
    meta_fields=("count", "axes"),
)
@dataclass(frozen=True, kw_only=True)
class Share:
    """What this device computes of a pass, and where the rows stand.

    Args:
      starts: int32 [B], filled slots of each row, on all devices.
      own: int32 [B, T / n], its tokens, counted from the start; None: a decode step,
        whose one token all devices compute.
      count: T.
      axes: of the mesh.
    """

    starts: jax.Array
    own: jax.Array | None
    count: int
    axes: Axes

    def slots(self) -> jax.Array:
        """Where the queries stand: int32 [B, T / n]."""
        starts = self.starts[:, None]
        return starts if self.own is None else starts + self.own

    def take(self, x: jax.Array) -> jax.Array:
        """This device's of all tokens [B, T, ...], 0 past the last: [B, T / n, ...]."""
        return x if self.own is None else stripes.take(x, self.own)

    def whole(self, x: jax.Array) -> jax.Array:
        """All tokens' [B, T, ...] of every device's own [B, T / n, ...]."""
        if self.own is None:
            return x
        return stripes.whole(x, self.axes, self.starts, self.count)

    def pick(self, x: jax.Array, token: jax.Array) -> jax.Array:
        """One token of each row, counted from the start: [B, T / n, D] -> [B, D]."""
        if self.own is None:
            return x[:, -1]
        return stripes.pick(x, token, self.starts, self.axes)


def context_share(tokens: Any, cache: KVCache | None, axes: Axes) -> Share | None:
    """This device's share of a pass over tokens [B, T]; None: all of it."""
    if not axes.context:
        return None
    batch, count = np.shape(tokens)
    starts = jnp.zeros(batch, jnp.int32) if cache is None else cache.lengths
    single = cache is not None and count == 1
    own = None if single else stripes.own(starts, count, axes)
    return Share(starts=starts, own=own, count=count, axes=axes)


def remember(slots: Slots | None, new: Slots, share: Share, capacity: int) -> Slots:
    """This device's slots with its new keys and values in them."""
    if slots is None:
        return grow(new[0], capacity), grow(new[1], capacity)
    axes = share.axes
    starts = stripes.first(share.starts, axes)
    if share.own is None:  # all have the token, and one of them keeps it
        mine = share.starts % stripes.count(axes) == stripes.index(axes)
        starts = jnp.minimum(starts, slots[0].shape[1] - 1)
        at, mine = (x[:, None, None, None] for x in (starts, mine))
        new = jax.tree.map(
            lambda x, old: jnp.where(mine, x, jnp.take_along_axis(old, at, axis=1)),
            *(new, slots),
        )
    return write(slots[0], new[0], starts), write(slots[1], new[1], starts)


def attend_share(
    q: jax.Array,
    keys: Slots,
    share: Share,
    *,
    segments: jax.Array | None,
    config: LlamaConfig,
    window: int | None,
) -> jax.Array:
    """`attend` of this device's queries over the keys and values of all.

    Args:
      q: [B, T / n, N, H], rotated.
      keys: this device's keys and values [B, S / n, K, H].
      share: what it computes.
      segments: int32 [B, T], of all tokens, or None.
      config: of its share of the model.
      window: as in `attend`.
    """
    axes, at = share.axes, share.slots()
    n = stripes.count(axes)
    if share.own is None:
        queries = Queries(slots=at, segments=None, window=window)
        return one_query(q, *keys, queries, axes=axes)
    if segments is not None:
        after = n * keys[0].shape[1] - segments.shape[1]
        segments = jnp.pad(segments, ((0, 0), (0, after)))
    gathered, mlp = n * keys[0].size, at.size * config.intermediate_size
    if gathered <= mlp:
        k, v = jax.tree.map(partial(stripes.whole, axes=axes), keys)
        return attend(q, k, v, window=window, segments=segments, slots=at)
    return _ring(q, keys, at, segments, window, axes)


def _ring(
    q: jax.Array,
    keys: Slots,
    at: jax.Array,
    segments: jax.Array | None,
    window: int | None,
    axes: Axes,
) -> jax.Array:
    """Own keys first, then those of one device after the other before this one."""
    n, size = stripes.count(axes), keys[0].shape[1]
    own = None if segments is None else stripes.take(segments, at)
    queries = Queries(slots=at, segments=own, window=window)
    blocks = in_blocks(q, queries, keys[0].shape[2], BLOCK)

    def see(keys: Slots, step: jax.Array | int, sums: SoftmaxSums) -> SoftmaxSums:
        slots = stripes.slots(size, axes, (stripes.index(axes) - step) % n)
        theirs = None if segments is None else segments[:, slots]
        seen = in_key_blocks(*keys, slots, theirs, BLOCK)

        @jax.checkpoint
        def one_block(
            carry: None, given: tuple[tuple[jax.Array, Queries], SoftmaxSums]
        ) -> tuple[None, SoftmaxSums]:
            return carry, see_block(*given[0], seen, given[1])

        return jax.lax.scan(one_block, None, (blocks, sums))[1]

    def turn(
        carry: tuple[Slots, SoftmaxSums], step: jax.Array
    ) -> tuple[tuple[Slots, SoftmaxSums], None]:
        keys, sums = carry
        way = [(i, (i + 1) % n) for i in range(n)]
        following = jax.lax.ppermute(keys, axes.context, way)
        return (following, see(keys, step, sums)), None

    start = keys, no_sums(blocks[0])
    (keys, sums), _ = jax.lax.scan(turn, start, jnp.arange(n - 1, dtype=jnp.int32))
    _, total, acc = see(keys, n - 1, sums)
    return out_of_blocks((acc / total[..., None]).astype(q.dtype), q)


def attend_share_growing(
    q: jax.Array,
    keys: Slots,
    share: Share,
    *,
    cos: jax.Array,
    sin: jax.Array,
    rope: Rope,
    window: int | None,
) -> jax.Array:
    """`attend_growing` of this device's queries; cos and sin are of all slots.

    In a decode step they are those of its own.
    """
    axes = share.axes
    if share.own is not None:
        k, v = jax.tree.map(partial(stripes.whole, axes=axes), keys)
        see = partial(attend_growing, cos=cos, sin=sin, rope=rope, window=window)
        return see(q, k, v, at=share.slots())
    slots = share.slots()
    turn = partial(rotate, layout=rope.layout, precision=rope.precision)
    q = turn(q, *table(rope, slots, length=share.starts + 1))
    k = linear_in_head(partial(turn, cos=cos, sin=sin), keys[0], q.dtype)
    queries = Queries(slots=slots, segments=None, window=window)
    return one_query(q, k, keys[1], queries, axes=axes)
