"""Guesses in the batch's engine: the tokens of plain decoding, in fewer passes."""

import re
from dataclasses import asdict, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_helpers import SAMPLERS, asks, by_key, engine_of, tokens_alone, work
from generate_helpers import VOCABULARY, model

from jrope.batch import guessing
from jrope.batch.block import Guessing, blank
from jrope.batch.engine import Engine
from jrope.batch.lowering import lower_decode, not_yet
from jrope.batch.pauses import hopeful, learned, wider
from jrope.batch.room import slots_for
from jrope.batch.slots import empty
from jrope.batch.work import Finished, Work
from jrope.errors import JropeError
from jrope.forms.rules import Rules
from jrope.forms.structure import MAY_STOP, Structure
from jrope.generation.guesser import PromptLookup
from jrope.generation.sample import Sampler
from jrope.model.with_rope import with_rope

LOOKUP, SLOTS = PromptLookup(tokens=4), 4
SHAPE: dict[str, Any] = {"slots": SLOTS, "capacity": 60, "piece": 16}


@cache
def guessed() -> Engine:
    return engine_of(*model()[1:], **SHAPE, speculate=LOOKUP)


@cache
def plain() -> Engine:
    """The same slots without guesses."""
    return engine_of(*model()[1:], **SHAPE | {"capacity": 64})


def rows() -> list[Work]:
    """Prompts that repeat themselves and others, samplers of all kinds, stop ids."""
    random = np.random.default_rng(7)
    every = list[Work]()
    for i in range(5 * SLOTS):
        size, new = int(random.integers(1, 36)), int(random.integers(1, 25))
        own = {"sampler": SAMPLERS[i % len(SAMPLERS)], "seed": 99 - i, "logprobs": 2}
        own |= asks(i, new)
        row = work(f"row {i}", size, new, stop_ids=(5, 9) if i % 3 else (), **own)
        prompt = np.resize(row.prompt[:5], size) if i % 2 else row.prompt
        every.append(replace(row, prompt=prompt))
    return [*every, replace(work("full", 40, 20), logprobs=2)]


@cache
def wanted() -> dict[Any, Finished]:
    return by_key(plain().run(rows()))


def test_tokens_are_those_of_plain_decoding() -> None:
    """With their log-probabilities, whoever is beside a row."""
    before = asdict(guessed().stats)
    got = by_key(guessed().run(rows()))
    assert {*got} == {*wanted()}
    for key, want in wanted().items():
        answer = got[key]
        assert answer.tokens.tolist() == want.tokens.tolist(), key
        assert answer.finish_reason == want.finish_reason
        assert answer.finite and want.finite
        np.testing.assert_allclose(answer.logprobs, want.logprobs, atol=2e-5)
        np.testing.assert_array_equal(answer.top_ids, want.top_ids)
        np.testing.assert_allclose(answer.top_logprobs, want.top_logprobs, atol=2e-5)
    assert {"stop", "length"} == {row.finish_reason for row in got.values()}
    for row in rows()[:3]:
        assert got[row.key].tokens.tolist() == tokens_alone(row)
    after = asdict(guessed().stats)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["decode_tokens"] == sum(len(row.tokens) for row in got.values())
    assert 0 < grown["guessing_steps"] < grown["steps"]
    assert grown["live_rows"] < grown["decode_tokens"]


def test_rows_that_ask_for_no_log_probabilities() -> None:
    got = by_key(guessed().run([replace(row, logprobs=None) for row in rows()[::-1]]))
    for key, want in wanted().items():
        assert got[key].tokens.tolist() == want.tokens.tolist(), key
        assert got[key].logprobs is None


def test_an_answer_that_repeats_takes_few_passes() -> None:
    row = work("g13", 3, 50)
    before = guessed().stats.steps
    tokens = next(guessed().run([row])).tokens.tolist()
    assert tokens[:40] == tokens_alone(replace(row, max_new_tokens=40))
    assert len(tokens) == 50 and guessed().stats.steps - before < 30
    assert plain().stats.tokens_a_pass in (0, 1) and guessed().stats.tokens_a_pass > 1
    assert 0 < guessed().stats.occupancy <= 1


def test_a_stop_inside_of_right_guesses_ends_the_row_there() -> None:
    start = work("g0", 3, 46)
    before = next(guessed().run([start])).tokens
    row = work("loops", 1, 9)
    row = replace(row, prompt=np.concatenate([start.prompt, before]))
    going = next(guessed().run([row])).tokens.tolist()
    assert len(going) == 9 and going[3:6] == going[:3] and going[0] != going[1]
    answer = next(guessed().run([replace(row, stop_ids=(going[1],))]))
    assert answer.tokens.tolist() == going[:2] and answer.finish_reason == "stop"


def test_guesses_that_are_wrong_become_rare() -> None:
    """They are tried after 1, 2, 4, ... passes, across chunks of 8."""
    row = work("noise", 30, 30, sampler=Sampler(temperature=30.0))
    before = guessed().stats.guessing_steps
    answer = next(guessed().run([row]))
    assert answer.tokens.tolist() == tokens_alone(row)
    assert 1 <= guessed().stats.guessing_steps - before <= 5


def test_rows_with_a_form_are_drawn_without_guesses() -> None:
    """And the rows beside them; later ones are guessed for again."""
    own = engine_of(*model()[1:], **SHAPE, speculate=LOOKUP)
    own._programs = replace(guessed().compile(), ruled={})
    free = Structure(np.array([[MAY_STOP, 0]], np.int32), np.ones(VOCABULARY, np.int16))
    some = [
        replace(row, structure=free) if i == 1 else row for i, row in enumerate(rows())
    ]
    got = by_key(own.run(some))
    assert {key: row.tokens.tolist() for key, row in got.items()} == {
        key: row.tokens.tolist() for key, row in wanted().items()
    }
    ruled = [name for name in own.programs if "structures" in name]
    assert len(ruled) == 1 and own.stats.guessing_steps


def test_the_program_for_forms_makes_no_guesses() -> None:
    """Nor where it is compiled ahead, beside the one that does."""
    how: dict[str, Any] = {"slots": 2, "capacity": 16, "size": 2, "scored": False}
    how |= {"key": jax.random.key(0), "speculate": LOOKUP}
    given, _ = lower_decode(*model()[1:], **how, entries=16)
    assert isinstance(given[-1], Rules)
    given, _ = lower_decode(*model()[1:], **how)
    assert isinstance(given[-1], Guessing)


def test_what_rows_hold_is_not_copied_for_guesses() -> None:
    held = f"s32[{SLOTS},{VOCABULARY}]"
    for program in guessed().compile().decode.values():
        assert f"= {held}" in program.as_text()
        assert not re.search(rf"= {re.escape(held)}\S* copy\(", program.as_text())


def test_programs_are_as_many_as_without() -> None:
    own, other = guessed(), engine_of(*model()[1:], **SHAPE)
    own.compile()
    assert own.stats.compiled == len(own.programs) == len(other.programs)
    new = {"decode with guesses", "decode with guesses and log-probabilities"}
    assert {*own.programs} - {*other.programs} == new


def test_room_is_left_for_guesses() -> None:
    assert (guessed().capacity, guessed().width) == (60, 64)
    with pytest.raises(JropeError, match="got 21 after a prompt of 40, want 60 in all"):
        guessed().check(work("long", 40, 21))
    own = engine_of(*model()[1:], **SHAPE | {"capacity": 61}, speculate=LOOKUP)
    assert (own.capacity, own.width) == (76, 80)
    _, params, config = model()
    wide = None, PromptLookup(2000)
    counts = [slots_for(params, config, 64, 10**7, speculate=own) for own in wide]
    assert counts[0] == 16 and 1 < counts[1] < 5


def test_guesses_are_made_where_they_can_pay() -> None:
    seven = PromptLookup()
    assert wider(4, seven) == 1.25 and wider(128, seven) == 1024 / 300
    guesses = np.full((128, 7), -1)
    for known, due in ((44, False), (45, True)):  # 2.41 x 128 / 7 = 44.1
        guesses[:known] = 3
        now = jnp.ones(128, bool), jnp.asarray(guesses)
        assert bool(hopeful(not_yet(), *now, wider(128, seven))) == due
        paused = replace(not_yet(), pause=np.int32(1))
        assert not hopeful(paused, *now, 1.25)
    none = jnp.zeros((), jnp.int32)
    before = replace(not_yet(), pause=none, caution=none + 2)
    for kept, pause in ((3, 4), (4, 0)):
        live, every = jnp.ones(128, bool), jnp.full(128, kept, jnp.int32)
        after = learned(before, live, every, 7, wider(128, seven))
        assert (after.pause, after.caution, after.rows) == (pause, pause, 128)
    assert learned(after, live, every, 0, 1.25).passes == 1


def test_a_guess_that_was_wrong_is_taken_back() -> None:
    """By its row's length alone; a NaN that it left is told of."""
    config, ones = model()[2], jnp.ones(2, jnp.int32)
    slots = empty(config=config, count=2, capacity=16, dtype=np.dtype("float32"))
    asked = replace(slots.asked, limits=9 * ones)
    slots = replace(slots, live=ones > 0, asked=asked)
    slots = replace(slots, cache=replace(slots.cache, lengths=3 * ones))
    x = jnp.zeros((2, 2, config.hidden_size)).at[0, 1].set(jnp.nan)
    drawn = guessing.Drawn(jnp.array([[1, 2], [1, 2]]), jnp.ones((2, 2), bool), ())
    now = guessing.Going(
        slots=slots,
        block=blank(slots.live, None, VOCABULARY, 4, False),
        guessing=not_yet(),
        coming=guessing.Drawn(7 * ones, ones > 0, ()),
        text=jnp.zeros((2, 16), jnp.int32),
        guesses=3 * ones[:, None],
        spoilt=ones < 0,
    )
    read: Any = lambda *_: (x, slots.cache, drawn)  # noqa: E731
    how = {"read": read, "guesser": LOOKUP, "cost": 1.25}
    now = jax.jit(partial(guessing._pass, count=1, **how))(now)
    assert now.slots.cache.lengths.tolist() == [4, 4]
    assert now.block.counts.tolist() == [1, 1]
    assert now.block.tokens[:, 0].tolist() == [7, 7]
    assert now.coming.tokens.tolist() == [1, 1]
    assert now.text[:, 3:6].tolist() == [[0, 1, 0]] * 2  # the first stood there before
    assert not jnp.isnan(now.slots.hidden).any()
    assert now.spoilt.tolist() == [True, False]


def test_rows_may_be_as_long_as_a_window() -> None:
    """Guesses stand behind it, and so do slots for round numbers."""
    _, params, config = model()
    config = replace(config, windows=(None, 60))
    own = engine_of(params, config, **SHAPE, speculate=LOOKUP, logprobs=False)
    assert (own.capacity, own.width) == (60, 64)
    for cut in (engine_of(params, config, capacity=n) for n in (49, 60)):
        assert (cut.capacity, cut.width) == (60, 64)
    full = [work("full", 40, 20), work("short", 9, 12)]
    for row in full:
        row.prompt[:] = np.resize(row.prompt[:5], len(row.prompt))
    found = by_key(own.run(full))
    assert own.stats.guessing_steps
    for row in full:
        assert found[row.key].tokens.tolist() == tokens_alone(row, params, config)


def test_what_cannot_guess_is_refused() -> None:
    _, params, config = model()

    def refused(match: str, own: Any = config, **options: Any) -> None:
        given = {**SHAPE, "speculate": LOOKUP, **options}
        with pytest.raises(JropeError, match=match):
            engine_of(params, own, **given)

    refused("got a str, want a PromptLookup", speculate="prompt")
    refused("layers with a window of 59, whose", replace(config, windows=(None, 59)))
    rope = with_rope(config, "dynamic", factor=2.0, lengths="hf")
    refused('got lengths "hf"', rope)
