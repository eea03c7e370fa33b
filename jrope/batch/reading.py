"""Pieces of prompts through a model, and into its cache, in place."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jrope.model.cache import KVCache, held
from jrope.model.config import LlamaConfig
from jrope.model.flat import Flat
from jrope.model.int8_cache import Keys
from jrope.model.llama import hidden_states
from jrope.model.rolling import position_of_slots
from jrope.sharding.axes import ONE, Axes
from jrope.tree import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Piece:
    """A piece of the prompts of R rows.

    Where a mesh splits the slots, each group of devices has as many rows as the others,
    for slots of its own, which are counted from its first one.
    """

    rows: jax.Array  # int32 [R], their slots; from B on there is no such row
    tokens: jax.Array  # int32 [R, T]; of first pieces a line for each group, [G, N]
    lengths: jax.Array  # int32 [R], valid tokens; in a line, those of 0 come last
    last: jax.Array  # bool [R], whether the prompt ends here


def further_pieces(
    params: Params,
    cache: KVCache,
    *,
    piece: Piece,
    config: LlamaConfig,
    axes: Axes = ONE,
) -> tuple[jax.Array, KVCache]:
    """Pieces behind what their own slots hold."""
    rows = piece.rows
    own = jax.tree.map(partial(_rows_of, rows=rows), cache)
    how: dict[str, Any] = {"lengths": piece.lengths, "config": config, "axes": axes}
    x, new = hidden_states(params, piece.tokens, cache=own, **how)
    steps = jnp.arange(piece.tokens.shape[1], dtype=jnp.int32)[None, :]
    at = own.lengths[:, None] + steps

    def put(all_: jax.Array, new: jax.Array) -> jax.Array:
        if all_.shape[1] in (config.windows or ()):  # slots that go round
            return _put(all_, rows, jnp.zeros_like(rows), new)
        return _put(all_, rows, own.lengths, _tokens_of(new, at))

    return x, written(cache, rows, new, put)


def pieces_behind(
    params: Params,
    cache: KVCache,
    *,
    piece: Piece,
    sources: jax.Array,
    starts: jax.Array,
    config: LlamaConfig,
    axes: Axes = ONE,
) -> tuple[jax.Array, KVCache]:
    """Pieces behind copies of what other slots hold."""
    own = replace(jax.tree.map(lambda x: x[sources], cache), lengths=starts)
    how: dict[str, Any] = {"lengths": piece.lengths, "config": config, "axes": axes}
    x, new = hidden_states(params, piece.tokens, cache=own, **how)
    put = partial(_put, rows=piece.rows, starts=jnp.zeros_like(piece.rows))
    return x, written(cache, piece.rows, new, put)


def written(
    cache: KVCache, rows: jax.Array, new: KVCache, put: Callable[..., jax.Array]
) -> KVCache:
    """The cache [B, ...] with what new rows hold, each array `put` by itself."""

    def each(slots: Keys, new: Keys) -> Keys:
        return jax.tree.map(lambda x, own: put(x, new=own), slots, held(new, slots))

    return KVCache(
        keys=tuple(map(each, cache.keys, new.keys)),
        values=tuple(map(each, cache.values, new.values)),
        lengths=cache.lengths.at[rows].set(new.lengths, mode="drop"),
        rope_lengths=cache.rope_lengths.at[rows].set(new.rope_lengths, mode="drop"),
    )


# These are traced once, not for every layer's keys and values.
@jax.jit
def _rows_of(x: jax.Array, rows: jax.Array) -> jax.Array:
    """Some rows of x [B, ...]: [R, ...]."""
    return x.at[rows].get(mode="clip")


@jax.jit
def _tokens_of(x: jax.Array, at: jax.Array) -> jax.Array:
    """Some tokens of each row, [R, S, K, H] and int32 [R, T]: [R, T, K, H]."""
    return jnp.take_along_axis(x, at[:, :, None, None], axis=1)


@jax.jit
def _put(
    slots: jax.Array, rows: jax.Array, starts: jax.Array, new: jax.Array
) -> jax.Array:
    """Slots [B, S, K, H] with new ones [R, T, K, H] in some rows, from `starts` on."""

    def at_once(slots: jax.Array, new: jax.Array) -> jax.Array:
        steps = jnp.arange(new.shape[1], dtype=jnp.int32)[None, :]
        return slots.at[rows[:, None], starts[:, None] + steps].set(new, mode="drop")

    def one_by_one(slots: jax.Array, new: jax.Array) -> jax.Array:
        zero = jnp.zeros((), jnp.int32)
        for i in range(new.shape[0]):
            own, at = new[i : i + 1], (rows[i], starts[i], zero, zero)
            old = jax.lax.dynamic_slice(slots, at, own.shape)
            own = jnp.where(rows[i] < slots.shape[0], own, old)
            slots = jax.lax.dynamic_update_slice(slots, own, at)
        return slots

    # A CPU would widen all slots of a 16-bit cache to scatter into them.
    how = {"cpu": one_by_one, "default": at_once}
    return jax.lax.platform_dependent(slots, new, **how)


@jax.jit
def put_flat(
    slots: jax.Array, rows: jax.Array, flat: Flat, new: jax.Array
) -> jax.Array:
    """Slots [B, S, K, H] with the line [1, N, K, H] of some rows, from their start on.

    Where a row has more tokens than slots, which go round, the last ones stay.
    """
    size = slots.shape[1]

    def at_once(slots: jax.Array, new: jax.Array) -> jax.Array:
        line, at = flat.places(new.shape[1])
        lengths, places = (
            x.at[line].get(mode="fill", fill_value=none)
            for x, none in ((flat.lengths, 0), (rows, slots.shape[0]))
        )
        places = jnp.where(at >= lengths - size, places, slots.shape[0])
        return slots.at[places, at % size].set(new[0], mode="drop")

    def one_by_one(slots: jax.Array, new: jax.Array) -> jax.Array:
        starts, count = flat.starts, min(size, flat.longest)

        def put(i: jax.Array, slots: jax.Array) -> jax.Array:
            at = position_of_slots(flat.lengths[i][None], size)[0, :count]
            own = new[0].at[starts[i] + jnp.maximum(at, 0)].get(mode="clip")
            own = jnp.where(at[:, None, None] < 0, jnp.zeros((), own.dtype), own)
            return jax.lax.dynamic_update_slice(slots, own[None], (rows[i], 0, 0, 0))

        return jax.lax.fori_loop(0, flat.count, put, slots)

    how = {"cpu": one_by_one, "default": at_once}  # as in `_put`
    return jax.lax.platform_dependent(slots, new, **how)
