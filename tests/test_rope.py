"""Rotary embeddings against the papers, transformers and FastChat.

Every test of a method runs over one table, `CASES`.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from rope_cases import (
    CASES,
    FIXED_CASES,
    HF_CASES,
    ULP,
    Case,
    assert_same,
    each,
    errors,
    hf_table,
    lengths_of,
    plain,
    sample,
)

from jrope.rope import (
    ROPE_TYPES,
    DynamicNTK,
    DynamicYarn,
    Linear,
    Llama3,
    LongRope,
    Rope,
    Yarn,
    table,
)

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
