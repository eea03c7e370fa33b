"""Rows that begin with the same tokens: these are computed once, and copied."""

import dataclasses
from collections.abc import Iterable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_helpers import (
    SAMPLERS,
    SLOTS,
    by_key,
    engine,
    engine_of,
    ragged,
    tokens_alone,
    without,
    work,
)
from generate_helpers import KEY, model

from jrope.batch.engine import Engine
from jrope.batch.packing import Shapes
from jrope.batch.prefix import Prefix, frequencies
from jrope.batch.running import Run
from jrope.batch.stats import Stats
from jrope.batch.work import Work
from jrope.generation.sample import Sampler
from jrope.model.llama import forward

WIDTH, STEP = 16, 8  # of pieces behind a prefix; prefixes end at multiples of a half


@pytest.fixture(autouse=True)
def _two_rows_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jrope.batch.packing.TOGETHER", 1)


def fresh() -> Engine:
    """The programs of `engine`, but none for what follows a prefix."""
    own = engine_of(*model()[1:])
    own._programs = dataclasses.replace(engine().compile(), share={})
    return own


sharing = cache(fresh)


def behind(
    name: str, shared: int, tail: int, key: Any, new: int = 6, **own: Any
) -> Work:
    """A row that begins with the tokens called so."""
    first = work(name, 96, 1).prompt[:shared]
    row = work(key, tail, new, shared=shared, **own)
    return dataclasses.replace(row, prompt=np.concatenate([first, row.prompt]))


def run(own: Engine, rows: Iterable[Work]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """The answers, and by how much each counter has grown."""
    before = dataclasses.asdict(own.stats)
    got = by_key(own.run(rows))
    after = dataclasses.asdict(own.stats)
    return got, {name: after[name] - before[name] for name in after}


def are_alone(rows: Iterable[Work], got: dict[Any, Any]) -> None:
    for row in rows:
        assert got[row.key].tokens.tolist() == tokens_alone(row), row.key


@pytest.mark.parametrize("shared", [31, 32, 33, 39, 64, 65])
def test_rows_are_what_they_are_alone(shared: int) -> None:
    tails = [1, 7, 9, 16, 17, 25]
    rows = [
        behind("system", shared, tail, f"{shared} {i}", sampler=SAMPLERS[i % 5])
        for i, tail in enumerate(3 * tails)
    ]
    others = [dataclasses.replace(row, key=f"other {row.key}") for row in ragged(7)]
    got, grown = run(sharing(), [*others, *rows])
    are_alone([*rows, *others], got)
    taken = 0 if shared < 2 * WIDTH else shared - shared % STEP
    every = sum(len(row.prompt) for row in [*rows, *others])
    assert grown["shared_tokens"] == taken * len(rows)
    assert grown["prefill_tokens"] == every - taken * (len(rows) - 1)


def test_a_prefix_is_computed_once_however_many_rows_have_it() -> None:
    """They all end at the same step, so that no row holds it in between."""
    rows = [behind("few", 70, 1 + i % 9, i, new=2) for i in range(5 * SLOTS)]
    got, grown = run(sharing(), rows)
    are_alone(rows[:: SLOTS // 2], got)
    assert grown["prefill_tokens"] == 64 + sum(len(row.prompt) - 64 for row in rows)
    assert grown["rows"] == len(rows)


def test_answers_of_one_prompt_share_all_but_its_end() -> None:
    hot = Sampler(temperature=1.5)
    one = work("asked twice", 90, 8, sampler=hot, shared=89)
    rows = [dataclasses.replace(one, key=i, seed=i) for i in range(6)]
    got, grown = run(sharing(), rows)
    are_alone(rows, got)
    assert len({tuple(answer.tokens) for answer in got.values()}) > 1
    assert grown["prefill_tokens"] == 88 + 6 * 2
    assert grown["shared_tokens"] == 6 * 88


def test_more_prefixes_than_are_kept_take_turns() -> None:
    rows = [behind(f"task {i % 9}", 40 + i % 7, 5, i, new=1 + i % 7) for i in range(63)]
    random = np.random.default_rng(0)
    random.shuffle(rows)
    got, grown = run(sharing(), rows)
    are_alone(rows[:20], got)
    assert grown["rows"] == 63 and grown["shared_tokens"] == 63 * 40


def test_order_and_company_change_no_bit() -> None:
    rows = [
        behind("bits", 48, 1 + 3 * i % 40, i, sampler=SAMPLERS[i % 5], logprobs=2)
        for i in range(2 * SLOTS)
    ]
    before, _ = run(sharing(), rows)
    after, _ = run(sharing(), rows[::-1])
    single, _ = run(sharing(), rows[9:10])
    for got in (after, single):
        for key, answer in got.items():
            for f in dataclasses.fields(answer):
                one, two = getattr(answer, f.name), getattr(before[key], f.name)
                np.testing.assert_array_equal(one, two, f.name)


def test_one_program_more_for_all_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # a shape that no other test has
    own = fresh()
    rows = [behind(f"shapes {i % 5}", 32 + 5 * (i % 5), 1 + i, i) for i in range(20)]
    made: list[str] = []

    def heard(event: str, *_: Any, **__: Any) -> None:
        made.append(event) if "backend_compile" in event else None

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        got, grown = run(own, rows)
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert len(made) == grown["compiled"] == 1 and grown["shared_tokens"] > 0
    assert "pieces behind a prefix 1 x 16" in own.programs
    are_alone(rows[:3], got)


def test_what_a_prefix_spoils_does_not_reach_other_rows() -> None:
    bad = 33
    rows: list[Work] = []
    for i in range(4 * SLOTS):  # slots go from one prefix to the next while rows wait
        spoils = i % 3 == 2
        row = behind(f"{i % 12}", 64 if spoils else 40, 3, i)
        rows.append(dataclasses.replace(row, prompt=row.prompt % bad))
        rows[-1].prompt[0] = bad if spoils else 0
    own = without(bad)
    own._programs = sharing().compile()
    got, _ = run(own, rows)
    for row in rows:
        want = tokens_alone(row)
        if row.prompt[0] == bad:
            assert not got[row.key].finite
        elif bad not in want:
            assert got[row.key].tokens.tolist() == want and got[row.key].finite


def begun(rows: Iterable[Work]) -> Run:
    """A run with its first rows in their slots."""
    own, some = sharing(), Stats(slots=SLOTS)
    programs = own.params, own.compile(), own._ruled, own._share
    run = Run(*programs, own.shapes, some, KEY, rows, None)
    run.slots = own.compile().empty()
    run.waiting.read()
    run.fill()
    return run


def test_what_has_begun_is_rows_alone() -> None:
    """Of a run that is taken up in half of the slots."""
    run = begun([behind("again", 64, 4, i) for i in range(40)])
    seating = run.seating
    assert len(seating.kept) == 1
    assert len(seating.rows()) == SLOTS - 2  # two enter together
    assert sorted(row.key for row in run.unfinished()) == [*range(40)]


def test_prefixes_take_a_part_of_the_slots_at_most() -> None:
    rows = [behind(f"one of {i % 20}", 64, 4, i) for i in range(80)]
    run = begun(rows)
    assert len(run.seating.kept) == SLOTS // 4
    assert sorted(row.key for row in run.unfinished()) == [*range(80)]


def test_prefixes_go_when_they_are_not_wanted() -> None:
    rows = [behind(name, 64, 4, i) for i, name in enumerate("AABCDAE")]
    run = begun(rows)
    used = [Prefix.of(rows[i], 64, None) for i in (3, 4, 0, 6)]
    assert [*run.seating.kept] == used  # not B, which is used longest ago
    run.seating.let_go(run.waiting)
    assert not run.seating.kept and len(run.seating.free()) == SLOTS - len(rows)


def greedy(logits: Any, *_: Any, **__: Any) -> Any:
    """In the place of `draw`, most of what compiles."""
    return jnp.argmax(logits, 1).astype(jnp.int32), logits, jnp.ones(len(logits), bool)


def test_keys_turned_otherwise_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jrope.batch.slots.draw", greedy)
    _, params, config = model("dynamic", layers=1, max_position_embeddings=16)
    own = engine_of(params, config, logprobs=False, slots=4, capacity=64, piece=16)
    sizes = [(1, 9), (2, 8), (3, 7), (3, 6), (2, 5), (9, 4)]  # 50 in all, thrice
    rows = [behind("turned", 40, tail, i, new) for i, (tail, new) in enumerate(sizes)]
    got, grown = run(own, rows)
    lengths = [40 + tail + new for tail, new in sizes]
    assert grown["prefill_tokens"] == 4 * 40 + sum(tail for tail, _ in sizes)
    tokens = np.zeros((6, 64), np.int32)
    for line, row in zip(tokens, rows, strict=True):
        whole = [*row.prompt, *got[row.key].tokens]
        line[: len(whole)] = whole
    planned = jnp.asarray(lengths)
    logits, _ = forward(params, tokens, config=config, rope_lengths=planned)
    for row, best in zip(rows, np.asarray(logits.argmax(-1)), strict=True):
        begin, answer = len(row.prompt) - 1, got[row.key].tokens
        np.testing.assert_array_equal(best[begin : begin + len(answer)], answer)


def test_frequencies_are_equal_where_keys_are() -> None:
    dynamic, long = model("dynamic")[2].rope, model("longrope")[2].rope
    trained = dynamic.trained_length or 0
    assert frequencies(dynamic, 5) == frequencies(dynamic, trained) != b""
    assert frequencies(dynamic, trained + 1) != frequencies(dynamic, trained + 2)
    assert frequencies(long, 3) == frequencies(long, 16) != frequencies(long, 17)
    assert frequencies(long, 17) == frequencies(long, 999)
    growing = dataclasses.replace(dynamic, lengths="growing")
    assert frequencies(growing, trained + 1) == b"" == frequencies(None, 3)
    assert frequencies(model()[2].rope, 3) == b""


def test_little_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    shapes = Shapes.of(slots=128, capacity=4096)
    assert shapes.behind == (128, 4)
    rows = {
        (1500, 50): 1472,
        (256, 9): 256,
        (255, 9): 0,
        (800, 832): 0,
        (832, 832): 832,
    }
    for (shared, tail), want in rows.items():
        row = work("x", shared + tail, 1, shared=shared)
        assert shapes.shared(row) == want
        parts = shapes.pieces(row.prompt, want)
        assert sum(map(len, parts)) == shared + tail - want
        assert not want or {len(part) for part in parts[1:]} <= {128}
    row = work("x", 1550, 1, shared=1500)
    assert Shapes.of(slots=1, capacity=4096).shared(row) == 0
    assert Shapes.of(slots=8, capacity=4096).behind == (128, 1)
