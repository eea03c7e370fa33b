"""The slots of an engine, all on the device, and how their rows are decoded.

`decode` goes on with every live row until enough of them have finished; how rows enter
is in `filling`.  Shapes never change: rows carry their own step, limit, stop ids, seed
and sampler.
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jrope.batch.block import Block, blank, block_specs, recorded
from jrope.forms.rules import Rules, after, allowed, rules_specs
from jrope.generation.loop import draw
from jrope.generation.past import Bias, Past, add_seen, biases
from jrope.generation.sample import Sampler
from jrope.model.cache import KVCache, in_bits
from jrope.model.config import LlamaConfig
from jrope.model.int8_cache import CacheDtype
from jrope.model.llama import hidden_states, unembed
from jrope.model.placed import cache_specs, logit_specs, share_of
from jrope.sharding.axes import ONE, Axes
from jrope.sharding.meshes import Layout
from jrope.tree import Params

STOP_IDS = 16  # of a row, at most


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every row asks for."""

    sampler: Sampler  # of arrays [B]
    seeds: jax.Array  # uint32 [B]
    stop_ids: jax.Array  # int32 [B, STOP_IDS], -1 where unused
    least: jax.Array  # int32 [B], new tokens before one of these
    limits: jax.Array  # int32 [B], new tokens at most
    bias: Bias


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Slots:
    """Rows in their slots; a slot without a live row is empty, or still being filled.

    Its next token is written into the cache at `cache.lengths`, where whoever fills the
    slot goes on, so that what a row that is not live writes there is never seen.  Where
    slots go round that is the place of the oldest token, which no later one sees.
    """

    cache: KVCache
    draft: KVCache | None  # of the model that guesses, if one does: see `drafting`
    hidden: jax.Array  # [B, D] of the newest token, which the next is drawn from
    seen: jax.Array  # int32 [B, V], for penalties, see `Past`
    live: jax.Array  # bool [B]
    finite: jax.Array  # bool [B], no logit so far was NaN or infinite
    steps: jax.Array  # int32 [B], tokens drawn so far
    asked: Asked


def slots_specs(layout: Layout) -> Any:
    """How `Slots` are split: each device has slots of its own, and heads."""
    rows: Any = dict.fromkeys([f.name for f in fields(Slots)], layout.rows())
    own = {"cache": cache_specs(layout), "seen": logit_specs(layout, 2), "draft": None}
    return Slots(**rows | own)


def greedy(count: int) -> Sampler:
    """A sampler of NumPy arrays, one number a row."""
    kinds = {"top_k": np.int32}
    columns = {
        f.name: np.full(count, f.default, kinds.get(f.name, np.float32))
        for f in fields(Sampler)
    }
    return Sampler(**columns)


@partial(
    jax.jit,
    static_argnames=(
        *("config", "count", "capacity", "dtype", "cache_dtype"),
        *("layout", "draft", "platform"),
    ),
)
def empty(
    *,
    config: LlamaConfig,
    count: int,
    capacity: int,
    dtype: DTypeLike,
    cache_dtype: CacheDtype | None = None,
    layout: Layout | None = None,
    draft: tuple[LlamaConfig, Any] | None = None,
    platform: str | None = None,
) -> Slots:
    """So many slots with nobody in them, on a mesh that divides them or on none.

    With a `draft`, its configuration and dtype, they have a cache for it, too.  A CPU
    holds 16 bits in a way of its own; `platform` None is that of this machine.
    """
    platform = platform or jax.default_backend()
    if layout is not None:
        own = count // layout.size(layout.axes.batch)
        how = {"config": share_of(config, layout), "count": own, "dtype": dtype}
        how |= {"capacity": capacity, "cache_dtype": cache_dtype}
        share = partial(empty, **how, platform=platform)
        return layout.map(share, (), slots_specs(layout))()
    zeros = partial(jnp.zeros, (count,))
    given = platform, count, capacity
    beside = None
    if draft is not None:
        beside = _no_tokens(draft[0], cache_dtype or draft[1], *given)
    return Slots(
        cache=_no_tokens(config, cache_dtype or dtype, *given),
        draft=beside,
        hidden=jnp.zeros((count, config.hidden_size), dtype),
        seen=jnp.zeros((count, config.vocab_size), jnp.int32),
        live=zeros(bool),
        finite=jnp.ones(count, bool),
        steps=zeros(jnp.int32),
        asked=_nothing_asked(count),
    )


def _nothing_asked(count: int) -> Asked:
    zeros = partial(jnp.zeros, (count,))
    return Asked(
        sampler=greedy(count),
        seeds=zeros(jnp.uint32),
        stop_ids=jnp.full((count, STOP_IDS), -1, jnp.int32),
        least=zeros(jnp.int32),
        limits=zeros(jnp.int32),
        bias=biases([{}] * count),
    )


def _no_tokens(
    config: LlamaConfig, dtype: Any, platform: str, count: int, capacity: int
) -> KVCache:
    cache = KVCache.empty(config, count, capacity, dtype, rope_lengths=0)
    short = cache.keys[0].dtype.itemsize == 2
    return in_bits(cache) if short and platform == "cpu" else cache


@partial(
    jax.jit,
    static_argnames=("config", "size", "scored", "axes", "layout"),
    donate_argnames=("slots",),
)
def decode(
    params: Params,
    slots: Slots,
    key: jax.Array,
    going: jax.Array,
    enough: jax.Array,
    rules: Rules | None = None,
    *,
    config: LlamaConfig,
    size: int,
    scored: bool,
    axes: Axes = ONE,
    layout: Layout | None = None,
) -> tuple[Slots, Block]:
    """Draw tokens for the live rows until enough of them have finished.

    Args:
      params, config: the model.
      slots: the rows.
      key: a typed key; token t of a row is drawn with fold_in(fold_in(key, seed), t).
      going: bool [B]; a row that is not ends here.
      enough: int32 [], rows that finish before this returns; it also does when none is
        left or after `size` steps.
      rules: of the tokens that rows may draw; None: any.
      size: columns of the block.
      scored: whether log-probabilities and alternatives are wanted.
      axes: as in `forward`.
      layout: where params stand, which makes this the same for each device's share.
    """
    if layout is not None:
        how = {"config": share_of(config, layout), "axes": layout.axes}
        share = partial(decode, size=size, scored=scored, **how)
        going_on, whole = slots_specs(layout), PartitionSpec()
        own = None if rules is None else rules_specs(layout)
        given = layout.params(params), going_on, whole, layout.rows(), whole, own
        run = layout.map(share, given, (going_on, block_specs(layout)))
        return run(params, slots, key, going, enough, rules)
    slots, keys = started(slots, key, going)

    def count_live(slots: Slots) -> jax.Array:
        return axes.total_of_rows(jnp.sum(slots.live, dtype=jnp.int32))

    began = count_live(slots)

    def goes_on(carry: tuple[Slots, Block]) -> jax.Array:
        left = count_live(carry[0])
        return (carry[1].steps < size) & (left > 0) & (began - left < enough)

    def step(carry: tuple[Slots, Block]) -> tuple[Slots, Block]:
        slots, block = carry
        logits = unembed(params, slots.hidden, config=config, axes=axes)
        own = jax.vmap(jax.random.fold_in)(keys, slots.steps)
        mask = None
        if rules is not None and block.states is not None:
            mask = allowed(rules, block.states, slots.asked.stop_ids, axes)
        past = past_of(slots, slots.steps)
        token, logits, finite = draw(
            logits, slots.asked.sampler, own, past, axes, allowed=mask
        )
        token = jnp.where(slots.live, token, 0)
        block = recorded(block, slots.live, token, logits, axes)
        slots = _drawn(slots, token, finite, axes)
        if rules is not None and block.states is not None:
            states, over = after(rules, block.states, token, axes)
            block = replace(block, states=states)
            slots = replace(slots, live=slots.live & ~over)
        now = slots.cache
        how: Any = {"config": config, "axes": axes}
        x, cache = hidden_states(params, token[:, None], cache=now, **how)
        # A row that has finished takes no more of the cache's reads.
        over = carry[0].live & ~slots.live
        lengths = jnp.where(slots.live, cache.lengths, now.lengths)
        cache = replace(cache, lengths=jnp.where(over, 0, lengths))
        hidden = jnp.where(carry[0].live[:, None], x[:, 0], slots.hidden)
        return replace(slots, cache=cache, hidden=hidden), block

    states = None if rules is None else rules.states
    given = slots, blank(slots.live, states, config.vocab_size, size, scored)
    return ended(*jax.lax.while_loop(goes_on, step, given))


def past_of(slots: Slots, steps: jax.Array) -> Past:
    """What tokens are drawn in view of, where rows have so many already, int32 [B]."""
    asked = slots.asked
    return Past(
        seen=slots.seen,
        bias=asked.bias,
        stop_ids=asked.stop_ids,
        early=asked.least - steps,
    )


def started(slots: Slots, key: jax.Array, going: jax.Array) -> tuple[Slots, jax.Array]:
    """The slots at the start of a chunk, and each row's key."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, slots.asked.seeds)
    lengths = jnp.where(slots.live & ~going, 0, slots.cache.lengths)
    cache = replace(slots.cache, lengths=lengths)

    def kept(own: jax.Array, none: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(going, range(1, own.ndim)), own, none)

    # What rows asked for that are gone would cost every step of the others.
    asked = jax.tree.map(kept, slots.asked, _nothing_asked(len(going)))
    live = slots.live & going
    return replace(slots, live=live, cache=cache, asked=asked), keys


def ended(slots: Slots, block: Block) -> tuple[Slots, Block]:
    """The slots at the end of a chunk, and its block."""
    # Beyond its logits, what a row's last token left in the cache.
    wrong = jnp.sum(slots.hidden - slots.hidden, axis=1) != 0
    spoilt = wrong | ~slots.finite
    return slots, replace(block, live=slots.live, finite=slots.finite, spoilt=spoilt)


def _drawn(slots: Slots, token: jax.Array, finite: jax.Array, axes: Axes) -> Slots:
    """The rows with one more token each, where they are live."""
    live, asked = slots.live, slots.asked
    steps = slots.steps + live.astype(jnp.int32)
    stopped = jnp.any(token[:, None] == asked.stop_ids, axis=1)
    size = slots.seen.shape[1]
    ids = jnp.where(live, axes.local_ids(token, size), size)  # one being filled has own
    return replace(
        slots,
        seen=add_seen(slots.seen, ids[:, None]),
        live=live & ~stopped & (steps < asked.limits),
        finite=slots.finite & (finite | ~live),
        steps=steps,
    )


@partial(jax.jit, static_argnames=("layout",), donate_argnames=("slots",))
def clean(slots: Slots, rows: jax.Array, *, layout: Layout | None = None) -> Slots:
    """Zeros in some slots of the cache, bool [B], where a row may have left a NaN.

    What is masked weighs 0, but 0 x NaN is NaN.
    """
    if layout is not None:
        specs = slots_specs(layout)
        return layout.map(clean, (specs, layout.rows()), specs)(slots, rows)

    def cleaned(x: jax.Array) -> jax.Array:
        return jnp.where(rows[:, None, None, None], jnp.zeros((), x.dtype), x)

    def wiped(cache: KVCache) -> KVCache:
        keys, values = jax.tree.map(cleaned, (cache.keys, cache.values))
        return replace(cache, keys=keys, values=values)

    hidden = jnp.where(rows[:, None], jnp.zeros((), slots.hidden.dtype), slots.hidden)
    return replace(
        slots,
        cache=wiped(slots.cache),
        draft=None if slots.draft is None else wiped(slots.draft),
        hidden=hidden,
        finite=slots.finite | rows,
    )
