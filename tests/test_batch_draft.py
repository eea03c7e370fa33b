"""A draft in the batch's engine: the tokens of plain decoding, in fewer passes.

The model's second layer adds nothing, so that its first one alone says the same: a
draft that is always right.  Others are wrong.
"""

from dataclasses import asdict, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_helpers import (
    SAMPLERS,
    by_key,
    draw_best,
    engine_of,
    tokens_alone,
    work,
)
from generate_helpers import VOCABULARY, model

import jrope
from jrope.batch import engine
from jrope.batch.admission import fit_guesser
from jrope.batch.drafting import beside, share_of_step
from jrope.batch.engine import Engine
from jrope.batch.pauses import hopeful, in_vain, wider
from jrope.batch.programs import not_yet
from jrope.batch.room import slots_for
from jrope.batch.slots import empty
from jrope.batch.work import Work
from jrope.errors import JropeError
from jrope.forms.structure import MAY_STOP, Structure
from jrope.generation.guesser import Draft, PromptLookup
from jrope.generation.sample import Sampler
from jrope.model.config import LlamaConfig
from jrope.model.with_rope import with_rope

GUESSED, SLOTS = 4, 4
SHAPE: dict[str, Any] = {"slots": SLOTS, "capacity": 60, "piece": 16}
SHAPE |= {"logprobs": False}


@cache
def large(rope: str | None = None) -> tuple[Any, LlamaConfig]:
    """The model: its second layer's projections out are zeros."""
    _, params, config = model(rope)
    layer = dict(params["model"]["layers"]["1"])
    for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        zeros = jax.tree.map(jnp.zeros_like, layer[part][name])
        layer[part] = {**layer[part], name: zeros}
    layers = {**params["model"]["layers"], "1": layer}
    return {**params, "model": {**params["model"], "layers": layers}}, config


def right(rope: str | None = None) -> Draft:
    """Its first layer."""
    params, config = large(rope)
    first = {**params["model"], "layers": {"0": params["model"]["layers"]["0"]}}
    own = replace(config, num_hidden_layers=1)
    return Draft({**params, "model": first}, own, GUESSED)


def wrong() -> Draft:
    """Another model of its shape."""
    noise = jax.random.key(3)
    return replace(
        right(),
        params=jax.tree.map(
            lambda x: jax.random.normal(noise, x.shape), right().params
        ),
    )


@cache
def guessed() -> Engine:
    return engine_of(*large(), **SHAPE, speculate=right())


def other(draft: Draft, **programs: Any) -> Engine:
    """An engine with another draft, and the programs of the first."""
    own = engine_of(*large(), **SHAPE, speculate=draft)
    same = replace(guessed().compile(), speculate=draft, ruled={}, share={})
    own._programs = replace(same, **programs)
    return own


def watched() -> tuple[Engine, list[int]]:
    """One whose draft is right, and by how many tokens it was behind at each chunk."""
    behind, program = list[int](), guessed().compile().decode[False]

    def decode(params: Any, slots: Any, *given: Any) -> Any:
        lag = slots.cache.lengths - slots.draft.lengths
        behind.append(int(abs(lag).max()))
        return program(params, slots, *given)

    return other(right(), decode={False: decode}), behind


def rows() -> list[Work]:
    """More than there are slots: short and long prompts, all samplers, stop ids."""
    random = np.random.default_rng(7)
    every = list[Work]()
    for i in range(5 * SLOTS):
        size, new = int(random.integers(1, 36)), int(random.integers(1, 25))
        own = {"sampler": SAMPLERS[i % len(SAMPLERS)], "seed": 99 - i}
        stops = (5, 9) if i % 3 else ()
        every.append(work(f"row {i}", size, new, stop_ids=stops, **own))
    return [*every, work("full", 40, 20)]


@cache
def wanted() -> dict[Any, list[int]]:
    return {row.key: tokens_alone(row, *large()) for row in rows()}


def ran(own: Engine, given: list[Work]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The answers, and by how much each counter has grown."""
    before = asdict(own.stats)
    got = by_key(own.run(given))
    after = asdict(own.stats)
    return got, {name: after[name] - before[name] for name in after}


def greedy(number: int) -> Work:
    return work(f"greedy {number}", 1, 20)


def tokens_of(got: dict[Any, Any]) -> dict[Any, list[int]]:
    return {key: row.tokens.tolist() for key, row in got.items()}


def passes_of(row: Work) -> int:
    """Where all guesses are right."""
    return -(-row.max_new_tokens // (GUESSED + 1))


def test_tokens_are_those_of_plain_decoding() -> None:
    """Whoever is beside a row."""
    got, grown = ran(guessed(), rows())
    assert tokens_of(got) == wanted()
    assert {"stop", "length"} == {row.finish_reason for row in got.values()}
    assert grown["guessing_steps"] > grown["steps"] / 2
    assert grown["decode_tokens"] > 3 * grown["live_rows"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_right_guesses_save_passes(sampler: Sampler) -> None:
    """The draft draws with the row's sampler and numbers, behind all of its prompt."""
    row = work("long", 40, 20, sampler=sampler)
    got, grown = ran(guessed(), [row])
    assert got["long"].tokens.tolist() == tokens_alone(row, *large())
    assert grown["steps"] == grown["guessing_steps"] == passes_of(row)


def test_wrong_guesses_cost_no_token_and_become_rare() -> None:
    got, grown = ran(other(wrong()), rows())
    assert tokens_of(got) == wanted()
    assert 0 < grown["guessing_steps"] < grown["steps"] / 4
    assert grown["decode_tokens"] < 1.05 * grown["live_rows"]  # some by chance


def test_a_stop_inside_of_right_guesses_ends_the_row_there() -> None:
    row = work("long", 40, 20)
    going = tokens_alone(row, *large())
    at = next(i for i in range(1, 4) if going.index(going[i]) == i)
    got, grown = ran(guessed(), [replace(row, stop_ids=(going[at],))])
    assert got["long"].tokens.tolist() == going[: at + 1]
    assert got["long"].finish_reason == "stop" and grown["steps"] == 1


def test_a_guess_that_was_wrong_is_taken_back() -> None:
    """A draft that never says one token: behind it, it is right again."""
    some = ((row, tokens_alone(row, *large())) for row in map(greedy, range(30)))
    row, going = next(one for one in some if one[1].count(one[1][GUESSED]) == 1)
    never, draft = going[GUESSED], right()
    head = draft.params["lm_head"]["weight"].at[never].set(0.0)
    own = other(replace(draft, params={**draft.params, "lm_head": {"weight": head}}))
    got, grown = ran(own, [row])
    assert got[row.key].tokens.tolist() == going
    assert grown["steps"] == grown["guessing_steps"] == passes_of(row) + 1


def test_rows_enter_piece_by_piece_beside_others(monkeypatch: Any) -> None:
    """All guesses are right for all of them: every pass of a row gives as many."""
    monkeypatch.setattr("jrope.batch.running.BURST", 1)
    given = [work(f"row {i}", 40 - i, 5 + 5 * (i % 4)) for i in range(3 * SLOTS)]
    own, behind = watched()
    got, grown = ran(own, given)
    assert tokens_of(got) == {r.key: tokens_alone(r, *large()) for r in given}
    assert grown["decode_tokens"] == 5 * grown["live_rows"]
    assert len(behind) == grown["chunks"] and not any(behind)


def test_after_a_pause_the_draft_reads_what_it_missed(monkeypatch: Any) -> None:
    paused = replace(not_yet(), pause=np.int32(7))
    monkeypatch.setattr("jrope.batch.running.not_yet", lambda: paused)
    row = work("long", 33, 7 + 20)
    got, grown = ran(guessed(), [row])
    assert got["long"].tokens.tolist() == tokens_alone(row, *large())
    assert (grown["steps"], grown["guessing_steps"]) == (7 + 4, 4)


def test_so_it_does_after_rows_with_a_form() -> None:
    """And neither they nor the rows beside them are guessed for meanwhile."""
    own = other(right())
    free = Structure(np.array([[MAY_STOP, 0]], np.int32), np.ones(VOCABULARY, np.int16))
    formed = replace(work("formed", 20, 8), structure=free)
    given = [formed, work("long", 33, 8 + 15), work("other", 9, 8 + 15)]
    got, grown = ran(own, given)
    assert tokens_of(got) == {r.key: tokens_alone(r, *large()) for r in given}
    assert (grown["steps"], grown["guessing_steps"]) == (8 + 3, 3)
    assert len([name for name in own.programs if "structures" in name]) == 1


def test_rows_share_what_the_draft_read_of_a_prefix() -> None:
    own, behind = watched()
    first = work("system", 2 * own.shapes.behind[0] + 2, 1).prompt
    given = list[Work]()
    for i in range(3):
        row = work(f"behind {i}", 3 + i, 20, shared=len(first))
        given.append(replace(row, prompt=np.concatenate([first, row.prompt])))
    got, grown = ran(own, given)
    assert grown["shared_tokens"] > 0
    assert tokens_of(got) == {r.key: tokens_alone(r, *large()) for r in given}
    assert grown["steps"] == passes_of(given[0])
    assert behind and not any(behind)


def test_slots_of_8_bits_and_lengths_that_grow(monkeypatch: Any) -> None:
    """What the draft holds of a row is what the model does: all guesses are right."""
    for place in ("passes", "draft"):
        monkeypatch.setattr(f"jrope.generation.{place}.draw", draw_best)
    inner, warm = engine.compile_programs, {"warm": True}
    own: Any = lambda *given, **how: inner(*given, **how | warm)  # noqa: E731
    monkeypatch.setattr(engine, "compile_programs", own)
    params, config = large("dynamic")
    config = replace(config, rope=replace(config.rope, lengths="growing"))
    draft = right("dynamic")
    draft = replace(draft, config=replace(draft.config, rope=config.rope))
    own = engine_of(params, config, **SHAPE, speculate=draft, cache_dtype="int8")
    row = work("long", 40, 20)
    got, grown = ran(own, [row])
    assert len(got["long"].tokens) == 20 and grown["steps"] == passes_of(row)


def test_programs_are_as_many_as_without_a_draft() -> None:
    own = guessed()
    own.compile()
    lookup = engine_of(*large(), **SHAPE, speculate=PromptLookup(GUESSED))
    assert own.programs == lookup.programs
    assert own.stats.compiled == len(own.programs)


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
    told, compiled = list[str](), guessed().compile()
    monkeypatch.setattr(
        "jrope.batch.engine.compile_programs", lambda *_, **__: compiled
    )
    itself = Draft(params, config, GUESSED)
    engine_of(params, config, **SHAPE, speculate=itself, warn=told.append).compile()
    engine_of(params, config, **SHAPE, speculate=draft, warn=told.append).compile()
    why = "speculate: 4 guesses for each of 4 slots are taken to cost as much as 6.2 "
    assert len(told) == 1 and told[0].startswith(why)
    assert told[0].endswith("take fewer slots or a smaller draft")


def test_a_draft_s_nan_is_no_token_and_does_not_stay() -> None:
    """Rows are what they are without it; whoever comes next is guessed for."""
    bad, draft = 7, right()
    table = draft.params["model"]["embed_tokens"]["weight"].at[bad].set(jnp.nan)
    inner = {**draft.params["model"], "embed_tokens": {"weight": table}}
    cleaned = list[Any]()

    def clean(slots: Any, rows: Any) -> Any:
        slots = guessed().compile().clean(slots, rows)
        cleaned.append(np.asarray(slots.draft.keys[0])[rows])
        return slots

    own = other(replace(draft, params={**draft.params, "model": inner}), clean=clean)
    row = work("bad", 12, 5)
    row.prompt[3] = bad
    got, _ = ran(own, [row])
    assert (
        got["bad"].tokens.tolist() == tokens_alone(row, *large()) and got["bad"].finite
    )
    assert len(cleaned) == 1 and np.isfinite(cleaned[0]).all()


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
