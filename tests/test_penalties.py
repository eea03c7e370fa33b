"""What changes logits before a token is drawn: beside formulas in float64."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from batch_helpers import SLOTS, by_key, engine, engine_of, ragged, work
from generate_helpers import KEY, NEW, VOCABULARY, model, prompts, run
from reference import changed_logits
from scipy.special import log_softmax

from jrope.batch.slots import past_of
from jrope.batch.work import Work
from jrope.errors import JropeError
from jrope.generation.loop import decode
from jrope.generation.passes import draw_each
from jrope.generation.past import Past, biases
from jrope.generation.sample import Sampler

Answer = tuple[list[int], list[float]]
STOPS = (5, 9)


def oracle(
    prompt: Sequence[int],
    new: int,
    sampler: Sampler,
    seed: int = 0,
    stop_ids: Sequence[int] = (),
    least: int = 0,
    bias: Mapping[int, float] | None = None,
) -> Answer:
    """Tokens and log-probabilities by transformers' model and formulas in float64."""
    drawn, told = list[int](), list[float]()
    key = jax.random.fold_in(KEY, seed)
    while len(drawn) < new and not (drawn and drawn[-1] in stop_ids):
        with torch.no_grad():
            given = torch.tensor([[*prompt, *drawn]])
            logits = model()[0].model(given, use_cache=False).logits[0, -1].numpy()
        x = changed_logits(
            logits,
            prompt,
            drawn,
            repetition=float(np.asarray(sampler.repetition_penalty)),
            frequency=float(np.asarray(sampler.frequency_penalty)),
            presence=float(np.asarray(sampler.presence_penalty)),
            bias=bias,
            stop_ids=stop_ids,
            least=least,
        )
        if hot := float(np.asarray(sampler.temperature)):
            one = jax.random.fold_in(key, len(drawn))
            x = x / hot + np.asarray(jax.random.gumbel(one, (VOCABULARY,)), np.float64)
        second, best = np.sort(x)[-2:]
        assert best - second > 1e-4, "rounding decides: take another seed"
        drawn.append(int(np.argmax(x)))
        told.append(float(log_softmax(logits.astype(np.float64))[drawn[-1]]))
    return drawn, told


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "frequency": {"sampler": Sampler(frequency_penalty=0.7)},
    "reward": {"sampler": Sampler(frequency_penalty=-1.3)},
    "presence": {"sampler": Sampler(presence_penalty=1.7)},
    "all": {
        "sampler": Sampler(
            repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.9
        ),
        "logit_bias": {3: 1.5, 17: -0.7, 60: 2.0},
    },
    "sampled": {
        "sampler": Sampler(
            temperature=1.2, frequency_penalty=0.9, presence_penalty=-0.5
        ),
        "logit_bias": {0: 0.5, 44: 3.0},
    },
    "banned": {"logit_bias": {i: -100.0 for i in range(0, 60, 2)}},
    "forced": {"logit_bias": {12: 100}},
    "late": {"logit_bias": {5: 100}, "stop_ids": STOPS, "min_new_tokens": 6},
    "at its limit": {"logit_bias": {9: 100}, "stop_ids": STOPS, "min_new_tokens": 16},
    "at once": {"logit_bias": {9: 100}, "stop_ids": STOPS},
}


def rows() -> list[Work]:
    return [
        work(name, 4 + 9 * i, NEW, seed=i, logprobs=0, **own)
        for i, (name, own) in enumerate(CASES.items())
    ]


@cache
def wanted() -> dict[str, Answer]:
    return {
        row.key: oracle(
            row.prompt.tolist(),
            row.max_new_tokens,
            row.sampler,
            row.seed,
            row.stop_ids,
            row.min_new_tokens,
            row.logit_bias,
        )
        for row in rows()
    }


def test_rows_of_an_engine_are_the_formulas() -> None:
    """Whoever is beside them, and the rows beside them stay as they are."""
    free = [dataclasses.replace(row, logprobs=2) for row in ragged(20)]
    got, alone = by_key(engine().run([*rows(), *free])), by_key(engine().run(free))
    again = by_key(engine().run([*free[:3], *rows()[::-1]]))
    for row in rows():
        tokens, told = wanted()[row.key]
        answer = got[row.key]
        assert answer.tokens.tolist() == tokens, row.key
        np.testing.assert_allclose(answer.logprobs, told, atol=2e-5)
        np.testing.assert_array_equal(again[row.key].logprobs, answer.logprobs)
        np.testing.assert_array_equal(again[row.key].tokens, answer.tokens)
        ended = tokens[-1] in row.stop_ids
        assert answer.finish_reason == ("stop" if ended else "length")
    assert [len(got[key].tokens) for key in ("late", "at once")] == [7, 1]
    assert {*got["forced"].tokens.tolist()} == {12}
    assert not {*got["banned"].tokens.tolist()} & {*range(0, 60, 2)}
    for row in free:
        for f in dataclasses.fields(alone[row.key]):
            one, other = (getattr(x[row.key], f.name) for x in (got, alone))
            np.testing.assert_array_equal(one, other)


def test_a_slot_forgets_its_last_row() -> None:
    """More rows than slots, one after the other in each."""
    many = [
        dataclasses.replace(row, key=(row.key, i)) for i in range(4) for row in rows()
    ]
    got = by_key(engine().run(many))
    for row in rows():
        for i in range(4):
            assert got[row.key, i].tokens.tolist() == wanted()[row.key][0], row.key


def test_generate_is_the_formulas() -> None:
    every: dict[str, Any] = {
        "frequency_penalty": [0.7, 0.0, -1.1],
        "presence_penalty": [0.0, 1.9, 0.3],
        "repetition_penalty": [1.0, 1.3, 0.8],
        "temperature": [0.0, 0.0, 0.9],
    }
    bias = [{3: 2.0}, {}, {7: -100, 8: 1.5}]
    sampler = Sampler(**{name: np.float32(x) for name, x in every.items()})
    how: dict[str, Any] = {"stop_ids": STOPS, "min_new_tokens": 4}
    got = run(sampler=sampler, key=KEY, logprobs=True, logit_bias=bias, **how)
    for row, prompt in enumerate(prompts()):
        one = Sampler(**{name: x[row] for name, x in every.items()})
        tokens, told = oracle(prompt, NEW, one, row, STOPS, 4, bias[row])
        count = int(got.lengths[row])
        assert np.asarray(got.tokens)[row, :count].tolist() == tokens
        assert got.logprobs is not None
        np.testing.assert_allclose(got.logprobs[row, :count], told, atol=2e-5)
    whole = {12: 100.0}
    tokens = run(logit_bias=whole, stop_ids=[12], min_new_tokens=3, pad_id=1).tokens
    assert np.asarray(tokens)[:, 3].tolist() == [12] * 3
    assert not np.any(np.asarray(tokens)[:, :3] == 12)


def test_other_numbers_compile_nothing() -> None:
    how: dict[str, Any] = {"max_new_tokens": 5, "stop_ids": STOPS, "logprobs": True}
    run(logit_bias={3: 1.0}, **how)
    before = decode._cache_size()
    run(logit_bias=[{3: -1.0, 8: 2}, {}, {4: 4}], min_new_tokens=2, **how)
    run(logit_bias={1: 1.0}, sampler=Sampler(frequency_penalty=1.0), **how)
    assert decode._cache_size() == before


def test_an_own_sampler_is_given_changed_logits() -> None:
    class Best:
        temperature = 0.0

        def __call__(self, logits: Any, keys: Any, seen: Any) -> Any:
            assert seen.dtype == bool
            seen_once = jnp.where(seen, -jnp.inf, logits)  # nothing comes twice
            return jnp.argmax(seen_once, axis=1).astype(jnp.int32)

    jax.tree_util.register_static(Best)
    how: Any = {"sampler": Best(), "logit_bias": {12: 100.0, 13: 90.0}}
    got = np.asarray(run(**how, stop_ids=[13], min_new_tokens=4).tokens)
    for row, prompt in zip(got.tolist(), prompts(), strict=True):
        assert row[0] == 12 or 12 in prompt
        assert row[4] == 13 or 13 in prompt
        assert len({*prompt, *row[:5]}) == len({*prompt}) + 5


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fresh(Sampler):
    """Nothing comes twice."""

    def __call__(self, logits: Any, keys: Any, seen: Any = None, **own: Any) -> Any:
        assert seen.dtype == bool
        return super().__call__(jnp.where(seen, -jnp.inf, logits), keys, seen, **own)


def test_a_sampler_that_does_more_is_an_own_one() -> None:
    got = np.asarray(run(sampler=Fresh(), logit_bias={12: 100.0}).tokens)
    for row, prompt in zip(got.tolist(), prompts(), strict=True):
        assert row[0] == 12 or 12 in prompt
        assert len({*prompt, *row}) == len({*prompt}) + NEW


def test_numbers_that_a_tree_was_filled_with_are_checked() -> None:
    wrong = jax.tree.map(lambda x: -x, Sampler(repetition_penalty=1.2))
    with pytest.raises(JropeError, match=r"repetition_penalty: got -1\.2"):
        run(sampler=wrong)


# --- the same at positions behind guesses


def test_positions_count_the_guesses_before_them() -> None:
    random = np.random.default_rng(0)
    batch, size, count = 3, 40, 4
    prompt = random.integers(0, size, (batch, 5))
    drawn = random.integers(0, 6, (batch, 9))
    guesses = random.integers(0, 6, (batch, count))
    guesses[0, 2:], guesses[1] = -1, 3  # no idea; and the same again and again
    seen = np.zeros((batch, size), np.int32)
    for row in range(batch):
        seen[row, prompt[row]] = 1
        np.add.at(seen[row], drawn[row], 2)
    own = biases([{3: 1.0}, {}, {4: -2.0, 5: 0.5}])
    stops, least = np.array([[1, -1], [2, 4], [0, 5]], np.int32), np.array([12, 0, 14])
    past = Past(
        seen=jnp.asarray(seen),
        bias=jax.tree.map(jnp.asarray, own),
        stop_ids=jnp.asarray(stops),
        early=jnp.asarray(least - 9, jnp.int32),
    )
    past = past.at_guesses(jnp.asarray(guesses, jnp.int32))
    logits = random.normal(0, 2, (batch * (count + 1), size)).astype(np.float32)
    sampler = Sampler(repetition_penalty=1.4, frequency_penalty=0.3)
    sampler = dataclasses.replace(sampler, presence_penalty=-0.8)
    got = sampler._penalized(past.changed(jnp.asarray(logits)), past.counts())
    got = np.asarray(got).reshape(batch, count + 1, size)
    for row in range(batch):
        for at in range(count + 1):
            before = [t for t in guesses[row, :at].tolist() if t >= 0]
            want = changed_logits(
                logits.reshape(got.shape)[row, at],
                prompt[row].tolist(),
                [*drawn[row].tolist(), *before],
                repetition=1.4,
                frequency=0.3,
                presence=-0.8,
                bias=dict(zip(own.ids[row], own.values[row], strict=True))
                if row != 1
                else {},
            )
            if 9 + at < least[row]:
                want[stops[row][stops[row] >= 0]] = -np.inf
            np.testing.assert_allclose(got[row, at], want, rtol=1e-6, atol=1e-6)


def readers(jaxpr: Any, var: Any) -> set[str]:
    """The primitives that take a variable, inside of `jit` too."""
    found = set[str]()
    for eqn in jaxpr.eqns:
        for at, one in enumerate(eqn.invars):
            if one is not var:
                continue
            inner = eqn.params.get("jaxpr")
            if eqn.primitive.name in ("jit", "pjit"):
                found |= readers(inner.jaxpr, inner.jaxpr.invars[at])
            else:
                found.add(eqn.primitive.name)
    return found


def test_what_rows_hold_is_read_only_where_one_asks() -> None:
    """Of several positions, too, for which nothing is copied before."""
    seen, bias = jnp.zeros((2, 9), jnp.int32), biases([{}, {}])
    none = jnp.zeros(2, jnp.int32)

    def one(seen: Any, values: Any) -> Any:
        own = dataclasses.replace(bias, values=values)
        return Past(seen=seen, bias=own, stop_ids=none[:, None], early=none)

    def several(seen: Any, values: Any, logits: Any, guesses: Any, keys: Any) -> Any:
        sampler = Sampler(temperature=jnp.ones(2), frequency_penalty=jnp.ones(2))
        return draw_each(logits, guesses, sampler, keys, none, one(seen, values))

    keys = jax.random.split(KEY, 2)
    given = jnp.zeros((6, 9)), jnp.zeros((2, 2), jnp.int32), keys
    jaxpr = jax.make_jaxpr(several)(seen, bias.values, *given).jaxpr
    for var in jaxpr.invars[:2]:
        assert readers(jaxpr, var) == {"cond"}


def test_rows_that_are_gone_ask_for_nothing() -> None:
    asking: list[bool] = []
    programs = engine().compile()

    def watched(*given: Any) -> Any:
        slots, block = programs.decode[False](*given)
        past = past_of(slots, slots.steps)
        asking.append(bool(slots.asked.sampler._needs(SLOTS, past)[3]))
        return slots, block

    own = engine_of(*model()[1:], logprobs=False)
    own._programs = dataclasses.replace(programs, decode={False: watched})
    fields: dict[str, Any] = {"logit_bias": {3: 1.0}, "min_new_tokens": 2}
    short = work("asks", 3, 2, sampler=Sampler(frequency_penalty=1.0), **fields)
    assert len([*own.run([short, work("plain", 3, 30)])]) == 2
    assert asking[0] and not any(asking[1:]) and len(asking) > 2


def test_what_rows_hold_is_not_copied() -> None:
    """A step reads it before it counts the token that was drawn."""
    for program in engine().compile().decode.values():
        text, held = program.as_text(), f"s32[{SLOTS},{VOCABULARY}]"
        assert f"= {held}" in text
        assert not re.search(rf"= {re.escape(held)}\S* copy\(", text)


# --- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_new_tokens": -1}, "min_new_tokens: got -1"),
        ({"min_new_tokens": 17}, "got 17, want at most max_new_tokens, 16"),
        ({"logit_bias": 5}, r"logit_bias: got 5, want at most 300 {token id: number"),
        ({"logit_bias": "x"}, "logit_bias: got 'x'"),
        ({"logit_bias": [{}]}, "logit_bias: got 1 of them for 3 rows"),
        ({"logit_bias": {61: 1.0}}, r"ids \[61\] lie outside the vocabulary of 61"),
        ({"logit_bias": {-1: 1.0}}, r"ids \[-1\] lie outside"),
        ({"logit_bias": {10**20: 1.0}}, "logit_bias: got {10{20}: 1.0}, want"),
        ({"logit_bias": {"3": 1.0}}, r"logit_bias: got {'3': 1.0}, want"),
        ({"logit_bias": {3: 101}}, r"logit_bias: got {3: 101}, want"),
        ({"logit_bias": {i: 1 for i in range(301)}}, "got 301 of them, want at most"),
        ({"sequence_bias": {}}, "give logit_bias, of single tokens"),
    ],
)
def test_generate_refuses(options: Any, words: str) -> None:
    with pytest.raises(JropeError, match=words):
        run(**options)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_new_tokens": 5}, "min_new_tokens: got 5, want an integer from 0 to 4"),
        ({"min_new_tokens": 1.0}, "min_new_tokens: got 1.0"),
        ({"logit_bias": {99: 1.0}}, r"logit_bias: ids \[99\] lie outside"),
    ],
)
def test_an_engine_refuses(fields: Any, words: str) -> None:
    with pytest.raises(JropeError, match=f"row 'x': {words}"):
        engine().check(work("x", 3, 4, **fields))
