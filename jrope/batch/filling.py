"""How prompts come into their slots: by pieces, each put where its row is, in place.

First pieces are computed one behind another in a line without padding, each by itself;
the others beside what the slot holds already, or what another slot holds of the same
prompt.  Where a draft guesses, each program has it read the piece as well.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.batch.reading import Piece, first_pieces, further_pieces, pieces_behind
from jrope.batch.slots import Asked, Slots, slots_specs
from jrope.generation.guesser import Draft, Guesser
from jrope.generation.past import PROMPT
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.flat import Flat
from jrope.model.llama import last_token
from jrope.model.placed import share_of
from jrope.sharding.axes import ONE, Axes
from jrope.sharding.meshes import Layout
from jrope.tree import Params


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
    guesser: Guesser | None = None,
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
      guesser: a draft reads the pieces as well, on no mesh.
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
    rows = piece.rows
    flat = Flat(lengths=piece.lengths, planned=planned, longest=longest)
    read = partial(first_pieces, piece=piece, flat=flat)
    x, slots = _with_guesser(read, params, slots, guesser, config=config, axes=axes)
    seen = slots.seen.at[rows].set(0, mode="drop")
    slots = _anew(replace(slots, seen=seen), rows, asked)
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
    guesser: Guesser | None = None,
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
    read = partial(further_pieces, piece=piece)
    x, slots = _with_guesser(read, params, slots, guesser, config=config, axes=axes)
    last = last_token(x, piece.lengths)
    return _entered(slots, piece, last, _owners(piece), axes)


@partial(jax.jit, static_argnames=("config",), donate_argnames=("slots",))
def share(
    params: Params,
    slots: Slots,
    piece: Piece,
    asked: Asked,
    sources: jax.Array,
    starts: jax.Array,
    guesser: Guesser | None = None,
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
      guesser: as in `begin`.
    """
    rows = piece.rows
    read = partial(pieces_behind, piece=piece, sources=sources, starts=starts)
    x, slots = _with_guesser(read, params, slots, guesser, config=config)
    seen = slots.seen.at[rows].set(slots.seen[sources], mode="drop")
    slots = _anew(replace(slots, seen=seen), rows, asked)
    return _entered(slots, piece, last_token(x, piece.lengths), _owners(piece), ONE)


def _with_guesser(
    read: Callable[..., tuple[jax.Array, KVCache]],
    params: Params,
    slots: Slots,
    guesser: Guesser | None,
    *,
    config: LlamaConfig,
    axes: Axes = ONE,
) -> tuple[jax.Array, Slots]:
    """A piece's hidden states, and the slots with it, for a draft as for the model.

    Args:
      read: one of `reading`, of (params, cache, *, config, axes).
      params, slots, guesser, config, axes: as in `begin`.
    """
    x, cache = read(params, slots.cache, config=config, axes=axes)
    slots = replace(slots, cache=cache)
    if not isinstance(guesser, Draft) or slots.draft is None:
        return x, slots
    _, cache = read(guesser.params, slots.draft, config=guesser.config)
    return x, replace(slots, draft=cache)


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
        seen=slots.seen.at[owners, ids].set(PROMPT, mode="drop"),
        live=slots.live.at[rows].set(piece.last, mode="drop"),
    )
