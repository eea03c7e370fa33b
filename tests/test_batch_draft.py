"""A draft in the batch's engine: the tokens of plain decoding, in fewer passes.

The model's second layer adds nothing, so that its first one alone says the same: a draft
that is always right.  Others are wrong.
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
    alone,
    by_key,
    engine_of,
    tokens_alone,
    work,
)
from generate_helpers import VOCABULARY, model

from jrope.batch.admission import fit_guesser
from jrope.batch.drafting import share_of_step
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
    own = other(right())
    first = work("system", 2 * own.shapes.behind[0] + 2, 1).prompt
    given = list[Work]()
    for i in range(3):
        row = work(f"behind {i}", 3 + i, 20, shared=len(first))
        given.append(replace(row, prompt=np.concatenate([first, row.prompt])))
    got, grown = ran(own, given)
    assert grown["shared_tokens"] > 0
    assert tokens_of(got) == {r.key: tokens_alone(r, *large()) for r in given}
    assert grown["steps"] == passes_of(given[0])
