"""An engine on a mesh: one device's answers, slots that stay where they are."""

import dataclasses
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batch_helpers import SAMPLERS, asks, by_key
from sharding_helpers import CONFIG, collectives, explicit, make_params

import jrope
from jrope.batch import running
from jrope.batch.admission import check_mesh, check_slots
from jrope.batch.embeddings import Embedder
from jrope.batch.engine import Engine
from jrope.batch.room import free_memory, slots_for
from jrope.batch.work import Work
from jrope.errors import JropeError
from jrope.forms.structure import Structure
from jrope.generation.sample import Sampler
from jrope.sharding.axes import Axes
from jrope.sharding.meshes import layout_of
from jrope.weights.fuse import fuse

SCORED = ("one", "data=2,model=4")  # log-probabilities take a program more
MESHES = ["data=8,model=1", "data=2,model=4", "data=1,model=8"]
BAD = 33  # a token that no prompt has
UNSCORED = dict.fromkeys(("logprobs", "top_ids", "top_logprobs"))
SLOTS, CAPACITY, PIECE = 16, 64, 16
HOW = {"capacity": CAPACITY, "slots": SLOTS, "piece": PIECE, "chunk": 8}
# Ids of the classes 1, 2, 3 by turns; instead of a third one an answer may end.
TURNS = Structure(
    np.array([[0, 4, -1, -1], [0, -1, 8, -1], [1, -1, -1, 0]], np.int32),
    (np.arange(CONFIG.vocab_size) % 3 + 1).astype(np.int16),
)


def placed(text: str, params: Any = None) -> Any:
    """On that mesh, joined where it splits heads and rows."""
    params = make_params() if params is None else params
    if text == "one":
        return params
    params = jrope.shard(params, jrope.mesh(text), CONFIG)
    return fuse(params) if text == "data=2,model=4" else params


@cache
def engine(text: str) -> Engine:
    how = {**HOW, "logprobs": text in SCORED}
    return Engine(placed(text), CONFIG, key=jax.random.key(3), **how)


def works(count: int) -> list[Work]:
    """Prompts of 1 to 3 pieces, all kinds of samplers, some with stop ids and forms."""
    random, found = np.random.default_rng(4), list[Work]()
    for i in range(count):
        prompt = random.integers(0, BAD, random.integers(1, 40)).astype(np.int32)
        own: dict[str, Any] = {"sampler": SAMPLERS[i % len(SAMPLERS)], "seed": 7 * i}
        own["logprobs"] = 3 if i % 4 == 0 else None
        own["stop_ids"] = (5, 9, 60) if i % 3 else ()
        new = int(random.integers(1, 20))
        own |= asks(i, new)
        found.append(Work(key=i, prompt=prompt, max_new_tokens=new, **own))
    return found


@cache
def one_devices() -> Any:
    return by_key(engine("one").run(works(40)))


def assert_same(got: Any, want: Any, scored: bool = True) -> None:
    assert {*got} == {*want}
    for key, a in want.items():
        b = got[key]
        a = a if scored else dataclasses.replace(a, **UNSCORED)
        assert b.tokens.tolist() == a.tokens.tolist(), key
        assert (b.finish_reason, b.finite) == (a.finish_reason, a.finite)
        assert (b.logprobs is None) == (a.logprobs is None)
        if a.logprobs is not None:
            np.testing.assert_array_equal(b.top_ids, a.top_ids)
            for name in ("logprobs", "top_logprobs"):
                x, y = getattr(b, name), getattr(a, name)
                np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("text", MESHES)
def test_rows_are_one_devices(text: str) -> None:
    rows, scored = works(40), text in SCORED
    if not scored:
        rows = [dataclasses.replace(row, logprobs=None) for row in rows]
    assert_same(by_key(engine(text).run(rows)), one_devices(), scored)


def test_slots_go_round_on_each_device() -> None:
    """Rows many times longer than a window are what `generate` makes of them."""
    config, plain = dataclasses.replace(CONFIG, windows=(5,)), {"stop_ids": ()}
    own = {**plain, "sampler": Sampler(), "logprobs": None}
    own |= {"min_new_tokens": 0, "logit_bias": {}}
    rows = [dataclasses.replace(row, **own) for row in works(20)]
    lengths = [len(row.prompt) for row in rows]
    prompts = np.zeros((len(rows), max(lengths)), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        prompt[: len(row.prompt)] = row.prompt
    how: dict[str, Any] = {"config": config, "max_new_tokens": 20, **plain}
    want = np.asarray(jrope.generate(make_params(), prompts, lengths, **how).tokens)
    mesh = Engine(placed("data=2,model=4"), config, **HOW, logprobs=False)
    got = by_key(mesh.run(rows))
    for row, tokens in zip(rows, want, strict=True):
        assert got[row.key].tokens.tolist() == tokens[: row.max_new_tokens].tolist()


def test_a_rows_place_on_the_mesh_changes_no_bit() -> None:
    own = engine("data=2,model=4")
    for row in works(9)[::4]:
        (got,) = own.run([row])
        want = next(x for x in own.run(works(9)[::-1]) if x.key == row.key)
        np.testing.assert_array_equal(got.logprobs, want.logprobs)
        np.testing.assert_array_equal(got.top_logprobs, want.top_logprobs)


def test_answers_have_their_forms() -> None:
    rows = [dataclasses.replace(row, logprobs=None) for row in works(20)]
    rows[::2] = [dataclasses.replace(row, structure=TURNS) for row in rows[::2]]
    got = by_key(engine("data=2,model=4").run(rows))
    assert_same(got, by_key(engine("one").run(rows)))
    for row in rows[::2]:
        classes = [TURNS.classes[token] for token in got[row.key].tokens]
        ended = got[row.key].tokens[-1] in row.stop_ids
        classes = classes[:-1] if ended and len(classes) % 3 == 0 else classes
        assert classes == [i % 3 + 1 for i in range(len(classes))]


def test_what_a_row_spoils_does_not_reach_the_next_one() -> None:
    params = make_params()
    table = params["model"]["embed_tokens"]["weight"].at[BAD].set(jnp.nan)
    params["model"]["embed_tokens"]["weight"] = table
    own = Engine(placed("data=2,model=4", params), CONFIG, **HOW)
    own._programs, own.key = engine("data=2,model=4").compile(), engine("one").key
    rows = list[Work]()
    for row in works(40):
        nan = np.full(30, BAD, np.int32)
        nan = dataclasses.replace(row, key=f"nan {row.key}", prompt=nan, logprobs=None)
        rows += [row, nan]
    got = by_key(own.run(rows))
    fine = [key for key, x in one_devices().items() if BAD not in x.tokens]
    assert len(fine) > 20
    for key, answer in got.items():
        assert answer.finite or key not in fine
    for key in fine:
        assert got[key].tokens.tolist() == one_devices()[key].tokens.tolist()
    assert not any(got[f"nan {row.key}"].finite for row in works(40))


class Later:
    """A call of the other thread, which begins when somebody waits for it."""

    def __init__(self, calls: list[str], program: Any, *args: Any) -> None:
        self.calls, self.program, self.args = calls, program, args
        calls.append("submitted")

    def result(self) -> Any:
        if self.args:
            self.found, self.args = self.program(*self.args), ()
            self.calls.append("called")
        return self.found


def test_two_threads_call_no_programs_at_once(monkeypatch: Any) -> None:
    """Devices might begin with different ones, and wait for each other for ever."""
    own, calls = Engine(placed("data=1,model=8"), CONFIG, **HOW), list[str]()
    ready = engine("data=1,model=8").compile()

    def watched(name: str) -> Any:
        def called(*args: Any) -> Any:
            calls.append(name)
            return getattr(ready, name)(*args)

        return called

    names = ("extend", "clean")
    own._programs = dataclasses.replace(ready, **{n: watched(n) for n in names})
    pool = SimpleNamespace(submit=lambda *given: Later(calls, *given))
    monkeypatch.setattr(running, "ThreadPoolExecutor", lambda _: nullcontext(pool))
    monkeypatch.setattr(running, "wait", lambda found: [x.result() for x in found])
    given = {"prompt": np.zeros(3 * PIECE + 1, np.int32), "logprobs": None}
    rows = [row for row in works(60) if row.max_new_tokens < PIECE]
    rows = [dataclasses.replace(row, **given) for row in rows]
    assert len(by_key(own.run(rows))) == len(rows)
    waiting = 0
    for name in calls:
        assert not waiting or name not in names, "while the other thread may call one"
        waiting += {"submitted": 1, "called": -1}.get(name, 0)
    assert "extend" in calls and not waiting


def test_one_device_may_be_any() -> None:
    """Slots are where the parameters are, which is not always the default device."""
    params = make_params()
    table = params["model"]["embed_tokens"]["weight"].at[BAD].set(jnp.nan)
    params["model"]["embed_tokens"]["weight"] = table
    own = Engine(jax.device_put(params, jax.devices()[3]), CONFIG, **HOW)
    own.key = engine("one").key
    nan = {"prompt": np.full(30, BAD, np.int32), "logprobs": None}
    rows = [*works(40), dataclasses.replace(works(1)[0], key="nan", **nan)]
    got = by_key(own.run(rows))
    assert not got["nan"].finite
    for key, want in one_devices().items():
        if BAD not in want.tokens:
            assert got[key].tokens.tolist() == want.tokens.tolist()


# --- memory


@pytest.mark.parametrize("text", MESHES)
def test_slots_stay_where_they_are(text: str) -> None:
    """Neither a cache nor a weight goes between devices, nor logits."""
    own, programs = engine(text), engine(text).compile()
    data, model = (own.layout.mesh.shape[name] for name in ("data", "model"))
    width = CONFIG.num_key_value_heads * CONFIG.head_dim
    cache_bytes = 2 * 4 * SLOTS * CAPACITY * width // 8  # a device's
    own_slots = SLOTS // data
    for scored, program in programs.decode.items():
        check_small(program, own_slots, 1, model)
        found = collectives(program.as_text())
        gathered = {(k, s) for k, s in found if k != "all-reduce"}
        wanted = {("all-gather", f"s32[{model},2,{own_slots}]")}
        best = min(20, CONFIG.vocab_size // model) * model
        wanted |= {("all-gather", f"s32[2,{own_slots},{best}]")} if scored else set()
        assert gathered == (wanted if model > 1 else set())
        assert (("all-reduce", "s32[]") in found) == (data > 1)  # who is live
        assert program.memory_analysis().temp_size_in_bytes < 2 * cache_bytes
    check_small(programs.read[PIECE], 1, PIECE, model)  # a line of each group
    check_small(programs.extend, 1, PIECE, model)
    for program in (programs.read[PIECE], programs.extend):
        assert {kind for kind, _ in collectives(program.as_text())} <= {"all-reduce"}
    assert not collectives(programs.clean.as_text())
    for program in programs.enter.values():
        assert not collectives(program.as_text())
    for program in (*programs.enter.values(), programs.extend, programs.clean):
        assert program.memory_analysis().alias_size_in_bytes >= cache_bytes


def check_small(program: Any, rows: int, tokens: int, model: int) -> None:
    """Sums of hidden states, of which each device needs the whole, and small ones."""
    found = collectives(program.as_text())
    hidden = f"f32[{rows},{tokens},{CONFIG.hidden_size}]"
    count = (2 * CONFIG.num_hidden_layers + 1) * (model > 1)
    assert found.pop(("all-reduce", hidden), 0) == count
    sizes = [np.prod([int(n) for n in shape[4:-1].split(",") if n] or [1])
             for kind, shape in found if kind == "all-reduce"]  # fmt: skip
    assert max(sizes, default=0) <= 16 * rows


def test_slots_follow_from_a_devices_memory() -> None:
    params, layout = placed("data=2,model=4"), layout_of(placed("data=2,model=4"))
    share = dataclasses.replace(
        CONFIG, vocab_size=16, intermediate_size=12, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    for memory in (0, 10**6, 3 * 10**6, 10**12):
        alone = slots_for(params, share, 64, memory)
        assert slots_for(params, CONFIG, 64, memory, layout=layout) == 2 * alone
    assert 0 < free_memory(layout) <= free_memory() // 7
    assert Engine(params, CONFIG, capacity=64).stats.slots == 32  # 16 a device on CPUs


def test_fewer_slots_are_still_divided() -> None:
    told: list[str] = []
    own = Engine(placed("data=8,model=1"), CONFIG, **HOW | {"slots": 24},
                 warn=told.append)  # fmt: skip
    assert own.shapes.first == {16: 16} and own.shapes.groups == 8

    def nothing_left(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 3 GiB: fake")

    own.compile = nothing_left
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        list(own.run(works(1)))
    assert own.stats.slots == 8 and len(told) == 1
    assert "with 24 rows at once: going on with 8;" in told[0]


# --- other


def test_vectors_are_one_devices() -> None:
    prompts = [row.prompt.tolist() for row in works(11)]
    got = Embedder(placed("data=2,model=4"), CONFIG)(prompts)
    want = Embedder(make_params(), CONFIG)(prompts)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5)


def test_what_a_mesh_cannot_is_refused() -> None:
    params = make_params()
    split = jrope.shard(params, jrope.mesh("context=2,model=4"), CONFIG)
    for make in (Engine, Embedder):
        with pytest.raises(JropeError, match="context=2, which splits the sequence"):
            make(split, CONFIG, **({"capacity": 64} if make is Engine else {}))
    there = jrope.shard(params, explicit("data=2,model=4"), CONFIG)
    with pytest.raises(JropeError, match=r"explicit axes, want those of jrope\.mesh"):
        Engine(there, CONFIG, capacity=64)
    devices = np.array([SimpleNamespace(process_index=i) for i in range(2)])
    two = SimpleNamespace(axis_types=(), devices=devices)
    far: Any = SimpleNamespace(mesh=two, axes=Axes(), size=lambda _: 1)
    with pytest.raises(JropeError, match="devices of 2 processes, want those of one"):
        check_mesh(far)
    layout = layout_of(placed("data=8,model=1"))
    for slots, nearest in ((3, 8), (13, 16), (19, 16)):
        wanted = f"got {slots}, which the mesh splits 8 ways; .* fits is {nearest}$"
        with pytest.raises(JropeError, match=wanted):
            check_slots(slots, layout)
    check_slots(16, layout)
