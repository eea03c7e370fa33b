"""Rows in slots: the same answers as alone, in any company; and what compiles."""

import dataclasses
import gc
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_helpers import (
    CHUNK,
    PIECE,
    SLOTS,
    alone,
    by_key,
    engine,
    engine_of,
    ragged,
    tokens_alone,
    without,
    work,
)
from generate_helpers import model

import jrope.batch.engine
import jrope.batch.programs
from jrope.batch import running
from jrope.batch.engine import Engine
from jrope.batch.packing import WINDOW
from jrope.batch.programs import Programs, compile_programs
from jrope.batch.room import slots_for
from jrope.batch.running import Run
from jrope.batch.slots import empty
from jrope.errors import JropeError
from jrope.forms.rules import ENTRIES
from jrope.generation.sample import Sampler


def same(a: Any, b: Any) -> None:
    """Two answers, to the bit."""
    for f in dataclasses.fields(a):
        np.testing.assert_array_equal(getattr(a, f.name), getattr(b, f.name), f.name)


def test_rows_are_what_generate_makes_of_each_alone() -> None:
    rows = ragged(3 * SLOTS + 1)
    assert {len(row.prompt) // 32 for row in rows} == {0, 1, 2}  # pieces of all numbers
    got = by_key(engine().run(rows))
    assert {*got} == {row.key for row in rows}
    for row in rows:
        want, answer = tokens_alone(row), got[row.key]
        assert answer.tokens.tolist() == want, row.key
        assert answer.tokens.dtype == np.int32 and answer.finite
        ended = want[-1] in row.stop_ids
        assert answer.finish_reason == ("stop" if ended else "length")
        assert answer.logprobs is answer.top_ids is answer.top_logprobs is None
    assert any(row.finish_reason == "stop" for row in got.values())


def test_answers_are_given_while_the_device_decodes() -> None:
    own, given, calls = engine_of(*model()[1:]), threading.Event(), list[bool]()
    programs = engine().compile()

    def decode(*args: Any) -> Any:
        if calls:  # a chunk ago the first row ended
            calls.append(given.wait(60))
        calls.append(True)
        return programs.decode[False](*args)

    own._programs = dataclasses.replace(programs, decode={False: decode})
    order = list[str]()
    for row in own.run([work("short", 5, 2), work("long", 5, 2 * CHUNK)]):
        order.append(str(row.key))
        given.set()
    assert order == ["short", "long"]
    assert len(calls) > 1 and all(calls), "the chunk had to end first"


def test_the_next_prompts_are_read_behind_a_chunk() -> None:
    """Before the host knows what it drew, and whether slots are free for them."""
    rows, ready = ragged(3 * SLOTS), engine().compile()
    calls = list[tuple[str, bool]]()
    here = threading.current_thread()

    def watched(name: str, program: Any) -> Any:
        def called(*args: Any) -> Any:
            calls.append((name, threading.current_thread() is here))
            return program(*args)

        return called

    ways = {
        kind: {n: watched(kind, p) for n, p in getattr(ready, kind).items()}
        for kind in ("read", "enter", "decode")
    }
    own = engine_of(*model()[1:])
    own._programs = dataclasses.replace(ready, **ways)
    got = by_key(own.run(rows))
    assert calls[0] == ("read", True), "these slots are free"
    behind = [calls[i - 1] for i, call in enumerate(calls) if call == ("read", False)]
    assert behind and set(behind) == {("decode", False)}
    names = [name for name, _ in calls]
    assert names.count("enter") == names.count("read")
    assert {key: row.tokens.tolist() for key, row in got.items()} == {
        row.key: tokens_alone(row) for row in rows
    }
    assert own.stats.prefill_tokens == sum(len(row.prompt) for row in rows)


def test_time_in_which_the_device_has_nothing_to_do(monkeypatch: Any) -> None:
    """Behind chunks without prompts, also where some read before have no slots yet."""
    now, take = [0.0], Run.take

    def slow(run: Run, block: Any) -> None:
        now[0] += 1
        take(run, block)

    def slowly(rows: Any) -> Any:
        for row in rows:
            now[0] += 100  # before the first chunk
            yield row

    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(running, "time", clock)
    monkeypatch.setattr(Run, "take", slow)
    own, ready, read = engine_of(*model()[1:]), engine().compile(), list[Any]()

    def reading(*args: Any) -> Any:
        read.append(threading.current_thread() is not threading.main_thread())
        return ready.read[PIECE](*args)

    def entering(*args: Any) -> Any:
        now[0] += 10000  # the device has something to do
        return ready.enter[PIECE](*args)

    ways = {"read": {PIECE: reading}, "enter": {PIECE: entering}}
    own._programs = dataclasses.replace(ready, **ways)
    same = [work(i, PIECE, 4 * CHUNK) for i in range(SLOTS + 2)]
    assert len([*own.run(slowly(same))]) == len(same)
    assert sum(read) == 1 and own.stats.chunks == 8
    assert own.stats.between == own.stats.chunks - sum(read) - 1  # nor after the last


def test_order_and_company_change_no_bit() -> None:
    rows = [dataclasses.replace(row, logprobs=3) for row in ragged(3 * SLOTS)]
    before = by_key(engine().run(rows))
    after = by_key(engine().run(rows[::-1]))
    for row in rows:
        same(after[row.key], before[row.key])
    for row in rows[4:7]:
        same(next(engine().run([row])), before[row.key])


def test_rows_are_filled_while_others_are_decoded() -> None:
    rows = [work(f"on {i}", 3, 40) for i in range(10)]
    rows += [work(f"off {i}", 3, 2) for i in range(6)]
    # Longer than what is filled between two chunks; token 0 must not count as seen.
    new = Sampler(repetition_penalty=100.0)
    many = (work(key, 90, 16, sampler=new) for key in range(999))
    long = next(r for r in many if 0 not in r.prompt and 0 in tokens_alone(r))
    rows += [dataclasses.replace(long, key=f"long {i}") for i in range(12)]
    ready, filling = engine().compile(), list[int]()

    def watched(params: Any, slots: Any, key: Any, going: Any, enough: Any) -> Any:
        filling.append(int(np.sum(going & ~np.asarray(slots.live))))
        return ready.decode[False](params, slots, key, going, enough)

    own = engine_of(*model()[1:])
    own._programs = dataclasses.replace(ready, decode={False: watched})
    got = by_key(own.run(rows))
    assert any(filling), "no row was half filled when others were decoded"
    for row in rows:
        assert got[row.key].tokens.tolist() == tokens_alone(row), row.key


def test_nothing_compiles_after_compile() -> None:
    own = engine()
    own.compile()
    made: list[str] = []

    def heard(event: str, *_: Any, **__: Any) -> None:
        made.append(event) if "backend_compile" in event else None

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        rows = [*ragged(12), work("asks", 3, 4, logprobs=2)]
        assert len(by_key(own.run(rows))) == len(rows)
        assert made == []
        jax.jit(lambda x: x + 1)(np.zeros(3))  # which is heard
        assert made
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)
    assert own.stats.compiled == len(own.programs) == 7
    assert own.programs[2] == "first pieces up to 32, 1 x 32"


def test_logprobs_and_alternatives_are_those_of_the_model() -> None:
    rows = [work(i, 7 + i, 9, logprobs=k) for i, k in enumerate((0, 3, 20, None))]
    got = by_key(engine().run(rows))
    for row in rows[:3]:
        answer, out = got[row.key], alone(row)
        assert answer.logprobs is not None
        np.testing.assert_allclose(answer.logprobs, out.logprobs[0, :9], atol=2e-5)
        if not row.logprobs:
            assert answer.top_ids is answer.top_logprobs is None
            continue
        assert answer.top_ids is not None and answer.top_logprobs is not None
        assert answer.top_ids.shape == answer.top_logprobs.shape == (9, row.logprobs)
        assert np.all(np.diff(answer.top_logprobs) <= 0)
        # Greedy rows draw the best.
        np.testing.assert_array_equal(answer.top_ids[:, 0], answer.tokens)
        np.testing.assert_array_equal(answer.top_logprobs[:, 0], answer.logprobs)
    assert got[3].logprobs is None


def test_caller_stops_rows_and_their_slots_go_on() -> None:
    rows = [work(i, 3 + i, 40) for i in range(2 * SLOTS)]
    full = {row.key: tokens_alone(row) for row in rows}
    seen: dict[Any, list[int]] = {}

    def stopped(row: Any, tokens: np.ndarray) -> int | None:
        assert tokens.tolist() == full[row.key][: len(tokens)]
        seen.setdefault(row.key, []).append(len(tokens))
        return 11 if row.key % 2 and len(tokens) >= 11 else None

    before = engine().stats.decode_tokens
    got = by_key(engine().run(rows, stopped))
    drawn = engine().stats.decode_tokens - before
    assert drawn <= SLOTS * 40 + SLOTS * (11 + 2 * CHUNK), "stopped rows went on"
    for row in rows:
        answer = got[row.key]
        kept = 11 if row.key % 2 else 40
        assert answer.tokens.tolist() == full[row.key][:kept]
        assert answer.finish_reason == ("stop" if row.key % 2 else "length")
        counts = seen[row.key]
        assert counts == sorted({*counts}) and np.diff([0, *counts]).max() <= CHUNK


def test_rows_are_read_as_they_are_needed() -> None:
    read: list[int] = []

    def endless() -> Any:
        for i in range(10**9):
            read.append(i)
            yield work(i, 4, 3)

    answers = engine().run(endless())
    for _ in range(10):
        next(answers)
    assert len(read) < (WINDOW + 10) * SLOTS


def test_no_rows_give_nothing() -> None:
    assert list(engine().run([])) == []


def test_a_row_that_cannot_be_run_ends_the_run() -> None:
    with pytest.raises(JropeError, match="row 'long': max_new_tokens: got 110"):
        list(engine().run([work("fine", 3, 4), work("long", 3, 110)]))


def test_a_row_may_fill_its_slot_to_the_end() -> None:
    row = work("full", 92, 20)
    got = by_key(engine().run([row, *ragged(7)]))
    assert got["full"].tokens.tolist() == tokens_alone(row)


def test_stats_add_up() -> None:
    own, rows = engine(), ragged(11)
    before = dataclasses.asdict(own.stats)
    got = by_key(own.run(rows))
    after = dataclasses.asdict(own.stats)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["rows"] == 11
    assert grown["prefill_tokens"] == sum(len(row.prompt) for row in rows)
    assert grown["padded_tokens"] % 8 == 0
    assert grown["decode_tokens"] == sum(len(row.tokens) for row in got.values())
    assert grown["slot_steps"] == SLOTS * grown["steps"]
    assert grown["steps"] <= CHUNK * grown["chunks"]
    assert 0 < own.stats.occupancy <= 1
    assert grown["seconds"] >= grown["waited"] > 0


# --- memory


def test_slots_are_updated_in_place() -> None:
    own = engine()
    compiled = own.compile()
    dtype, how = "float32", {"config": own.config, "count": SLOTS}
    state = empty.eval_shape(**how, capacity=own.capacity, dtype=jnp.dtype(dtype))
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.cache))
    every = [*compiled.decode.values(), *compiled.enter.values(), compiled.extend]
    for program in [*every, compiled.clean]:
        assert program.memory_analysis().alias_size_in_bytes >= size
    assert compiled.decode[False].memory_analysis().temp_size_in_bytes < size


def test_slots_follow_from_memory() -> None:
    _, params, config = model()
    state = empty.eval_shape(config=config, count=1, capacity=96, dtype=jnp.float32)
    slot = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    own = slot + 16 * config.vocab_size
    line = 2 * config.num_hidden_layers * config.num_key_value_heads
    line *= config.head_dim * 4 * 96
    fixed = 2048 * 3 * (64 + 96) * 4 + 2 * slot + 2 * line
    for count in (1, 2, 7):
        memory = int((fixed + own * count) / 0.9) + 2
        assert slots_for(params, config, 96, memory) == count
        more = memory + 8 * config.vocab_size * count / 0.9
        assert slots_for(params, config, 96, int(more) + 1, True) == count
        assert slots_for(params, config, 96, memory, True) == max(count - 1, 1)
    assert slots_for(params, config, 96, 0) == 1
    assert slots_for(params, config, 96, 10**12) == 16  # on a CPU
    assert 1 <= Engine(params, config, capacity=96).stats.slots <= 16


class Exhausted:
    """A program that once finds no memory left."""

    def __init__(self, program: Any, after: int) -> None:
        self.program, self.left = program, after

    def __call__(self, *args: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GiB: fake")
        return self.program(*args)


def failing(own: Engine, programs: Programs, after: int, kind: str = "decode") -> None:
    [(name, program), *_] = getattr(programs, kind).items()
    own._programs = dataclasses.replace(
        programs, **{kind: {name: Exhausted(program, after)}}
    )


@pytest.mark.parametrize(
    ("kind", "after"), [("decode", 3), ("read", 1), ("read", 11), ("enter", 11)]
)
def test_out_of_memory_halves_the_slots_and_loses_nothing(
    kind: str, after: int
) -> None:
    """With prompts read ahead, too, and where these are what fails."""
    told: list[str] = []
    own = engine_of(*model()[1:], logprobs=False, warn=told.append)
    failing(own, engine().compile(), after, kind)
    rows = ragged(2 * SLOTS)
    got = by_key(own.run(rows))
    assert {key: row.tokens.tolist() for key, row in got.items()} == {
        row.key: tokens_alone(row) for row in rows
    }
    assert own.stats.slots == 8 and own.stats.restarts == 1
    assert len(told) == 1 and "with 16 rows at once: going on with 8" in told[0]
    own.stats.slots = 1  # as it would be after another time
    failing(own, own.compile(), after=1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        list(own.run(rows))


@pytest.mark.parametrize("kind", ["decode", "read", "enter"])
def test_out_of_memory_frees_the_slots(kind: str, monkeypatch: Any) -> None:
    """Before the next ones are there, which is not left to the garbage collector."""
    runs, left = list[weakref.ref[Any]](), list[bool]()

    def begun(*given: Any) -> Run:
        left.extend(run() is not None for run in runs)
        runs.append(weakref.ref(run := Run(*given)))
        return run

    monkeypatch.setattr(jrope.batch.engine, "Run", begun)
    own = engine_of(*model()[1:], logprobs=False, warn=lambda _: None)
    after = 2 if kind == "decode" else SLOTS // 2 + 2
    failing(own, engine().compile(), after, kind)
    monkeypatch.setattr(own, "compile", lambda: own._programs or smaller)
    smaller = engine_of(*model()[1:], logprobs=False, slots=SLOTS // 2).compile()
    gc.collect()
    gc.disable()
    try:
        assert len([*own.run(ragged(2 * SLOTS))]) == 2 * SLOTS
    finally:
        gc.enable()
    assert left == [False]


def test_programs_may_run_once_before_the_first_row(monkeypatch: Any) -> None:
    """As they do on GPUs; memory may run out then as later."""
    ran: list[Any] = []

    def counted(programs: Any, params: Any, nobody: Any) -> None:
        if not ran:
            ran.append(None)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GiB: fake")
        run_once({n: counts(n, p) for n, p in programs.items()}, params, nobody)

    def counts(name: Any, program: Any) -> Any:
        return lambda *args: ran.append(name) or program(*args)

    def compiled(*args: Any, **how: Any) -> Programs:
        return compile_programs(*args, **how | {"warm": True})

    run_once = jrope.batch.programs._run_once
    monkeypatch.setattr(jrope.batch.programs, "_run_once", counted)
    monkeypatch.setattr(jrope.batch.engine, "compile_programs", compiled)
    how = {"logprobs": False, "structures": True, "warn": lambda _: None}
    own = engine_of(*model()[1:], **how)
    rows = ragged(SLOTS)
    got = by_key(own.run(rows))
    assert own.stats.slots == 8 and (False, ENTRIES) in ran
    assert own.stats.compiled == len(own.programs)
    assert len(set(ran)) == len(ran) == len(own.programs)  # "clean" computes nothing
    assert {key: row.tokens.tolist() for key, row in got.items()} == {
        row.key: tokens_alone(row) for row in rows
    }


# --- NaN


def test_what_a_row_spoils_does_not_reach_the_next_one() -> None:
    bad = 33
    own = without(bad)
    nan = dataclasses.replace(work("nan", 50, 6), prompt=np.full(50, bad, np.int32))
    rows: list[Any] = []
    for i in range(3 * SLOTS):
        row = work(i, 3 + i, 5, stop_ids=())
        row = dataclasses.replace(row, prompt=row.prompt % bad)
        rows += [row, dataclasses.replace(nan, key=f"nan {i}")]
    got = by_key(own.run(rows))
    for key, answer in got.items():
        assert answer.finite == (isinstance(key, int) and bad not in answer.tokens[:-1])
    for row in rows[::2]:
        want = tokens_alone(row)
        if bad not in want:
            assert got[row.key].tokens.tolist() == want


def test_a_last_token_may_spoil_what_no_logits_show() -> None:
    rows = [work(key, 60, 4) for key in range(40)]
    drawn = {row.key: tokens_alone(row) for row in rows}
    row = next(r for r in rows if drawn[r.key][3] not in {*r.prompt, *drawn[r.key][:3]})
    bad = drawn[row.key][3]
    first = [dataclasses.replace(row, key=f"spoils {i}") for i in range(SLOTS)]
    later = [work(f"later {i}", 3, 6) for i in range(2 * SLOTS)]
    got = by_key(without(bad).run([*first, *later]))
    assert all(got[row.key].tokens[-1] == bad for row in first)
    fine = [r for r in later if bad not in {*r.prompt, *tokens_alone(r)}]
    assert len(fine) > SLOTS
    for row in [*first, *fine]:
        assert got[row.key].finite, row.key
        assert got[row.key].tokens.tolist() == tokens_alone(row)
