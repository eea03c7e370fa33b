"""The rotation: its laws, layouts, and how it rounds."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from hypothesis import given
from hypothesis import strategies as st
from rope_cases import (
    CASES,
    FIRST_CASES,
    ULP,
    Case,
    assert_same,
    each,
    errors,
    plain,
    random_array,
)

from jrope.rope import half_to_interleaved, interleaved_to_half, rotate, table

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


# Layouts, partial rotary, rounding


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
