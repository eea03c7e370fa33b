"""Rotary embeddings against the papers, transformers, FastChat and Meta's rotation.

Every test of a method runs over one table, `CASES`.
"""

import dataclasses
import doctest
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st

import jrope.frequencies
import jrope.rope
from jrope.errors import JropeError
from jrope.rope import (
    ROPE_TYPES,
    DynamicNTK,
    DynamicYarn,
    Linear,
    Llama3,
    LongRope,
    NTKAware,
    Proportional,
    Rope,
    Yarn,
    half_to_interleaved,
    interleaved_to_half,
    rotate,
    table,
)

ULP = 2.0**-23  # of float32: the spacing of [1, 2), and the largest relative spacing


class Case(NamedTuple):
    """One configuration: our method, and the words of a config.json for the same."""

    method: Any
    parameters: dict[str, Any]
    max_position_embeddings: int
    head_dim: int = 128

    @property
    def trained(self) -> int:
        """The last length before anything changes: O where there is one, else M."""
        key = "original_max_position_embeddings"
        return self.parameters.get(key, self.max_position_embeddings)

    def rope(self, **fields: Any) -> Rope:
        """Our description of the case."""
        share = self.parameters.get("partial_rotary_factor", 1.0)
        if self.parameters["rope_type"] == "proportional":
            share = 1.0  # it has its own meaning there
        theta, rotary_dim = self.parameters["rope_theta"], int(self.head_dim * share)
        return Rope(theta=theta, rotary_dim=rotary_dim, scaling=self.method, **fields)

    def truth(self, length: int) -> reference.Frequencies:
        """Frequencies and scaling from the papers."""
        known = self.parameters, self.max_position_embeddings, self.head_dim
        return reference.from_hf(*known, length)


def hf(rope_type: str, theta: float = 10000.0, **fields: Any) -> dict[str, Any]:
    """A `rope_parameters` dictionary; `original` is short for the long key."""
    if original := fields.pop("original", None):
        fields["original_max_position_embeddings"] = original
    return {"rope_type": rope_type, "rope_theta": theta, **fields}


def _divisors(pairs: int, last: float) -> tuple[float, ...]:
    return tuple(
        round(1 + (last - 1) * (i / (pairs - 1)) ** 2, 3) for i in range(pairs)
    )


def _longrope(dim: int, last: float, length: int, max_length: int, **f: Any) -> Case:
    lists: dict[str, Any] = {
        "short_factor": _divisors(dim // 2, 1.5),
        "long_factor": _divisors(dim // 2, last),
    }
    theta = f.pop("theta", 10000.0)
    given: dict[str, Any] = {"factor": max_length / length, **f}
    method = LongRope(**lists, original_length=length, **given)
    lists = {name: list(values) for name, values in lists.items()}
    return Case(
        method, hf("longrope", theta, **lists, original=length, **f), max_length, dim
    )


def _yarn(dim: int, theta: float, length: int, factor: float, **f: Any) -> Case:
    method = Yarn(factor=factor, original_length=length, **f)
    parameters = hf("yarn", theta, factor=factor, original=length, **f)
    return Case(method, parameters, int(length * factor), dim)


def _dynamic_yarn(
    dim: int, theta: float, length: int, tuned: float = 1.0, **f: Any
) -> Case:
    method = DynamicYarn(original_length=length, factor=tuned, **f)
    parameters = hf("dynamic-yarn", theta, original=length, finetuned=tuned > 1, **f)
    return Case(method, parameters, int(length * tuned), dim)


def _llama3(dim: int, factor: float, length: int, low: float, high: float) -> Case:
    ends = {"low_freq_factor": low, "high_freq_factor": high}
    method = Llama3(factor=factor, original_length=length, **ends)
    parameters = hf("llama3", 500000.0, factor=factor, original=length, **ends)
    return Case(method, parameters, 131072, dim)


CASES: dict[str, list[Case]] = {
    "default": [
        Case(None, hf("default"), 4096),  # Llama 2
        Case(None, hf("default", 500000.0), 8192),  # Llama 3
        Case(None, hf("default", 1000000.0), 32768, 96),
        Case(None, hf("default"), 2048, 64),
        Case(None, hf("default"), 256, 8),
    ],
    "linear": [
        Case(Linear(factor=8), hf("linear", factor=8.0), 16384),  # LongChat
        Case(Linear(factor=3), hf("linear", 500000.0, factor=3.0), 2048, 64),
        Case(Linear(factor=2.5), hf("linear", 1e6, factor=2.5), 4096, 96),
        Case(
            Linear(factor=2),
            hf("linear", factor=2.0, partial_rotary_factor=0.5),
            2048,
            64,
        ),
    ],
    "ntk": [
        Case(NTKAware(factor=4), hf("ntk", factor=4.0), 4096),
        Case(NTKAware(factor=2.5), hf("ntk", 1e6, factor=2.5), 4096, 64),
        Case(NTKAware(factor=8), hf("ntk", 500000.0, factor=8.0), 256, 8),
    ],
    "dynamic": [
        Case(
            DynamicNTK(factor=2, original_length=4096),
            hf("dynamic", factor=2.0),
            4096,
        ),
        Case(
            DynamicNTK(factor=4, original_length=2048),
            hf("dynamic", 500000.0, factor=4.0),
            2048,
            64,
        ),
        Case(
            DynamicNTK(factor=1.7, original_length=3000),
            hf("dynamic", 1e6, factor=1.7),
            3000,
            96,
        ),
        Case(
            DynamicNTK(factor=3, original_length=256),
            hf("dynamic", factor=3.0, partial_rotary_factor=0.25),
            256,
            32,
        ),
    ],
    "yarn": [
        _yarn(128, 10000.0, 4096, 32.0),  # Yarn-Llama-2-128k
        _yarn(128, 1e6, 32768, 4.0),  # Qwen 2.5
        _yarn(64, 10000.0, 4096, 40.0, mscale=0.707, mscale_all_dim=0.707),
        _yarn(64, 10000.0, 4096, 40.0, mscale=1.2, mscale_all_dim=0.8),
        _yarn(64, 10000.0, 4096, 40.0, mscale=0.5),  # alone it is not read
        _yarn(64, 150000.0, 4096, 32.0, truncate=False),  # gpt-oss
        _yarn(96, 500000.0, 8192, 4.0, attention_factor=1.25),
        _yarn(96, 10000.0, 2048, 3.0, beta_fast=16.0, beta_slow=2.0),
        _yarn(8, 10000.0, 64, 2.0),  # all pairs on the ramp or past it
        _yarn(64, 10000.0, 65536, 2.0),  # the ramp would end past the last pair
        _yarn(64, 10.0, 1000, 2.0),  # and past the last channel
        _yarn(8, 10000.0, 6, 2.0),  # no ramp: a step
        Case(  # factor inferred: M / O
            Yarn(factor=16.0, original_length=4096),
            hf("yarn", factor=None, original=4096),
            65536,
        ),
    ],
    "dynamic-yarn": [
        _dynamic_yarn(128, 10000.0, 4096),
        _dynamic_yarn(64, 500000.0, 8192, 4.0),  # tuned at four times its length
        _dynamic_yarn(96, 1e6, 3000, 1.5, beta_fast=16.0, beta_slow=2.0),
        _dynamic_yarn(8, 10000.0, 64),
    ],
    "llama3": [
        _llama3(128, 8.0, 8192, 1.0, 4.0),  # Llama 3.1
        _llama3(64, 32.0, 8192, 1.0, 4.0),  # Llama 3.2 1B
        _llama3(96, 4.0, 4096, 1.5, 6.0),
    ],
    "longrope": [
        _longrope(96, 64.0, 4096, 131072),  # Phi-3-mini-128k; factor inferred
        _longrope(128, 12.0, 8192, 32768, factor=3.0, theta=500000.0),
        _longrope(64, 40.0, 2048, 65536, attention_factor=1.19),
        _longrope(8, 5.0, 256, 256),  # M = O: no scaling of attention
    ],
    "proportional": [
        Case(
            Proportional(partial_rotary_factor=0.25),
            hf("proportional", 1e6, partial_rotary_factor=0.25),
            131072,
        ),
        Case(
            Proportional(partial_rotary_factor=0.6, factor=3),
            hf("proportional", factor=3.0, partial_rotary_factor=0.6),
            4096,
            96,
        ),
        Case(Proportional(), hf("proportional"), 4096, 64),
    ],
}


def each(cases: dict[str, list[Case]]) -> Any:
    """Parametrize over a table of cases, with names such as yarn-2."""
    rows = [(f"{k}-{i}", case) for k in cases for i, case in enumerate(cases[k])]
    return pytest.mark.parametrize(
        "case", [c for _, c in rows], ids=[n for n, _ in rows]
    )


LENGTH_CASES = {k: CASES[k] for k in ("dynamic", "dynamic-yarn", "longrope")}
FIRST_CASES = {name: cases[:1] for name, cases in CASES.items()}
FIXED_CASES = {k: v for k, v in CASES.items() if k not in LENGTH_CASES}
NOT_HF = ("ntk", "dynamic-yarn")  # what transformers does not have
HF_CASES = {k: v for k, v in CASES.items() if k not in NOT_HF}


def sample(last: int, count: int = 400) -> np.ndarray:
    """Positions below `last`: both ends, the powers of two and random ones."""
    powers = 2 ** np.arange(last.bit_length() - 1)
    edges = np.concatenate([np.arange(4), powers - 1, powers, last - 1 - np.arange(4)])
    random = np.random.default_rng(0).integers(0, last, count - edges.size)
    return np.concatenate([edges, random]).astype(np.int32)


def plain(**fields: Any) -> Rope:
    """A small rope for tests that are not about methods."""
    defaults: dict[str, Any] = {"theta": 10000.0, "rotary_dim": 16}
    return Rope(**(defaults | fields))


def random_array(*shape: int, seed: int = 0) -> jax.Array:
    """Normal random numbers, float32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def assert_same(left: Any, right: Any) -> None:
    """Bit for bit, over pairs of arrays."""
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def errors(got: Any, want: Any) -> np.ndarray:
    """|got - want| in float64, cos and sin stacked: [2, ...]."""
    return np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))


# The table of cases


def test_every_method_has_cases() -> None:
    assert set(CASES) == {"default", *ROPE_TYPES}
    for name, method in ROPE_TYPES.items():
        assert {type(case.method) for case in CASES[name]} == {method}


@each(CASES)
def test_equal_descriptions_are_one_key(case: Case) -> None:
    again = dataclasses.replace(case.rope())
    if case.method is not None:
        again = dataclasses.replace(again, scaling=dataclasses.replace(case.method))
    assert again == case.rope() and hash(again) == hash(case.rope())
    assert again != case.rope(precision="accurate")
    chex.clear_trace_counter()

    @partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def traced(rope: Rope, positions: jax.Array) -> Any:
        return table(rope, positions, length=8)

    assert_same(traced(case.rope(), jnp.arange(8)), traced(again, jnp.arange(8)))


@each(CASES)
def test_trained_length_and_need_of_length(case: Case) -> None:
    rope = case.rope()
    depends = isinstance(case.method, DynamicNTK | DynamicYarn | LongRope)
    stretched_over = depends or isinstance(case.method, Yarn | Llama3)
    assert rope.trained_length == (case.trained if stretched_over else None)
    assert rope.needs_length == depends


# Against the papers (tests/reference.py)


def lengths_of(case: Case) -> list[int]:
    """Below, at and past the trained length, and far past it."""
    return [case.trained - 1, case.trained, case.trained + 1, 131072]


@each(CASES)
def test_frequencies_match_reference(case: Case) -> None:
    """float64 to a few of its ulps, float32 to its.

    An exponent rounded by u moves theta ** -e by e ln(theta) u <= 14 u; llama3's and
    yarn's ramp ends are a difference, whose error the factor s can magnify.
    """
    magnified = getattr(case.method, "factor", None) or 1
    steps = 16 + (4 * magnified if isinstance(case.method, Llama3) else 0)
    for length in lengths_of(case):
        truth, scaling = case.truth(length)
        for dtype, unit in ((np.float64, 2.0**-52), (np.float32, ULP)):
            got, got_scaling = case.rope().frequencies(length, dtype)
            assert got.dtype == dtype and got_scaling == pytest.approx(scaling, 1e-14)
            np.testing.assert_allclose(got.astype(np.longdouble), truth, steps * unit)


@each(CASES)
def test_parity_table_is_near_the_truth(case: Case) -> None:
    """p f (16 + 1) ulp: the frequency's error and the product's, times the position."""
    for length in lengths_of(case):
        positions = sample(length)
        f, scaling = case.truth(length)
        got = table(case.rope(), positions, length=length)
        angles = positions[:, None] * f.astype(np.float64)
        steps = 17 + (4 * case.method.factor if isinstance(case.method, Llama3) else 0)
        bound = scaling * (angles * steps * ULP + 2 * ULP)
        error = errors(got, reference.table(f, scaling, positions))
        assert (error <= bound).all(), (error / bound).max()


@each(CASES)
def test_accurate_table_is_the_truth(case: Case) -> None:
    """Up to 16 million; eager, jitted, and with a traced length where one is read."""
    rope = case.rope(precision="accurate")
    traced = jax.jit(lambda p, n: table(rope, p, length=n))
    for last, bound in ((2**20, 2e-7), (2**24, 4e-7)):
        positions = sample(last)
        f, scaling = case.truth(last)
        want = reference.table(f, scaling, positions)
        got = table(rope, positions, length=last)
        assert_same(jax.jit(partial(table, rope, length=last))(positions), got)
        assert got[0].dtype == got[1].dtype == jnp.float32
        assert errors(got, want).max() <= bound * scaling
        if rope.needs_length:
            assert errors(traced(positions, last), want).max() <= bound * scaling


@each(FIXED_CASES)
@pytest.mark.parametrize("ratio", [3, 2.5])
def test_accurate_condensed_table_is_the_truth(case: Case, ratio: float) -> None:
    f, scaling = case.truth(2**20)
    want = reference.table(f / np.longdouble(ratio), scaling, sample(2**20))
    rope = case.rope(precision="accurate", condense=ratio)
    assert errors(table(rope, sample(2**20)), want).max() <= 2e-7 * scaling


# Against transformers


class HFTable(NamedTuple):
    """What LlamaRotaryEmbedding computes."""

    inv_freq: np.ndarray
    scaling: float
    cos: np.ndarray
    sin: np.ndarray


def hf_table(case: Case, positions: np.ndarray, length: int) -> HFTable:
    """A new module per call, for it remembers; it takes n from the largest position."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    module = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=case.head_dim,
            head_dim=case.head_dim,
            num_attention_heads=1,
            max_position_embeddings=case.max_position_embeddings,
            rope_parameters=dict(case.parameters),
        )
    )
    known = torch.tensor([[*positions.tolist(), length - 1]])
    cos, sin = (x[0, :-1].numpy() for x in module(torch.zeros(1), known))
    pairs = cos.shape[-1] // 2
    np.testing.assert_array_equal(cos[:, :pairs], cos[:, pairs:])
    inv_freq, scaling = module.inv_freq.numpy(), float(module.attention_scaling)
    return HFTable(inv_freq, scaling, cos[:, :pairs], sin[:, :pairs])


def hf_lengths(case: Case) -> Iterator[tuple[int, np.ndarray]]:
    """Lengths around the trained one and 128k, with the listed positions they hold."""
    trained = case.trained
    listed = [0, 1, 257, trained - 1, trained, trained + 1, 4095, 131071]
    for length in (trained, trained + 1, 4096, 131072):
        yield length, np.minimum(listed, length - 1)


def ulps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many float32 apart, of numbers of one sign."""
    return np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32))


@each(HF_CASES)
def test_matches_transformers(case: Case) -> None:
    """Frequencies within 2 ulp, and cos and sin no further than those put them.

    Torch's own power differs between its builds for different processors, so a rare
    frequency is 1 or 2 ulp off: u ulp move the angle by p f u 2**-23, and two different
    products round differently, by half an ulp each.  Where the frequencies have the
    same bits, which is nearly everywhere, so have the angles, and only cos and sin can
    differ: by 1 ulp of the result's scale (6e-8 below 1).
    """
    rope = case.rope(precision="parity")
    for length, positions in hf_lengths(case):
        theirs = hf_table(case, positions, length)
        inv_freq, scaling = rope.frequencies(length)
        off = ulps(inv_freq, theirs.inv_freq)
        assert off.max() <= 2
        assert scaling == pytest.approx(theirs.scaling, rel=1e-15)
        angle = positions[:, None] * inv_freq.astype(np.float64)
        bound = scaling * np.where(off, angle * (off + 1) * ULP, 0)
        bound += np.spacing(np.float32(scaling)) / (2 if scaling == 1 else 1)
        error = errors(table(rope, positions, length=length), theirs[2:])
        assert (error <= bound).all(), (error / bound).max()


@pytest.mark.parametrize("name", HF_CASES)
def test_frequencies_have_the_bits_of_transformers(name: str) -> None:
    """All but a few: 100 % would need the very same build of torch."""
    same = [
        ulps(case.rope().frequencies(n)[0], hf_table(case, positions, n).inv_freq) == 0
        for case in HF_CASES[name]
        for n, positions in hf_lengths(case)
    ]
    assert np.concatenate(same).mean() > 0.96


# Against FastChat


@pytest.mark.parametrize("ratio", [2, 3, 8, 2.5, 10])
@pytest.mark.parametrize("jit", [False, True])
def test_condense_matches_fastchat(ratio: float, jit: bool) -> None:
    """Equal angles to the bit, hence cos and sin to 1 ulp, in its shape."""
    rope = plain(rotary_dim=64, condense=ratio)
    want = reference.fastchat_table(64, ratio)
    positions = np.arange(want[0].shape[2])
    run = jax.jit(partial(table, rope)) if jit else partial(table, rope)
    got = [jnp.concatenate([x, x], axis=-1)[None, None] for x in run(positions)]
    assert got[0].shape == want[0].shape == (1, 1, int(2048 * ratio), 64)
    assert errors(got, want).max() <= 2.0**-24


@pytest.mark.parametrize("ratio", [2, 8])
def test_condense_equals_linear_for_powers_of_two(ratio: int) -> None:
    linear = plain(rotary_dim=64, scaling=Linear(factor=ratio))
    condensed = plain(rotary_dim=64, condense=ratio)
    assert_same(table(condensed, sample(2**20)), table(linear, sample(2**20)))


def test_condense_is_not_linear_for_three() -> None:
    positions = np.arange(32768)
    linear = table(plain(rotary_dim=128, scaling=Linear(factor=3)), positions)
    condensed = table(plain(rotary_dim=128, condense=3), positions)
    assert 3e-4 < errors(condensed, linear).max() < 3e-3


@pytest.mark.parametrize("precision", ["parity", "accurate"])
def test_condense_and_scaling_add_up(precision: Any) -> None:
    both = plain(condense=2, scaling=Linear(factor=4), precision=precision)
    one = plain(condense=8, precision=precision)
    assert_same(table(both, sample(2**16)), table(one, sample(2**16)))


# Tracing, lengths and batches


@each(CASES)
def test_jit_changes_nothing(case: Case) -> None:
    """XLA rewrites powers and divisions by constants; it must not get at ours.

    The accurate tables have the same check where they meet the truth.
    """
    run = partial(table, case.rope(), length=131072)
    assert_same(run(sample(131072)), jax.jit(run)(sample(131072)))


@pytest.mark.parametrize("ratio", [2, 3, 2.5, 7.3])
@pytest.mark.parametrize("precision", ["parity", "accurate"])
def test_jit_changes_nothing_when_condensed(ratio: float, precision: Any) -> None:
    run = partial(table, plain(condense=ratio, precision=precision))
    assert_same(run(sample(2**20)), jax.jit(run)(sample(2**20)))


@each(FIRST_CASES | LENGTH_CASES)
@pytest.mark.parametrize("precision", ["parity", "accurate"])
def test_length_is_traced_not_static(case: Case, precision: Any) -> None:
    """One compilation for all lengths, and the same numbers as with an integer.

    The same to the bit, except for dynamic NTK: its power, taken on the device, may
    round a frequency to the neighbouring float32 (1 ulp, so p f 2**-22 in the angle),
    or in 48 bits.
    """
    rope, positions = case.rope(precision=precision), sample(case.trained)
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def traced(positions: Any, length: Any) -> Any:
        return table(rope, positions, length=length)

    for length in lengths_of(case):
        want = table(rope, positions, length=length)
        got = traced(positions, length)
        if not isinstance(case.method, DynamicNTK):
            assert_same(got, want)
            continue
        angle = positions[:, None] * case.truth(length)[0].astype(np.float64)
        slack = angle * 2 * ULP if precision == "parity" else 0
        assert (errors(got, want) <= slack + ULP / 2).all()


@each({name: cases[:2] for name, cases in LENGTH_CASES.items()})
@pytest.mark.parametrize("precision", ["parity", "accurate"])
def test_each_row_has_its_own_length(case: Case, precision: Any) -> None:
    rope = case.rope(precision=precision)
    lengths = np.array(lengths_of(case), np.int32)
    rows = sample(case.trained, 64)[None, :] + np.arange(4, dtype=np.int32)[:, None]
    want = [table(rope, p, length=int(n)) for p, n in zip(rows, lengths, strict=True)]
    want = [np.stack(x) for x in zip(*want, strict=True)]
    assert_same(table(rope, rows, length=lengths), want)

    def run(positions: Any, length: Any) -> Any:
        return table(rope, positions, length=length)

    traced = jax.jit(run)(rows, lengths)
    mapped = jax.jit(jax.vmap(run))(rows, lengths)
    slack = 131072 * 2 * ULP if precision == "parity" else ULP
    slack = slack if isinstance(case.method, DynamicNTK) else 0
    for got in (traced, mapped):
        assert errors(got, want).max() <= slack
    assert errors(want[0][1], want[0][2]).max() > 0.01  # they do differ


@each(LENGTH_CASES)
def test_length_is_needed_past_the_trained_length(case: Case) -> None:
    rope, trained = case.rope(), case.trained
    inside = np.array([0, trained - 1])
    assert_same(table(rope, inside), table(rope, inside, length=trained))
    name = type(case.method).__name__
    with pytest.raises(JropeError, match=rf"length: got None with positions.*{name}"):
        table(rope, np.array([0, trained]))
    with pytest.raises(JropeError, match="give the planned total length"):
        jax.jit(lambda p: table(rope, p))(inside)


def test_length_is_not_read_without_need() -> None:
    rope, positions = plain(scaling=Linear(factor=3)), np.arange(9)
    assert_same(table(rope, positions), table(rope, positions, length=10**6))


@pytest.mark.parametrize("precision", ["parity", "accurate"])
@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64"]
)
def test_positions_of_any_integer_type(dtype: str, precision: Any) -> None:
    rope = plain(condense=3, precision=precision)
    positions = np.array([[0, 1, 2], [99, 100, 127]])
    want = table(rope, jnp.asarray(positions, jnp.int32))
    assert_same(table(rope, positions.astype(dtype)), want)
    assert_same(jax.jit(partial(table, rope))(positions.astype(dtype)), want)


@pytest.mark.parametrize("scaling", [None, DynamicNTK(factor=2, original_length=8)])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5,), (2, 3), (2, 1, 3)])
def test_positions_of_any_shape(shape: tuple[int, ...], scaling: Any) -> None:
    rope = plain(scaling=scaling)
    positions = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    cos, sin = table(rope, positions)
    assert cos.shape == sin.shape == (*shape, 8)
    flat = table(rope, positions.reshape(-1))
    assert_same([x.reshape(-1, 8) for x in (cos, sin)], flat)


def test_positions_may_be_a_number() -> None:
    assert_same(table(plain(), 7), [x[0] for x in table(plain(), np.array([7]))])


# Every field counts, every method starts at plain rope

SHORT, LONG = _divisors(8, 2.0), _divisors(8, 9.0)
FIELDS: dict[str, list[tuple[Any, dict[str, Any]]]] = {
    "linear": [(Linear(factor=2), {"factor": 3})],
    "ntk": [(NTKAware(factor=2), {"factor": 3})],
    "dynamic": [
        (
            DynamicNTK(factor=2, original_length=32),
            {"factor": 3, "original_length": 48},
        )
    ],
    "yarn": [
        (
            Yarn(factor=4, original_length=2048),
            {
                "factor": 5,
                "original_length": 512,
                "attention_factor": 1.3,
                "truncate": False,
                "beta_fast": 8.0,
                "beta_slow": 4.0,
            },
        ),
        (
            Yarn(factor=4, original_length=2048, mscale=0.7, mscale_all_dim=0.9),
            {"mscale": 0.8, "mscale_all_dim": 1.0},
        ),
    ],
    "dynamic-yarn": [
        (
            DynamicYarn(factor=4, original_length=2048),
            {"factor": 5, "original_length": 512, "beta_fast": 8.0, "beta_slow": 4.0},
        )
    ],
    "llama3": [
        (
            Llama3(factor=4, original_length=64, low_freq_factor=1, high_freq_factor=4),
            {
                "factor": 5,
                "original_length": 96,
                "low_freq_factor": 2,
                "high_freq_factor": 5,
            },
        )
    ],
    "longrope": [
        (
            LongRope(
                short_factor=SHORT, long_factor=LONG, original_length=64, factor=4
            ),
            {
                "short_factor": LONG,
                "original_length": 96,
                "factor": 5,
                "attention_factor": 1.3,
            },
        ),
        (
            LongRope(
                short_factor=SHORT, long_factor=LONG, original_length=32, factor=4
            ),
            {"long_factor": SHORT, "original_length": 64},
        ),
    ],
    "proportional": [
        (
            Proportional(partial_rotary_factor=0.5, factor=2),
            {"partial_rotary_factor": 0.75, "factor": 3},
        )
    ],
}


@pytest.mark.parametrize("name", ROPE_TYPES)
def test_every_field_matters(name: str) -> None:
    fields = {field.name for field in dataclasses.fields(ROPE_TYPES[name])}
    assert {field for _, changes in FIELDS[name] for field in changes} == fields
    for method, changes in FIELDS[name]:
        before = table(plain(scaling=method), np.arange(64), length=64)
        for field, value in changes.items():
            other = dataclasses.replace(method, **{field: value})
            after = table(plain(scaling=other), np.arange(64), length=64)
            assert errors(after, before).max() > 1e-3, field
            assert other != method


def test_every_field_of_rope_matters() -> None:
    changes = {"theta": 20000.0, "scaling": Linear(factor=2), "condense": 2.0}
    before = table(plain(), np.arange(64))
    for field, value in changes.items():
        after = table(plain(**{field: value}), np.arange(64))
        assert errors(after, before).max() > 1e-3, field
    assert table(plain(rotary_dim=8), np.arange(64))[0].shape == (64, 4)
    far = np.array([2**20])
    accurate = plain(rotary_dim=128, precision="accurate")
    assert errors(table(plain(rotary_dim=128), far), table(accurate, far)).max() > 1e-3
    q, pair = random_array(64, 2, 16), before
    assert errors(rotate(q, *pair), rotate(q, *pair, layout="interleaved")).max() > 0.1
    known = {*changes, "rotary_dim", "precision", "layout"}
    known |= {"lengths"}  # the model's matter: tests/test_growing.py
    assert known == {field.name for field in dataclasses.fields(Rope)}


ONES = (1.0,) * 8
UNSCALED = {
    "linear": Linear(factor=1),
    "ntk": NTKAware(factor=1),
    "dynamic": DynamicNTK(factor=3, original_length=4096),  # plain up to its length
    "yarn": Yarn(factor=1, original_length=64),
    "dynamic-yarn": DynamicYarn(original_length=4096),  # plain up to its length
    "llama3": Llama3(
        factor=1, original_length=64, low_freq_factor=1, high_freq_factor=4
    ),
    "longrope": LongRope(
        short_factor=ONES, long_factor=ONES, original_length=64, factor=1
    ),
    "proportional": Proportional(),
}


@pytest.mark.parametrize("precision", ["parity", "accurate"])
@pytest.mark.parametrize("name", ROPE_TYPES)
def test_factor_one_is_no_scaling(name: str, precision: Any) -> None:
    """But for the rounding of f (1 - w) + f w, in yarn and llama3: 2 ulp of f."""
    rope = plain(scaling=UNSCALED[name], precision=precision)
    positions = np.arange(4096)
    got = table(rope, positions, length=4096)
    want = table(plain(precision=precision), positions)
    if precision == "accurate":
        assert errors(got, want).max() <= ULP
    elif name in ("yarn", "llama3"):
        angle = positions[:, None] * np.asarray(plain().frequencies(None)[0])
        assert (errors(got, want) <= angle * 3 * ULP + ULP).all()
    else:
        assert_same(got, want)


def test_yarn_mscale_counts_only_with_mscale_all_dim() -> None:
    base = Yarn(factor=40, original_length=4096)
    alone = dataclasses.replace(base, mscale=0.5)
    both = dataclasses.replace(base, mscale=0.7, mscale_all_dim=0.7)
    scalings = [plain(scaling=m).frequencies(None)[1] for m in (base, alone, both)]
    assert scalings[0] == scalings[1] == pytest.approx(1 + 0.1 * np.log(40))
    assert scalings[2] == 1.0


# What is refused

BAD_NUMBERS = [0, -1, float("nan"), float("inf"), True, "4", None, 1j]
LLAMA3 = {"factor": 8, "original_length": 64}
LISTS: dict[str, Any] = {
    "short_factor": ONES,
    "long_factor": ONES,
    "original_length": 64,
}
BAD_METHODS: list[tuple[Any, dict[str, Any], str]] = [
    *(
        (Linear, {"factor": x}, r"factor: got .*a finite number > 0")
        for x in BAD_NUMBERS
    ),
    (NTKAware, {"factor": 0}, r"factor: got 0, want a finite number > 0"),
    (DynamicNTK, {"factor": -2, "original_length": 64}, r"factor: got -2"),
    (
        DynamicNTK,
        {"factor": 0.5, "original_length": 64},
        r"factor: got 0.5.*at least 1",
    ),
    *(
        (
            DynamicNTK,
            {"factor": 2, "original_length": x},
            r"original_length: got .*want a positive integer",
        )
        for x in (0, -4096, 4096.0, True, "4096", None)
    ),
    (Yarn, {"factor": 0, "original_length": 64}, r"factor: got 0"),
    (Yarn, {"factor": 2, "original_length": 0}, r"original_length: got 0"),
    *(
        (Yarn, {"factor": 2, "original_length": 64, **bad}, message)
        for bad, message in (
            ({"attention_factor": 0}, r"attention_factor: got 0"),
            ({"mscale": -1}, r"mscale: got -1"),
            ({"mscale_all_dim": "1"}, r"mscale_all_dim: got '1'"),
            ({"truncate": "false"}, r"truncate: got 'false', want a boolean"),
            ({"beta_slow": 0}, r"beta_slow: got 0"),
            ({"beta_fast": float("nan")}, r"beta_fast: got nan"),
            ({"beta_fast": 1, "beta_slow": 32}, r"beta_fast: got 1.*beta_slow \(32\)"),
            ({"beta_fast": 2, "beta_slow": 2}, r"beta_fast: got 2.*more than"),
        )
    ),
    *(
        (DynamicYarn, {"original_length": 64, **bad}, message)
        for bad, message in (
            ({"factor": 0.5}, r"factor: got 0.5, want at least 1 for dynamic YaRN"),
            ({"factor": True}, r"factor: got True"),
            ({"original_length": 0}, r"original_length: got 0"),
            ({"beta_slow": -1}, r"beta_slow: got -1"),
            ({"beta_fast": 1}, r"beta_fast: got 1, want more than beta_slow \(1.0\)"),
        )
    ),
    *(
        (Llama3, {**LLAMA3, "low_freq_factor": low, "high_freq_factor": high}, message)
        for low, high, message in (
            (4, 4, r"high_freq_factor: got 4.*more than low_freq_factor \(4\)"),
            (4, 1, r"high_freq_factor: got 1"),
            (0, 4, r"low_freq_factor: got 0"),
            (1, float("inf"), r"high_freq_factor: got inf"),
        )
    ),
    *(
        (LongRope, {**LISTS, "factor": 2, **bad}, message)
        for bad, message in (
            ({"short_factor": (1, 0)}, r"short_factor\[1\]: got 0, want a number > 0"),
            ({"long_factor": ("a",)}, r"long_factor\[0\]: got 'a'"),
            ({"factor": None}, r"factor: got None, want given when attention_factor"),
            ({"factor": -1}, r"factor: got -1"),
            ({"attention_factor": 0}, r"attention_factor: got 0"),
            ({"original_length": 1.5}, r"original_length: got 1.5"),
        )
    ),
    (
        Proportional,
        {"partial_rotary_factor": 1.5},
        r"partial_.*got 1.5, want at most 1",
    ),
    (Proportional, {"partial_rotary_factor": 0}, r"partial_rotary_factor: got 0"),
    (Proportional, {"factor": 0}, r"factor: got 0"),
]


@pytest.mark.parametrize("method, fields, message", BAD_METHODS)
def test_method_says_what_is_wrong(
    method: Any, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(JropeError, match=message):
        method(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        *(({"theta": x}, r"theta: got .*a finite number > 1") for x in BAD_NUMBERS),
        ({"theta": 1.0}, r"theta: got 1.0, want a finite number > 1"),
        *(
            ({"rotary_dim": x}, r"rotary_dim: got .*want a positive even integer")
            for x in (0, 7, -2, 16.0, True, None)
        ),
        ({"scaling": "yarn"}, r"scaling: got 'yarn', want None or one of Linear, NTK"),
        ({"scaling": Linear}, r"scaling: got <class"),
        *(({"condense": x}, r"condense: got .*number > 0") for x in BAD_NUMBERS),
        ({"layout": "meta"}, r"layout: got 'meta', want one of .'half', 'interleaved"),
        ({"precision": "fast"}, r"precision: got 'fast', want one of .'parity', 'acc"),
        ({"lengths": "grow"}, r"lengths: got 'grow', want one of .'planned', 'growing"),
        ({"lengths": "growing"}, r"got 'growing', want 'planned': plain RoPE does not"),
        (
            {"lengths": "hf", "scaling": Linear(factor=2)},
            r"lengths: got 'hf', want 'planned': Linear does not depend on the length",
        ),
        (
            {"lengths": "hf", "scaling": DynamicYarn(original_length=8)},
            r"want 'planned' or 'growing': transformers has no DynamicYarn",
        ),
        (
            {"rotary_dim": 2, "scaling": NTKAware(factor=2)},
            r"rotary_dim: got 2, want more than 2",
        ),
        (
            {"rotary_dim": 2, "scaling": DynamicNTK(factor=2, original_length=8)},
            r"rotary_dim: got 2, want more than 2",
        ),
        (
            {"scaling": LongRope(**dict(LISTS, short_factor=(1, 2)), factor=2)},
            r"short_factor: got '2 numbers', want 8 numbers",
        ),
        (
            {"scaling": LongRope(**dict(LISTS, long_factor=(1, 2)), factor=2)},
            r"long_factor: got '2 numbers', want 8 numbers",
        ),
    ],
)
def test_rope_says_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(JropeError, match=message):
        plain(**fields)


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_positions_must_be_integers(dtype: str) -> None:
    with pytest.raises(JropeError, match=rf"positions: got {dtype}, want integers"):
        table(plain(), np.zeros(3, dtype))


@pytest.mark.parametrize(
    "shape, heads, rotary_dim", [((10,), 3, None), ((6,), 2, None), ((8,), 2, 6)]
)
def test_permutation_says_what_is_wrong(
    shape: tuple[int, ...], heads: int, rotary_dim: int | None
) -> None:
    for permute in (interleaved_to_half, half_to_interleaved):
        message = rf"axis 0: got .*channels.*, want heads \({heads}\) times"
        with pytest.raises(JropeError, match=message):
            permute(np.zeros(shape), heads, rotary_dim=rotary_dim)


# Laws of the rotation

POSITIONS = st.integers(0, 2**24 - 1 - 4096)
ACCURATE = plain(precision="accurate")


@jax.jit
def turned(x: jax.Array, position: jax.Array) -> jax.Array:
    """x[H] at one position, with the accurate table."""
    return rotate(x[None, None], *table(ACCURATE, position[None]))[0, 0]


@given(position=POSITIONS, seed=st.integers(0, 99))
def test_rotation_keeps_norms(position: int, seed: int) -> None:
    x = random_array(16, seed=seed)
    norm = np.linalg.norm(turned(x, jnp.asarray(position, jnp.int32)))
    assert norm == pytest.approx(np.linalg.norm(x), rel=1e-6)


@given(
    start=POSITIONS,
    shift=st.integers(0, 2048),
    distance=st.integers(0, 2048),
    seed=st.integers(0, 99),
)
def test_scores_depend_on_distance_only(
    start: int, shift: int, distance: int, seed: int
) -> None:
    """At any position: 16 products of errors 4e-7 each, on numbers of about 1."""
    q, k = random_array(2, 16, seed=seed)
    at = partial(jnp.asarray, dtype=jnp.int32)
    near = jnp.dot(turned(q, at(distance)), turned(k, at(0)))
    far = jnp.dot(turned(q, at(start + shift + distance)), turned(k, at(start + shift)))
    scale = float(jnp.linalg.norm(q) * jnp.linalg.norm(k))
    assert float(far) == pytest.approx(float(near), abs=2e-6 * scale)


@each(FIRST_CASES)
@pytest.mark.parametrize("precision", ["parity", "accurate"])
def test_position_zero_is_identity_times_scaling(case: Case, precision: Any) -> None:
    rope = case.rope(precision=precision)
    cos, sin = table(rope, np.zeros(1, int))
    x = random_array(1, 3, case.head_dim)
    scaling = np.float32(case.truth(1)[1])
    want = np.asarray(x).copy()
    want[..., : rope.rotary_dim] *= scaling
    assert (np.asarray(cos) == scaling).all() and (np.asarray(sin) == 0).all()
    got = rotate(x, cos, sin, layout=rope.layout, precision=precision)
    np.testing.assert_array_equal(got, want)


# The rotation: layouts, partial rotary, rounding


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [16, 8, 2])
@pytest.mark.parametrize("precision", ["parity", "accurate"])
def test_rotate_matches_reference(layout: Any, rotary_dim: int, precision: Any) -> None:
    x = random_array(2, 5, 3, 16)
    cos, sin = table(plain(rotary_dim=rotary_dim), np.arange(10).reshape(2, 5))
    got = rotate(x, cos, sin, layout=layout, precision=precision)
    wide = np.asarray(cos, np.float64), np.asarray(sin, np.float64)
    want = reference.rotate(np.asarray(x), *wide, layout=layout)
    assert got.dtype == x.dtype and got.shape == x.shape
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got[..., rotary_dim:], x[..., rotary_dim:])


@given(
    heads=st.sampled_from([1, 2, 5]),
    head_dim=st.sampled_from([2, 8, 12]),
    part=st.sampled_from([0.5, 1.0]),
    columns=st.sampled_from([None, 3]),
)
def test_permutation_has_an_inverse(
    heads: int, head_dim: int, part: float, columns: int | None
) -> None:
    rotary_dim = max(2, int(head_dim * part) // 2 * 2)
    shape = (heads * head_dim,) if columns is None else (heads * head_dim, columns)
    x = np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape)
    there = interleaved_to_half(x, heads, rotary_dim=rotary_dim)
    back = half_to_interleaved(there, heads, rotary_dim=rotary_dim)
    np.testing.assert_array_equal(back, x)
    per_head = x.reshape(heads, head_dim, -1)
    got = there.reshape(heads, head_dim, -1)
    half = rotary_dim // 2
    np.testing.assert_array_equal(got[:, :half], per_head[:, 0:rotary_dim:2])
    np.testing.assert_array_equal(got[:, half:rotary_dim], per_head[:, 1:rotary_dim:2])
    np.testing.assert_array_equal(got[:, rotary_dim:], per_head[:, rotary_dim:])


@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_permuted_weights_give_the_same_scores(rotary_dim: int) -> None:
    """GQA, biases: Meta's projections interleaved = the permuted ones half by half.

    Small integers, so that the projections are exact and every comparison is.
    """
    heads, kv_heads, head_dim, time = 4, 2, 8, 6
    random = np.random.default_rng(0)
    x = random.integers(-3, 4, (time, 10)).astype(np.float32)
    tables = table(plain(rotary_dim=rotary_dim), np.arange(time))
    for count in (heads, kv_heads):
        weight = random.integers(-3, 4, (count * head_dim, 10)).astype(np.float32)
        bias = random.integers(-3, 4, count * head_dim).astype(np.float32)
        to_half = partial(interleaved_to_half, heads=count, rotary_dim=rotary_dim)

        def project(w: Any, b: Any, count: int = count) -> jax.Array:
            return jnp.asarray((x @ w.T + b).reshape(time, count, head_dim))

        meta = rotate(project(weight, bias), *tables, layout="interleaved")
        ours = rotate(project(to_half(weight), to_half(bias)), *tables, layout="half")
        activations = partial(interleaved_to_half, axis=-1, rotary_dim=rotary_dim)
        np.testing.assert_array_equal(ours, activations(meta))
        np.testing.assert_array_equal(  # jax arrays too
            to_half(jnp.asarray(weight)), to_half(weight)
        )
        assert (np.asarray(meta) != np.asarray(ours)).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_parity_rounds_like_transformers(dtype: str, jit: bool, scaled: bool) -> None:
    """Tables cast first, each product and the sum rounded: bit for bit in bf16."""
    import torch
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    rope = CASES["yarn" if scaled else "default"][0].rope()
    positions = np.concatenate([np.arange(60), 4000 + np.arange(4)])[None]
    tables = table(rope, positions)
    q, k = random_array(1, 64, 4, 128), random_array(1, 64, 2, 128, seed=1)
    run = jax.jit(rotate) if jit else rotate
    ours = [run(x.astype(dtype), *tables) for x in (q, k)]
    kind = getattr(torch, dtype)
    tensors = [torch.from_numpy(np.array(x)).to(kind) for x in (q, k, *tables)]
    both = [torch.cat([x, x], -1) for x in tensors[2:]]
    theirs = apply_rotary_pos_emb(*tensors[:2], *both, unsqueeze_dim=2)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == dtype
        got, want = np.asarray(mine, np.float32), other.float().numpy()
        if dtype == "float32":  # a fused multiply-add may skip one rounding
            np.testing.assert_allclose(got, want, rtol=0, atol=4 * ULP)
        else:
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("jit", [False, True])
def test_accurate_rounds_like_meta(jit: bool) -> None:
    """Complex multiplication in float32, cast once.

    The float32 results may differ in a last bit (a fused multiply-add), which shows in
    one in 2**16 of the casts.
    """
    import torch

    x = random_array(2, 32, 4, 64).astype(jnp.bfloat16)
    cos, sin = table(plain(rotary_dim=64), np.arange(64).reshape(2, 32))
    run = partial(rotate, layout="interleaved", precision="accurate")
    got = np.asarray((jax.jit(run) if jit else run)(x, cos, sin), np.float32)
    wide = torch.from_numpy(np.array(x, np.float32)).reshape(2, 32, 4, 32, 2)
    turns = torch.complex(*(torch.from_numpy(np.array(t)) for t in (cos, sin)))
    product = torch.view_as_complex(wide) * turns[:, :, None]
    want = torch.view_as_real(product).flatten(-2).bfloat16().float().numpy()
    np.testing.assert_allclose(got, want, rtol=2.0**-7, atol=1e-6)
    assert (got == want).mean() > 0.999
    half = rotate(interleaved_to_half(x, axis=-1), cos, sin, precision="accurate")
    assert_same([half_to_interleaved(half, axis=-1)], [run(x, cos, sin)])


def test_accurate_is_nearer_the_truth_in_bfloat16() -> None:
    x = random_array(1, 64, 2, 64).astype(jnp.bfloat16)
    f, scaling = reference.default(64, 10000.0)
    truth = reference.table(f, scaling, np.arange(64)[None])
    want = reference.rotate(np.asarray(x, np.float64), *truth)

    def rms(precision: Any) -> float:
        rope = plain(rotary_dim=64, precision=precision)
        got = rotate(x, *table(rope, np.arange(64)[None]), precision=precision)
        return float(np.sqrt(np.mean(errors(got, want) ** 2)))

    assert rms("accurate") < 0.75 * rms("parity") < 0.01


@pytest.mark.parametrize("module", [jrope.rope, jrope.frequencies])
def test_examples_in_docstrings(module: Any) -> None:
    results = doctest.testmod(module)
    assert results.attempted and not results.failed
