"""`slots.decode` with guesses: several tokens of a row in one pass, exactly.

As in `generation.speculate`, what counts is what plain decoding would have drawn, with
the same keys.  A token counts when it is in the cache; the one after it is drawn by
then, and where a chunk ends, it is drawn anew by the next one.  So slots are left as
`slots.decode` leaves them, and either may go on with them.  How a draft guesses is in
`drafting`.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from jrope.batch.block import ALTERNATIVES, Block, Guessing, add_tokens, blank, scores
from jrope.batch.drafting import drafted, known, share_of_step, taken_back
from jrope.batch.pauses import hopeful, learned, wider
from jrope.batch.slots import Slots, ended, past_of, started
from jrope.generation.guesser import Draft, Guesser
from jrope.generation.passes import counted, draw_each, in_turns, put
from jrope.generation.past import Past, add_seen
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.llama import hidden_states, unembed
from jrope.tree import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Drawn:
    """Tokens, of one position of every row [B] or of several [B, T]."""

    tokens: jax.Array  # int32
    finite: jax.Array  # bool, of their logits
    scores: tuple[jax.Array, ...]  # as in a block; () where not wanted


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Going:
    """Rows between two passes."""

    slots: Slots
    block: Block
    guessing: Guessing
    coming: Drawn  # [B], next into the cache
    text: jax.Array  # int32 [B, W], prompts and tokens, the coming one included
    guesses: jax.Array  # int32 [B, n], what may follow it, -1: no idea; see `known`
    spoilt: jax.Array  # bool [B], whether a guess may have left a NaN in a cache


@partial(
    jax.jit,
    static_argnames=("config", "size", "scored"),
    donate_argnames=("slots",),
)
def decode_guessing(
    params: Params,
    slots: Slots,
    key: jax.Array,
    going: jax.Array,
    enough: jax.Array,
    guesser: Guesser,
    text: jax.Array,
    guessing: Guessing,
    *,
    config: LlamaConfig,
    size: int,
    scored: bool,
) -> tuple[Slots, Block]:
    """As `decode`, which has the other arguments, in passes over 1 token or n + 1.

    Args:
      guesser: guesses n tokens at a time.
      text: int32 [B, W], prompts and what was drawn so far.
      guessing: how the passes before went.
      size: passes, at most.
    """
    slots, keys = started(slots, key, going)
    began = jnp.sum(slots.live, dtype=jnp.int32)
    cost = wider(len(text), guesser, share_of_step(guesser, params, config))
    draw = partial(_draw, params, config, keys, scored)
    read = partial(_read, params, config, draw)

    def step(now: Going, count: int) -> Going:
        now = _counted(now)
        now = _asked(now, guesser, keys) if count else now
        return _pass(now, count, read=read, guesser=guesser, cost=cost)

    def unfinished(now: Going) -> jax.Array:
        left = jnp.sum(now.slots.live, dtype=jnp.int32)
        return (now.block.steps < size) & (left > 0) & (began - left < enough)

    def due(now: Going) -> jax.Array:
        return hopeful(now.guessing, now.slots.live, now.guesses, cost)

    columns = size * (guesser.tokens + 1)
    block = blank(slots.live, None, config.vocab_size, columns, scored)
    now = _begun(taken_back(slots), block, text, guessing, draw, guesser)
    now = in_turns(unfinished, due, step, guesser.tokens, now)
    slots, block = ended(now.slots, now.block)
    spoilt = block.spoilt | now.spoilt
    return slots, replace(block, spoilt=spoilt, guessing=now.guessing)


def _begun(
    slots: Slots,
    block: Block,
    text: jax.Array,
    guessing: Guessing,
    draw: Callable[..., Drawn],
    guesser: Guesser,
) -> Going:
    """The rows with a token drawn for each, before the first pass."""
    none = jnp.zeros((), jnp.int32)
    first = jnp.zeros((len(text), 0), jnp.int32)
    past = past_of(slots, slots.steps)
    drawn = draw(slots, slots.hidden[:, None], first, slots.steps, past)
    lengths = slots.cache.lengths
    text = put(text, drawn.tokens, lengths, 1)
    return Going(
        slots=slots,
        block=block,
        guessing=replace(guessing, passes=none, rows=none),
        coming=jax.tree.map(lambda x: x[:, 0], drawn),
        text=text,
        guesses=known(text, lengths, guesser),
        spoilt=jnp.zeros_like(slots.live),
    )


def _counted(now: Going) -> Going:
    """The rows where the coming tokens count as seen; they are kept in any case.

    What is drawn next is read beside them, so that nothing has to be copied for it.
    """
    size = now.slots.seen.shape[1]
    ids = jnp.where(now.slots.live, now.coming.tokens, size)[:, None]
    seen = add_seen(now.slots.seen, ids)
    return replace(now, slots=replace(now.slots, seen=seen))


def _asked(now: Going, guesser: Guesser, keys: jax.Array) -> Going:
    """The rows with the guesses of a draft, if that is what guesses."""
    if not isinstance(guesser, Draft):
        return now
    slots, coming = now.slots, now.coming.tokens
    guesses, slots = drafted(guesser, slots, coming, now.text, keys)
    spoilt = now.spoilt | (slots.live & jnp.any(guesses < 0, axis=1))
    return replace(now, slots=slots, guesses=guesses, spoilt=spoilt)


def _pass(
    now: Going,
    count: int,
    *,
    read: Callable[..., tuple[jax.Array, KVCache, Drawn]],
    guesser: Guesser,
    cost: float,
) -> Going:
    """The coming token and `count` guesses through the model: as many as were right."""
    slots, guesses, lengths = now.slots, now.guesses[:, :count], now.slots.cache.lengths
    x, cache, drawn = read(slots, now.coming, guesses)
    every = jax.tree.map(_behind, now.coming, drawn)
    left = jnp.where(slots.live, slots.asked.limits - slots.steps, 0)
    right = every.tokens[:, 1:-1] == guesses
    own = every.tokens[:, :-1], right, slots.asked.stop_ids, left
    new, stopped = counted(*own)
    kept = jnp.sum(new, axis=1, dtype=jnp.int32)
    text = put(now.text, every.tokens[:, 1:], lengths + 1, kept)
    wrong = jnp.sum(x - x, axis=(1, 2)) != 0
    return Going(
        slots=taken_back(_with(slots, every, new, stopped, x, cache)),
        block=add_tokens(now.block, every.tokens, every.scores, kept),
        guessing=learned(now.guessing, slots.live, kept, count, cost),
        coming=jax.tree.map(partial(_at, at=kept), every),
        text=text,
        guesses=known(text, lengths + kept, guesser),
        spoilt=now.spoilt | (slots.live & wrong),
    )


def _read(
    params: Params,
    config: LlamaConfig,
    draw: Callable[..., Drawn],
    slots: Slots,
    coming: Drawn,
    guesses: jax.Array,
) -> tuple[jax.Array, KVCache, Drawn]:
    """Tokens through the model: hidden states, the cache, what follows each of them."""
    first, live = coming.tokens[:, None], slots.live[:, None]
    tokens = jnp.concatenate([first, jnp.maximum(guesses, 0)], axis=1)
    tokens = jnp.where(live, tokens, 0)
    x, cache = hidden_states(params, tokens, cache=slots.cache, config=config)
    steps = slots.steps + 1
    return x, cache, draw(slots, x, guesses, steps, past_of(slots, steps))


def _draw(
    params: Params,
    config: LlamaConfig,
    keys: jax.Array,
    scored: bool,
    slots: Slots,
    x: jax.Array,
    guesses: jax.Array,
    steps: jax.Array,
    past: Past,
) -> Drawn:
    """What follows each of hidden states x [B, T, D], as if the guesses were right."""
    logits = unembed(params, x.reshape(-1, x.shape[-1]), config=config)
    own = slots.asked.sampler, keys, steps, past
    tokens, logits, finite = draw_each(logits, guesses, *own)
    best = min(ALTERNATIVES, logits.shape[1])
    every = scores(logits, tokens.reshape(-1), best) if scored else ()
    shape = tokens.shape
    return Drawn(tokens, finite, tuple(s.reshape(*shape, *s.shape[1:]) for s in every))


def _with(
    slots: Slots,
    drawn: Drawn,
    new: jax.Array,
    stopped: jax.Array,
    x: jax.Array,
    cache: KVCache,
) -> Slots:
    """The slots with those tokens that are new, bool [B, T]; the first one counts."""
    kept = jnp.sum(new, axis=1, dtype=jnp.int32)
    right = jnp.where(new[:, 1:], drawn.tokens[:, 1:-1], slots.seen.shape[1])
    steps = slots.steps + kept
    live = slots.live & ~stopped & (steps < slots.asked.limits)
    # A row that has finished takes no more of the cache's reads.
    lengths = jnp.where(slots.live & ~live, 0, slots.cache.lengths + kept)
    newest = _at(x, jnp.maximum(kept - 1, 0))
    return replace(
        slots,
        cache=replace(cache, lengths=lengths),
        hidden=jnp.where(slots.live[:, None], newest, slots.hidden),
        seen=add_seen(slots.seen, right),
        live=live,
        finite=slots.finite & jnp.all(drawn.finite[:, :-1] | ~new, axis=1),
        steps=steps,
    )


def _behind(first: jax.Array, rest: jax.Array) -> jax.Array:
    """[B, ...] before [B, T, ...]."""
    return jnp.concatenate([first[:, None], rest], axis=1)


def _at(x: jax.Array, at: jax.Array) -> jax.Array:
    """x [B, T, ...] at one position of each row."""
    return x[jnp.arange(len(at), dtype=jnp.int32), at]
