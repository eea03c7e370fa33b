"""The programs of an engine, compiled before its first row."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import jax
import numpy as np
from jax.stages import Compiled, Lowered

from jrope.batch.compiling import compiling, platform_of
from jrope.batch.drafting import beside
from jrope.batch.filling import enter, extend, line_specs, read
from jrope.batch.lowering import lower_decode, no_prompts, no_slots, standing
from jrope.batch.packing import Shapes
from jrope.batch.slots import clean, empty
from jrope.generation.ahead import side_by_side
from jrope.generation.guesser import Guesser
from jrope.model.config import LlamaConfig
from jrope.model.int8_cache import CacheDtype
from jrope.sharding.meshes import Layout
from jrope.tree import Params

Ruled: TypeAlias = tuple[bool, int]  # with log-probabilities? entries of its tables


@final
@dataclass(frozen=True, kw_only=True)
class Programs:
    """Compiled functions of `slots` and `filling`, called with what is traced there.

    Args:
      empty, extend, clean: those of that name.
      read, enter: length -> the programs for first pieces of at most that.
      decode: without log-probabilities, and maybe with them.  With `speculate` these
        are those of `guessing`, called with the rows' text and a `Guessing` last.
      ruled: `decode` where some rows have structures, called with `Rules` last, for
        tables of so many entries.
      share: (width, rows) -> the program for pieces behind prefixes, once it is there.
      seconds: until they were compiled.
      layout: where the model stands; None: on no mesh.
      speculate: what guesses, if anything.
    """

    empty: Any
    extend: Any
    clean: Any
    read: Mapping[int, Any]
    enter: Mapping[int, Any]
    decode: Mapping[bool, Any]
    ruled: dict[Ruled, Any]
    share: dict[tuple[int, int], Any]
    seconds: float
    layout: Layout | None
    speculate: Guesser | None


def decodings(logprobs: bool, entries: int = 0) -> list[Ruled]:
    """The ways to decode with tables of so many entries, or without structures."""
    return [(scored, entries) for scored in (False, True)[: 1 + logprobs]]


def names(
    shapes: Shapes,
    logprobs: bool,
    guesses: bool = False,
    ruled: Iterable[Ruled] = (),
    share: Iterable[tuple[int, int]] = (),
) -> tuple[str, ...]:
    """What `compile_programs` compiles, one name a program."""
    first = [
        f"first pieces up to {longest}, {shapes.groups} x {width}"
        for longest, width in shapes.first.items()
    ]
    plain = "decode", "decode with log-probabilities"
    guessing = "decode with guesses", "decode with guesses and log-probabilities"
    decoding = guessing if guesses else plain
    ways = [f"{plain[scored]}, structures of {size:,}" for scored, size in ruled]
    first += [f"{one}, entering" for one in first]
    further = [f"further pieces {shapes.groups} x {shapes.piece}"]
    further += [f"pieces behind a prefix {rows} x {width}" for width, rows in share]
    return *decoding[: 1 + logprobs], *ways, *first, *further, "empty", "clean"


def compile_programs(
    params: Params,
    config: LlamaConfig,
    shapes: Shapes,
    *,
    slots: int,
    capacity: int,
    cache_dtype: CacheDtype | None = None,
    size: int,
    key: jax.Array,
    logprobs: bool,
    ruled: Iterable[Ruled] = (),
    warm: bool,
    layout: Layout | None = None,
    speculate: Guesser | None = None,
) -> Programs:
    """Compile everything, side by side.

    Args:
      params, config: the model.
      shapes: of prompts.
      slots, capacity, cache_dtype: of the cache.
      size: steps of a chunk of decoding.
      key: such as tokens will be drawn with.
      logprobs: whether rows may ask for them.
      ruled: programs for rows with structures.
      warm: whether to run each program once, for no row: the first run on a GPU sets
        it up, for 0.2 s each (jax 0.11, H100), which rows would wait for.
      layout: where the parameters stand, if on a mesh.
      speculate: what guesses, if anything.
    """
    started = time.perf_counter()
    same: dict[str, Any] = {"slots": slots, "capacity": capacity, "layout": layout}
    same |= {"cache_dtype": cache_dtype, "speculate": speculate}
    state = no_slots(params, config, **same)
    same |= {"size": size, "key": key}
    how: dict[str, Any] = {"config": config, "layout": layout}
    fresh = {"count": slots, "capacity": capacity, "dtype": state.hidden.dtype}
    fresh |= {"cache_dtype": cache_dtype, "draft": beside(speculate)}
    fresh |= {"platform": platform_of(params)}
    ways = [*decodings(logprobs), *ruled]
    nobody = dict[Any, tuple[Any, ...]]()

    def made(lowered: Lowered, tokens: int = 0) -> Callable[[], Compiled]:
        return compiling(lowered, params, tokens, layout, speculate)

    def traced() -> Iterator[tuple[Any, Any]]:
        yield "empty", made(empty.lower(**how, **fresh))
        for scored, entries in ways:
            nobody[scored, entries], own = lower_decode(
                params, config, **same, scored=scored, entries=entries
            )
            yield (scored, entries), made(own, slots)
        for longest, width in list(shapes.first.items())[::-1]:
            given = no_prompts(shapes.groups * shapes.rows, width, shapes.groups)
            piece, _, planned = given
            nobody["read", longest] = piece, planned, speculate
            own = read.lower(
                params,
                *nobody["read", longest],
                longest=longest,
                **how,
                cache_dtype=cache_dtype,
            )
            yield ("read", longest), made(own, width)
            line = standing(params, own.out_info, layout, line_specs)
            nobody["enter", longest] = given
            own = enter.lower(state, line, *given, longest=longest, layout=layout)
            yield ("enter", longest), made(own)
        piece, *_ = no_prompts(shapes.groups, shapes.piece)
        given = nobody["extend"] = piece, speculate
        own = extend.lower(params, state, *given, **how)
        yield "extend", made(own, shapes.piece)
        own = clean.lower(state, np.zeros(slots, bool), layout=layout)
        yield "clean", made(own)

    done = side_by_side(traced())
    if warm:
        _run_once(done, params, nobody)
    return Programs(
        share={},
        read={longest: done["read", longest] for longest in shapes.first},
        enter={longest: done["enter", longest] for longest in shapes.first},
        decode={scored: done[scored, 0] for scored, entries in ways if not entries},
        ruled={way: done[way] for way in ways if way[1]},
        **{name: done[name] for name in ("empty", "extend", "clean")},
        seconds=time.perf_counter() - started,
        layout=layout,
        speculate=speculate,
    )


def _run_once(
    programs: Mapping[Any, Any], params: Params, nobody: Mapping[Any, tuple[Any, ...]]
) -> None:
    """Run what computes, for no row, in slots that are then dropped."""
    slots, line = programs["empty"](), None
    for (name, given), program in ((one, programs[one[0]]) for one in nobody.items()):
        kind = name[0]
        if kind == "read":
            line = program(params, *given)
        elif kind == "enter":
            slots = program(slots, line, *given)
        else:
            found = program(params, slots, *given)
            slots = found[0] if isinstance(found, tuple) else found
    jax.block_until_ready(slots)
