"""A draft in the batch's engine: the tokens of plain decoding, in fewer passes."""

from dataclasses import asdict, replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_draft_helpers import GUESSED, SHAPE, SLOTS, large, right
from batch_helpers import (
    SAMPLERS,
    asks,
    by_key,
    draw_best,
    engine_of,
    tokens_alone,
    work,
)
from generate_helpers import VOCABULARY

from jrope.batch import engine
from jrope.batch.engine import Engine
from jrope.batch.lowering import not_yet
from jrope.batch.work import Work
from jrope.forms.structure import MAY_STOP, Structure
from jrope.generation.guesser import Draft, PromptLookup
from jrope.generation.sample import Sampler


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
        own |= asks(i, new)
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
    given = [work(f"long {i}", 40 - i, 20, sampler=sampler) for i in range(SLOTS)]
    got, grown = ran(guessed(), given)
    assert tokens_of(got) == {r.key: tokens_alone(r, *large()) for r in given}
    assert grown["steps"] == grown["guessing_steps"] == passes_of(given[0])


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
