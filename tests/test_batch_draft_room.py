"""A draft in the batch's engine: its room beside the model, its price, refusals."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_draft_helpers import GUESSED, SHAPE, large, right
from batch_helpers import engine_of

import jrope
from jrope.batch.admission import fit_guesser
from jrope.batch.drafting import beside, share_of_step
from jrope.batch.engine import Engine
from jrope.batch.lowering import not_yet
from jrope.batch.pauses import hopeful, in_vain, wider
from jrope.batch.room import slots_for
from jrope.batch.slots import empty
from jrope.errors import JropeError
from jrope.generation.guesser import Draft, PromptLookup
from jrope.model.with_rope import with_rope


def test_slots_have_room_for_the_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many layers take half as much again; both are of 8 bits, or neither."""
    params, config = large()
    draft, lookup = right(), PromptLookup(GUESSED)

    def held(**how: Any) -> int:
        of = {"config": config, "count": 2, "capacity": 640, "dtype": np.float32}
        state = empty.eval_shape(**of, **how)
        caches = [cache for cache in (state.cache, state.draft) if cache is not None]
        leaves = jax.tree.leaves([(cache.keys, cache.values) for cache in caches])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    for more in ({}, {"cache_dtype": "int8"}):
        both = held(draft=beside(draft), **more)
        assert both == 3 * held(**more) // 2 > 0
    counts = [
        slots_for(params, config, 2**14, 2**27, speculate=own)
        for own in (lookup, draft)
    ]
    assert 1.4 < counts[0] / counts[1] < 1.6
    monkeypatch.setattr("jrope.batch.engine.free_memory", lambda layout: 2**27)
    given: dict[str, Any] = {"capacity": 2**14 - GUESSED}
    engines = [
        Engine(params, config, **given, speculate=own) for own in (lookup, draft)
    ]
    assert [own.stats.slots for own in engines] == counts


def test_a_draft_is_asked_where_it_can_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    params, config = large()
    draft = right()
    assert share_of_step(PromptLookup(), params, config) == 0
    assert share_of_step(Draft(params, config), params, config) == 1
    layer = 4 * 64 * 64 * 3 // 4 + 3 * 64 * 96 + 2 * 64
    head = 61 * 64 + 64
    share = share_of_step(draft, params, config)
    assert share == pytest.approx((layer + head) / (2 * layer + head))
    assert wider(4, draft, share) == 1.25 + 5 * share
    assert wider(128, draft, 0.1) == 640 / 300 + 0.5
    now = jnp.ones(4, bool), jnp.zeros((4, GUESSED), jnp.int32)
    assert hopeful(not_yet(), *now, 5.0) and not hopeful(not_yet(), *now, 5.1)
    assert in_vain(4, draft, 0.75) is None
    told, nothing = list[str](), SimpleNamespace(seconds=0.0, ruled={}, share={})
    ready: Any = lambda *_, **__: nothing  # noqa: E731
    monkeypatch.setattr("jrope.batch.engine.compile_programs", ready)
    itself = Draft(params, config, GUESSED)
    engine_of(params, config, **SHAPE, speculate=itself, warn=told.append).compile()
    engine_of(params, config, **SHAPE, speculate=draft, warn=told.append).compile()
    why = "speculate: 4 guesses for each of 4 slots are taken to cost as much as 6.2 "
    assert len(told) == 1 and told[0].startswith(why)
    assert told[0].endswith("take fewer slots or a smaller draft")


def test_what_cannot_guess_is_refused() -> None:
    params, config = large()
    draft = right()

    def refused(match: str, **fields: Any) -> None:
        own = replace(draft, config=replace(draft.config, **fields))
        with pytest.raises(JropeError, match=match):
            engine_of(params, config, **SHAPE, speculate=own)

    refused("the draft has a vocabulary of 62, the model one of 61", vocab_size=62)
    refused("the draft has layers with a window of 59, .* and 64 slots", windows=(59,))
    rope = with_rope(config, "dynamic", factor=2.0, lengths="hf").rope
    refused('the draft has "hf" lengths', rope=rope)
    windowed = replace(draft, config=replace(draft.config, windows=(60,)))
    fitted: Any = fit_guesser(windowed, params, config, 60, 64)
    assert fitted.config.windows == (65,)
    mesh = jrope.mesh("data=1")
    there = replace(draft, params=jrope.shard(draft.params, mesh, draft.config))
    with pytest.raises(JropeError, match="parameters on a mesh, want one device"):
        engine_of(params, config, **SHAPE, speculate=there)
