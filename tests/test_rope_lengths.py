"""Tables that are traced, over lengths and batches."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal
from rope_cases import (
    CASES,
    FIRST_CASES,
    LENGTH_CASES,
    ULP,
    Case,
    assert_same,
    each,
    errors,
    lengths_of,
    plain,
    sample,
)

from jrope.errors import JropeError
from jrope.rope import DynamicNTK, Linear, Rope, table


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


def casts(jaxpr: Any, makers: list[str], found: set[tuple[str, str]]) -> list[str]:
    """Collect (what made x, "dtype to dtype") of every cast of an x; what made results.

    Functions that are called count as what is in them.
    """
    made = dict(zip(jaxpr.invars, makers, strict=True))

    def maker(x: Any) -> str:
        return "" if isinstance(x, Literal) else made.get(x, "")

    for eqn in jaxpr.eqns:
        inputs, names = [maker(x) for x in eqn.invars], [str(eqn.primitive)]
        if "jaxpr" in eqn.params:
            names = casts(eqn.params["jaxpr"].jaxpr, inputs, found)
        elif names == ["convert_element_type"]:
            names = [f"{eqn.invars[0].aval.dtype} to {eqn.outvars[0].aval.dtype}"]
            found.add((inputs[0], names[0]))
        made |= dict(zip(eqn.outvars, names, strict=True))
    return [maker(x) for x in jaxpr.outvars]


@pytest.mark.parametrize(
    "rope",
    [LENGTH_CASES[name][0].rope() for name in ("dynamic", "dynamic-yarn")]
    + [plain(condense=7.3)],
    ids=["dynamic", "dynamic-yarn", "condense"],
)
def test_no_rounding_that_compilers_drop(rope: Rope) -> None:
    """On their way to a GPU, where float32 divisions are inexact; a CPU hides it.

    float64 to float32 and back is nothing to XLA, and a quotient that is cast is a
    division in float32 to LLVM.
    """
    run = jax.make_jaxpr(lambda p, n: table(rope, p, length=n))
    jaxpr, found = run(sample(64), np.int32(8192)).jaxpr, set[tuple[str, str]]()
    casts(jaxpr, [""] * len(jaxpr.invars), found)
    assert "float64 to float32" in {kind for _, kind in found}
    assert ("float64 to float32", "float32 to float64") not in found
    assert ("div", "float64 to float32") not in found


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
