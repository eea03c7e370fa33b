"""What a pass over tokens is given: checked, and the rotary table for it."""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jrope.errors import JropeError
from jrope.model.cache import KVCache, per_row
from jrope.model.config import LlamaConfig
from jrope.model.context import Share
from jrope.model.flat import Flat
from jrope.model.growing import slot_table
from jrope.model.layers import Step, local_table
from jrope.numerics import computed_once
from jrope.rope import LongRope, table
from jrope.rope.frequencies import Length
from jrope.sharding import stripes
from jrope.sharding.axes import ONE, Axes
from jrope.tree import Params

PAD_RIGHT = "pad rows on the right and give lengths, mask.sum(axis=1)"
_REMEDIES = {  # arguments of other libraries' models -> what to give here
    "attention_mask": PAD_RIGHT,
    "input_ids": "give them as tokens",
    "position_ids": "give them as positions",
    "past_key_values": "give what an earlier call returned as cache",
}


def refuse_unknown(
    function: str, unknown: Mapping[str, Any], remedies: Mapping[str, str] = _REMEDIES
) -> None:
    """Raise a JropeError that names arguments which `function` does not take."""
    if unknown:
        hints = [f"{n} ({remedies[n]})" if n in remedies else n for n in unknown]
        raise JropeError(f"{function} has no argument {', '.join(hints)}")


def check_params(params: Params) -> None:
    """Raise a JropeError unless this looks like a parameter tree."""
    if not isinstance(params, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        got = f"a {type(params).__name__}"
        raise JropeError(
            f"params: got {got}, want a tree; give what `load` returns first"
        )
    if "model" not in params:
        inside = "params" in params
        hint = 'give tree["params"]' if inside else "give what `load` returns first"
        raise JropeError(f"params: got a tree of {[*params][:5]}, want 'model'; {hint}")


def integer_array(name: str, value: Any, wanted: str) -> jax.Array:
    """A NumPy or JAX array of integers as a JAX array, or a JropeError."""
    if not isinstance(value, jax.Array | np.ndarray):
        torch = type(value).__module__.startswith("torch")
        hint = f"{name}.numpy()" if torch else f"jnp.asarray({name})"
        got = f"a {'torch ' if torch else ''}{type(value).__name__}"
        raise JropeError(f"{name}: got {got}, want {wanted}; give {hint}")
    if not jnp.issubdtype(value.dtype, jnp.integer):
        got = f"{value.dtype} {list(value.shape)}"
        raise JropeError(f"{name}: got {got}, want {wanted}")
    return jnp.asarray(value)


def check_inputs(
    params: Params,
    tokens: ArrayLike,
    positions: ArrayLike | None,
    cache: KVCache | None,
    capacity: int | None,
    segment_ids: ArrayLike | None,
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """Tokens, positions and segments of `forward` as arrays [B, T]; see there.

    Raises:
      JropeError: types, shapes, or two arguments that exclude each other.
    """
    check_params(params)
    tokens = integer_array("tokens", tokens, "integers [B, T]")
    if tokens.ndim != 2:
        hint = "; a single row is tokens[None]" if tokens.ndim == 1 else ""
        got = f"{tokens.dtype} {list(tokens.shape)}"
        raise JropeError(f"tokens: got {got}, want integers [B, T]{hint}")
    positions = _like_tokens("positions", positions, tokens)
    segments = _like_tokens("segment_ids", segment_ids, tokens)
    if cache is not None and capacity is not None:
        raise JropeError("capacity: the given cache already has one; give only one")
    if capacity is not None and tokens.shape[1] > capacity:
        wanted = f"at least T = {tokens.shape[1]}"
        raise JropeError(f"capacity: got {capacity}, want {wanted}")
    if segments is not None and cache is not None:
        hint = "leave out one of them: a cache holds one sequence a row"
        raise JropeError(f"segment_ids: got a cache, too; {hint}")
    return tokens, positions, segments


def _like_tokens(
    name: str, value: ArrayLike | None, tokens: jax.Array
) -> jax.Array | None:
    if value is None:
        return None
    array = integer_array(name, value, "integers [B, T]")
    if array.shape != tokens.shape:
        alike = array.shape == tokens.shape[1:]
        hint = f"; {name}[None] repeated for each row" if alike else ""
        wanted = f"those of tokens, {list(tokens.shape)}"
        raise JropeError(f"{name}: got shape {list(array.shape)}, want {wanted}{hint}")
    return array


def segment_positions(segments: jax.Array) -> jax.Array:
    """Positions that begin anew with each segment: int32 [B, T]."""
    steps = jnp.arange(segments.shape[1], dtype=jnp.int32)[None, :]
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    return steps - jax.lax.cummax(jnp.where(begins, steps, 0), axis=1)


def check_segment_rope(config: LlamaConfig, rope_lengths: ArrayLike | None) -> None:
    """Raise a JropeError where a row's segments would need tables of their own."""
    rope = config.rope
    if rope.needs_length and (rope.lengths != "planned" or rope_lengths is None):
        method = type(rope.scaling).__name__
        raise JropeError(
            f"segment_ids: the frequencies of {method} depend on each sequence's "
            "length; give rope_lengths, one for a whole row, with planned lengths"
        )


def rotary_table(
    config: LlamaConfig,
    tokens: jax.Array,
    positions: jax.Array | None,
    cache: KVCache | None,
    lengths: ArrayLike | None,
    rope_lengths: ArrayLike | None,
    capacity: int | None,
    axes: Axes = ONE,
    share: Share | None = None,
) -> tuple[Step, ArrayLike]:
    """cos, sin [B, T, R], once for all layers, and the lengths they were made for.

    For growing lengths of the slots, [B, S, R]: see `growing.attend_growing`.
    With a share, of its tokens.
    """
    batch, count = tokens.shape
    counted, rule = positions is None, config.rope.lengths
    if not counted and rule == "growing":
        hint = "keys are rotated for their slots, whenever they are looked at"
        raise JropeError(f"positions: growing lengths take none ({hint}); leave it out")
    if positions is None:
        steps = jnp.arange(count, dtype=jnp.int32)[None, :]
        first = jnp.zeros(batch, jnp.int32) if cache is None else cache.lengths
        positions = first[:, None] + steps
    if rule == "hf":
        rope_lengths = _remembered(config, positions, cache, lengths, axes)
    elif rope_lengths is None:
        if cache is not None:
            rope_lengths = cache.rope_lengths
        elif capacity is not None:
            rope_lengths = capacity
        elif counted:
            rope_lengths = count if lengths is None else per_row(lengths, batch)
        else:
            rope_lengths = jnp.max(positions, axis=1).astype(jnp.int32) + 1
    with jax.named_scope("rope"):
        if rule == "growing":
            slots = cache.capacity if cache is not None else capacity or count
            if cache is not None and count == 1:
                newest = cache.lengths + 1
                cos, sin = slot_table(config.rope, slots, newest, axes)
            else:
                slots *= stripes.count(axes) if cache is not None else 1
                cos, sin = slot_table(config.rope, stripes.padded(slots, axes))
        else:
            positions = positions if share is None else share.take(positions)
            cos, sin = table(config.rope, positions, length=cast(Length, rope_lengths))
        local = local_table(config, positions)
    cos, sin, local = computed_once((cos, sin, local))
    return Step(cos=cos, sin=sin, local=local), rope_lengths


def flat_table(config: LlamaConfig, flat: Flat, count: int) -> Step:
    """`rotary_table` of the tokens of a line, each by its row's: cos, sin [1, N, R].

    For growing lengths of the slots of any row: [1, longest, R].
    """
    rows, positions = flat.places(count)
    positions, length = positions[:, None], flat.planned.at[rows].get(mode="clip")
    with jax.named_scope("rope"):  # as of N rows of one token
        tables = table(config.rope, positions, length=length)
        tables = tables, local_table(config, positions)
        (cos, sin), local = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tables)
        if config.rope.lengths == "growing":
            cos, sin = slot_table(config.rope, flat.longest)
    cos, sin, local = computed_once((cos, sin, local))
    return Step(cos=cos, sin=sin, local=local, flat=flat)


def _remembered(
    config: LlamaConfig,
    positions: jax.Array,
    cache: KVCache | None,
    lengths: ArrayLike | None,
    axes: Axes,
) -> jax.Array:
    """The length that transformers' module computes this pass with, and remembers.

    n is the largest position of the whole batch + 1.  Dynamic NTK takes the largest n
    so far, forgotten when a pass stays strictly below the trained length; longrope this
    pass's own.  Source: `dynamic_rope_update` of transformers 5.23.
    """
    batch, count = positions.shape
    if lengths is not None:
        valid = jnp.arange(count)[None, :] < per_row(lengths, batch)[:, None]
        positions = jnp.where(valid, positions, 0)
    newest = axes.largest_of_rows(jnp.max(positions)) + 1
    trained = config.rope.trained_length or 0
    if cache is None or isinstance(config.rope.scaling, LongRope):
        return per_row(jnp.maximum(newest, trained), batch)
    known = axes.largest_of_rows(jnp.max(cache.rope_lengths))
    reset = (newest < trained) & (known > trained)
    return per_row(jnp.where(reset, trained, jnp.maximum(newest, known)), batch)
