"""Programs of an engine, traced for shapes; what they take where nobody is there."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from jrope.batch.block import Guessing
from jrope.batch.compiling import on_device_of, platform_of
from jrope.batch.drafting import beside
from jrope.batch.filling import share
from jrope.batch.guessing import decode_guessing
from jrope.batch.reading import Piece
from jrope.batch.slots import (
    STOP_IDS,
    Asked,
    Slots,
    decode,
    empty,
    greedy,
    slots_specs,
)
from jrope.forms.rules import no_rules
from jrope.generation.guesser import Guesser
from jrope.generation.past import biases
from jrope.model.config import LlamaConfig
from jrope.model.int8_cache import CacheDtype
from jrope.sharding.meshes import Layout
from jrope.tree import Params

NOBODY = np.iinfo(np.int32).max  # instead of a slot, where a shape has rows to spare


def lower_decode(
    params: Params,
    config: LlamaConfig,
    *,
    slots: int,
    capacity: int,
    size: int,
    key: jax.Array,
    scored: bool,
    entries: int = 0,
    cache_dtype: CacheDtype | None = None,
    layout: Layout | None = None,
    speculate: Guesser | None = None,
) -> tuple[tuple[Any, ...], Any]:
    """What `decode` is called with beside the slots, for no row; and it, traced.

    Args:
      params, config, slots, capacity, size, key, cache_dtype, layout, speculate: as
        `compile_programs` takes them; rows with structures are not guessed.
      scored: whether rows may ask for log-probabilities.
      entries: of the tables, where rows may have structures.
    """
    given: Any = key, np.zeros(slots, bool), np.int32(0)
    state = no_slots(params, config, slots, capacity, layout, cache_dtype, speculate)
    how: dict[str, Any] = {"config": config, "size": size, "scored": scored}
    if speculate is not None and not entries:
        text = np.zeros((slots, capacity), np.int32)
        given = *given, speculate, text, not_yet()
        return given, decode_guessing.lower(params, state, *given, **how)
    if entries:
        given = *given, no_rules(slots, config.vocab_size, entries)
    return given, decode.lower(params, state, *given, **how, layout=layout)


def lower_share(
    params: Params,
    config: LlamaConfig,
    *,
    slots: int,
    capacity: int,
    behind: tuple[int, int],
    cache_dtype: CacheDtype | None = None,
    speculate: Guesser | None = None,
) -> Any:
    """`share` for pieces of (width, rows), traced."""
    state = no_slots(params, config, slots, capacity, None, cache_dtype, speculate)
    piece, asked, numbers = no_prompts(behind[1], behind[0])
    given = piece, asked, numbers, numbers, speculate
    return share.lower(params, state, *given, config=config)


def no_slots(
    params: Params,
    config: LlamaConfig,
    slots: int,
    capacity: int,
    layout: Layout | None,
    cache_dtype: CacheDtype | None,
    speculate: Guesser | None,
) -> Slots:
    """The shapes of so many slots, and where they stand: with the parameters."""
    dtype = params["model"]["norm"]["weight"].dtype
    how: dict[str, Any] = {"count": slots, "capacity": capacity, "dtype": dtype}
    how |= {"cache_dtype": cache_dtype, "draft": beside(speculate)}
    how |= {"platform": platform_of(params)}
    state = empty.eval_shape(config=config, layout=layout, **how)
    return standing(params, state, layout, slots_specs)


def standing(
    params: Params,
    shapes: Any,
    layout: Layout | None,
    specs: Callable[[Layout], Any],
) -> Any:
    """Shapes, and where what has them stands: with the parameters."""
    if layout is None:
        return on_device_of(params, shapes)
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)
    return layout.place(plain, specs(layout))


def no_prompts(
    rows: int, width: int, lines: int | None = None
) -> tuple[Piece, Asked, np.ndarray]:
    """What `enter` takes beside slots and line, for nobody; NumPy arrays to fill.

    The rows lie in so many lines of that width, as many in each; None: in one each.
    """
    zeros = partial(np.zeros, rows)
    piece: dict[str, Any] = {
        "rows": np.full(rows, NOBODY, np.int32),
        "tokens": np.zeros((lines or rows, width), np.int32),
        "lengths": zeros(np.int32),
        "last": zeros(bool),
    }
    asked: dict[str, Any] = {
        "seeds": zeros(np.uint32),
        "stop_ids": np.full((rows, STOP_IDS), -1, np.int32),
        "least": zeros(np.int32),
        "limits": zeros(np.int32),
        "bias": biases([{}] * rows),
    }
    return Piece(**piece), Asked(**asked, sampler=greedy(rows)), zeros(np.int32)


def not_yet() -> Guessing:
    """How guesses do before the first ones."""
    none: Any = np.int32(0)
    return Guessing(pause=none, caution=none, passes=none, rows=none)
