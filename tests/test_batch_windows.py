"""Rows of any length through layers with windows, whose slots go round in a batch, too.

Every row is many times longer than the window, and most prompts enter in pieces.
"""

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import pytest
from batch_helpers import (
    PIECE,
    SLOTS,
    by_key,
    engine_of,
    ragged,
    tokens_alone,
    without_token,
    work,
)
from family_helpers import WINDOW, build, torch_logits
from generate_helpers import KEY, model

from jrope.batch.engine import Engine
from jrope.batch.room import slots_for
from jrope.batch.work import Work
from jrope.generation.run import generate
from jrope.model.config import LlamaConfig

ROUND = 8  # slots of one layer; the other one has all


@cache
def windowed() -> tuple[Any, LlamaConfig]:
    _, params, config = model()
    return params, dataclasses.replace(config, windows=(ROUND, None))


@cache
def engine() -> Engine:
    return engine_of(*windowed(), logprobs=False)


def are_alone(rows: list[Work], got: dict[Any, Any]) -> None:
    for row in rows:
        answer = got[row.key]
        assert answer.tokens.tolist() == tokens_alone(row, *windowed()), row.key
        assert answer.finite


def test_rows_are_what_generate_makes_of_each_alone() -> None:
    rows = ragged(2 * SLOTS)
    assert {len(row.prompt) // PIECE for row in rows} == {0, 1, 2}  # pieces
    are_alone(rows, by_key(engine().run(rows)))


def test_rows_that_share_their_first_tokens_copy_rings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From a slot that others are decoded beside, once it holds the prefix."""
    monkeypatch.setattr("jrope.batch.packing.TOGETHER", 1)
    first = work("first", 70, 1).prompt
    rows = list[Work]()
    for i in range(2 * SLOTS):
        row = work(f"behind {i}", 1 + 3 * i % 20, 3 + i % 9, shared=70)
        prompt = np.concatenate([first, row.prompt])
        rows.append(dataclasses.replace(row, prompt=prompt))
    own = engine()
    before = own.stats.shared_tokens
    are_alone(rows, by_key(own.run([*ragged(9), *rows])))
    assert own.stats.shared_tokens - before == 64 * len(rows)


def test_what_a_slot_takes_while_it_is_filled_is_not_seen() -> None:
    """A decode step runs token 0 through it, here a NaN, in place of its oldest one."""
    params, config = windowed()
    many = (work(f"long {i}", 90, 6) for i in range(999))
    fine = (r for r in many if 0 not in {*r.prompt, *tokens_alone(r, params, config)})
    long = next(fine)
    rows = [work(f"on {i}", 3, 40) for i in range(10)]
    rows += [dataclasses.replace(long, key=i) for i in range(12)]
    ready, filling = engine().compile(), list[int]()

    def watched(params: Any, slots: Any, key: Any, going: Any, enough: Any) -> Any:
        filling.append(int(np.sum(going & ~np.asarray(slots.live))))
        return ready.decode[False](params, slots, key, going, enough)

    own = engine_of(without_token(0, params), config, logprobs=False)
    own._programs = dataclasses.replace(ready, decode={False: watched})
    got = by_key(own.run(rows))
    assert any(filling), "no row was half filled when others were decoded"
    are_alone(rows[10:], got)


def test_logprobs_are_those_of_transformers() -> None:
    """Mistral, every layer of which has a window."""
    built = build("mistral")
    own = engine_of(built.params, built.config, slots=4)
    rows = [work(f"mistral {i}", n, 8, logprobs=2) for i, n in enumerate((3, 40, 90))]
    assert {x.shape[1] for x in own.compile().empty().cache.keys} == {WINDOW}
    for key, answer in by_key(own.run(rows)).items():
        row = next(row for row in rows if row.key == key)
        tokens = np.concatenate([row.prompt, answer.tokens])[None]
        logits = torch_logits(built.torch, tokens)[0, len(row.prompt) - 1 : -1]
        want = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        assert answer.tokens.tolist() == want.argmax(axis=1).tolist()
        assert answer.top_logprobs is not None and answer.top_ids is not None
        best = np.take_along_axis(want, answer.top_ids, axis=1)
        np.testing.assert_allclose(answer.top_logprobs, best, atol=2e-5)
        np.testing.assert_allclose(answer.logprobs, want.max(axis=1), atol=2e-5)


def test_integers_go_round_as_generates_do() -> None:
    """In the same pieces: what a piece sees of those before it was rounded."""
    _, params, config = model(layers=1)
    config = dataclasses.replace(config, windows=(ROUND,))
    own: dict[str, Any] = {"logprobs": False, "cache_dtype": "int8", "slots": 4}
    rows = [work(f"int8 {i}", 2 * PIECE, 16) for i in range(6)]
    how: dict[str, Any] = {"config": config, "key": KEY, "max_new_tokens": 16}
    how |= {"stop_ids": (), "cache_dtype": "int8", "prefill_chunk": PIECE}
    prompts = np.stack([row.prompt for row in rows])
    want = generate(params, prompts, **how).tokens.tolist()
    got = by_key(engine_of(params, config, **own).run(rows))
    assert [got[row.key].tokens.tolist() for row in rows] == want


def test_memory_is_bounded_by_the_windows() -> None:
    params, config = windowed()
    plain = dataclasses.replace(config, windows=None)
    sizes = [slots_for(params, own, 4096, 2 * 10**7) for own in (plain, config)]
    assert 1 < sizes[0] < sizes[1]
