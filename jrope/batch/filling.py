"""How prompts come into their slots: by pieces, each put where its row is, in place.

First pieces are read one behind another in a line without padding, each by itself and
before slots are free for them; the others beside what the slot holds already, or what
another slot holds of the same prompt.  Where a draft guesses, it reads the pieces, too.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jrope.batch.reading import (
    Piece,
    further_pieces,
    pieces_behind,
    put_flat,
    written,
)
from jrope.batch.slots import Asked, Slots, slots_specs
from jrope.generation.guesser import Draft, Guesser
from jrope.generation.past import PROMPT
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.flat import Flat
from jrope.model.int8_cache import CacheDtype
from jrope.model.llama import hidden_states, last_token
from jrope.model.placed import cache_specs, share_of
from jrope.sharding.axes import ONE, Axes
from jrope.sharding.meshes import Layout
from jrope.tree import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Line:
    """First pieces as the model has read them, which no slots hold yet."""

    cache: KVCache  # [G, N, K, H] in each layer, rows one behind another
    draft: KVCache | None  # of the model that guesses, if one does
    last: jax.Array  # [R, D], of each row's last token


def line_specs(layout: Layout) -> Any:
    """How a `Line` is split: each group of devices has one."""
    last: Any = layout.rows()
    return Line(cache=cache_specs(layout), draft=None, last=last)


@partial(
    jax.jit, static_argnames=("config", "longest", "cache_dtype", "axes", "layout")
)
def read(
    params: Params,
    piece: Piece,
    planned: jax.Array,
    guesser: Guesser | None = None,
    *,
    config: LlamaConfig,
    longest: int,
    cache_dtype: CacheDtype | None = None,
    axes: Axes = ONE,
    layout: Layout | None = None,
) -> Line:
    """Read the first pieces of R prompts, before any slots are free for them.

    Args:
      params, config: the model.
      piece: the first pieces; in which slots they will be does not matter.
      planned: int32 [R], each row's prompt and all of its new tokens.
      guesser: a draft reads the pieces as well, on no mesh.
      longest: what no piece exceeds.
      cache_dtype: of the slots.
      axes, layout: as in `decode`.
    """
    if layout is not None:
        how: Any = {"config": share_of(config, layout), "axes": layout.axes}
        how |= {"longest": longest, "cache_dtype": cache_dtype}
        given = layout.params(params), layout.rows(), layout.rows()
        run = layout.map(partial(read, **how), given, line_specs(layout))
        return run(params, piece, planned)
    flat = Flat(lengths=piece.lengths, planned=planned, longest=longest)
    how = {"flat": flat, "cache_dtype": cache_dtype}
    x, cache = hidden_states(params, piece.tokens, config=config, axes=axes, **how)
    draft = None
    if isinstance(guesser, Draft):
        how["config"] = guesser.config
        _, draft = hidden_states(guesser.params, piece.tokens, **how)
    last = x[0].at[jnp.cumsum(piece.lengths) - 1].get(mode="clip")
    return Line(cache=cache, draft=draft, last=last)


@partial(
    jax.jit,
    static_argnames=("longest", "axes", "layout"),
    donate_argnames=("slots",),
)
def enter(
    slots: Slots,
    line: Line,
    piece: Piece,
    asked: Asked,
    planned: jax.Array,
    *,
    longest: int,
    axes: Axes = ONE,
    layout: Layout | None = None,
) -> Slots:
    """Put what was read of R prompts into their slots.

    Args:
      slots: those that go on.
      line: what `read` gave for the piece.
      piece, planned, longest: as there, now with the rows' slots.
      asked: what the rows ask for.
      axes, layout: as in `decode`.
    """
    if layout is not None:
        how: Any = {"axes": layout.axes, "longest": longest}
        specs, rows = slots_specs(layout), layout.rows()
        given = specs, line_specs(layout), rows, rows, rows
        run = layout.map(partial(enter, **how), given, specs)
        return run(slots, line, piece, asked, planned)
    rows = piece.rows
    flat = Flat(lengths=piece.lengths, planned=planned, longest=longest)
    put = partial(put_flat, rows=rows, flat=flat)
    cache, draft = written(slots.cache, rows, line.cache, put), slots.draft
    if draft is not None and line.draft is not None:
        draft = written(draft, rows, line.draft, put)
    seen = slots.seen.at[rows].set(0, mode="drop")
    slots = replace(slots, cache=cache, draft=draft, seen=seen)
    row, _ = flat.places(piece.tokens.shape[1])
    owners = rows.at[row].get(mode="fill", fill_value=len(slots.live))
    slots = _anew(slots, rows, asked)
    return _entered(slots, piece, line.last, owners[None, :], axes)


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
      guesser: as in `read`.
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
      params, slots, guesser, config, axes: as in `read`.
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
