"""How prompts come into their slots: by pieces, each put where its row is, in place.

First pieces are computed one behind another in a line without padding, each by itself;
the others beside what the slot holds already, or what another slot holds of the same
prompt.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.batch.slots import Asked, Slots, slots_specs
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.flat import Flat
from jrope.model.llama import hidden_states, last_token
from jrope.model.placed import share_of
from jrope.model.rolling import position_of_slots
from jrope.sharding.axes import ONE, Axes
from jrope.sharding.meshes import Layout
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


@partial(
    jax.jit,
    static_argnames=("config", "longest", "axes", "layout"),
    donate_argnames=("slots",),
)
def begin(
    params: Params,
    slots: Slots,
    piece: Piece,
    asked: Asked,
    planned: jax.Array,
    *,
    config: LlamaConfig,
    longest: int,
    axes: Axes = ONE,
    layout: Layout | None = None,
) -> Slots:
    """Put the first pieces of R prompts into their slots.

    Args:
      params, config: the model.
      slots: those that go on.
      piece: the first pieces.
      asked: what the R rows ask for.
      planned: int32 [R], each row's prompt and all of its new tokens.
      longest: what no piece exceeds.
      axes, layout: as in `decode`.
    """
    if layout is not None:
        how: Any = {"config": share_of(config, layout), "axes": layout.axes}
        how |= {"longest": longest}
        specs, rows = slots_specs(layout), layout.rows()
        given = layout.params(params), specs, rows, rows, rows
        run = layout.map(partial(begin, **how), given, specs)
        return run(params, slots, piece, asked, planned)
    rows, cache = piece.rows, slots.cache
    flat = Flat(lengths=piece.lengths, planned=planned, longest=longest)
    x, new = hidden_states(
        params,
        piece.tokens,
        config=config,
        flat=flat,
        cache_dtype=cache.cache_dtype,
        axes=axes,
    )
    seen = slots.seen.at[rows].set(False, mode="drop")
    cache = _written(cache, rows, new, partial(_put_flat, rows=rows, flat=flat))
    slots = _anew(replace(slots, cache=cache, seen=seen), rows, asked)
    last = x[0].at[jnp.cumsum(piece.lengths) - 1].get(mode="clip")
    line, _ = flat.places(x.shape[1])
    owners = rows.at[line].get(mode="fill", fill_value=len(slots.live))
    return _entered(slots, piece, last, owners[None, :], axes)


@partial(
    jax.jit, static_argnames=("config", "axes", "layout"), donate_argnames=("slots",)
)
def extend(
    params: Params,
    slots: Slots,
    piece: Piece,
    *,
    config: LlamaConfig,
    axes: Axes = ONE,
    layout: Layout | None = None,
) -> Slots:
    """Go on with prompts that are in their slots already; every row has one."""
    if layout is not None:
        how = {"config": share_of(config, layout), "axes": layout.axes}
        specs = slots_specs(layout)
        given = layout.params(params), specs, layout.rows()
        return layout.map(partial(extend, **how), given, specs)(params, slots, piece)
    rows, cache = piece.rows, slots.cache
    own = jax.tree.map(lambda x: x.at[rows].get(mode="clip"), cache)
    x, new = hidden_states(
        params,
        piece.tokens,
        cache=own,
        lengths=piece.lengths,
        config=config,
        axes=axes,
    )
    steps = jnp.arange(piece.tokens.shape[1], dtype=jnp.int32)[None, :]
    at = own.lengths[:, None] + steps

    def put(all_: jax.Array, new: jax.Array) -> jax.Array:
        if all_.shape[1] in (config.windows or ()):  # slots that go round
            return _put(all_, rows, jnp.zeros_like(rows), new)
        tokens = jnp.take_along_axis(new, at[:, :, None, None], axis=1)
        return _put(all_, rows, own.lengths, tokens)

    cache = _written(cache, rows, new, put)
    last = last_token(x, piece.lengths)
    return _entered(replace(slots, cache=cache), piece, last, _owners(piece), axes)


@partial(jax.jit, static_argnames=("config",), donate_argnames=("slots",))
def share(
    params: Params,
    slots: Slots,
    piece: Piece,
    asked: Asked,
    sources: jax.Array,
    starts: jax.Array,
    *,
    config: LlamaConfig,
) -> Slots:
    """Go on with prompts of which other slots hold the first tokens, which are copied.

    Args:
      params, config: the model.
      slots: those that go on.
      piece: the pieces that follow.
      asked: what the R rows ask for.
      sources: int32 [R], the slots that hold what comes before; maybe the rows' own.
      starts: int32 [R], how many tokens that is.
    """
    rows, cache = piece.rows, slots.cache
    own = replace(jax.tree.map(lambda x: x[sources], cache), lengths=starts)
    x, new = hidden_states(
        params, piece.tokens, cache=own, lengths=piece.lengths, config=config
    )
    put = partial(_put, rows=rows, starts=jnp.zeros_like(rows))
    cache = _written(cache, rows, new, put)
    seen = slots.seen.at[rows].set(slots.seen[sources], mode="drop")
    slots = _anew(replace(slots, cache=cache, seen=seen), rows, asked)
    return _entered(slots, piece, last_token(x, piece.lengths), _owners(piece), ONE)


def _written(
    cache: KVCache, rows: jax.Array, new: KVCache, put: Callable[..., jax.Array]
) -> KVCache:
    """The cache with what new rows hold, each array `put` by itself."""
    return KVCache(
        keys=jax.tree.map(lambda x, own: put(x, new=own), cache.keys, new.keys),
        values=jax.tree.map(lambda x, own: put(x, new=own), cache.values, new.values),
        lengths=cache.lengths.at[rows].set(new.lengths, mode="drop"),
        rope_lengths=cache.rope_lengths.at[rows].set(new.rope_lengths, mode="drop"),
    )


def _anew(slots: Slots, rows: jax.Array, asked: Asked) -> Slots:
    """The slots with nothing drawn yet in some rows, and with what these ask for."""

    def put(all_: jax.Array, own: jax.Array | bool | int) -> jax.Array:
        return all_.at[rows].set(own, mode="drop")

    return replace(
        slots,
        finite=put(slots.finite, True),
        steps=put(slots.steps, 0),
        asked=jax.tree.map(put, slots.asked, asked),
    )


@jax.jit  # traced once, not for every layer's keys and values
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
def _put_flat(
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


def _owners(piece: Piece) -> jax.Array:
    """The slot of every valid token [R, T], past the last one elsewhere."""
    steps = jnp.arange(piece.tokens.shape[1], dtype=jnp.int32)[None, :]
    nobody = np.iinfo(np.int32).max
    return jnp.where(steps < piece.lengths[:, None], piece.rows[:, None], nobody)


def _entered(
    slots: Slots, piece: Piece, last: jax.Array, owners: jax.Array, axes: Axes
) -> Slots:
    """What a piece leaves besides the cache.

    Args:
      slots, piece, axes: those of it.
      last: [R, D], the hidden states of each row's last token.
      owners: int32, the slots of `piece.tokens`; from B on, a token is nobody's.
    """
    rows, ids = piece.rows, axes.local_ids(piece.tokens, slots.seen.shape[1])
    return replace(
        slots,
        hidden=slots.hidden.at[rows].set(last, mode="drop"),
        seen=slots.seen.at[owners, ids].set(True, mode="drop"),
        live=slots.live.at[rows].set(piece.last, mode="drop"),
    )
