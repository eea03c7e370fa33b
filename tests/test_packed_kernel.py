"""The GPU's kernel for 4-bit weights, interpreted: against float64, in `linear`."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_helpers import text_for_cuda

from jrope.model import decode_parts, packed, packed_kernel, packed_row, products
from jrope.model.packed_kernel import Tiles, kernel_takes, times_packed
from jrope.model.products import linear

OUT, COUNT = 32, 5
EPS = 2.0**-24  # of float32 sums


def weights(
    groups: int, group: int, out: int = OUT
) -> tuple[jax.Array, jax.Array, np.ndarray]:
    """Words, scales, and the float64 matrix that they stand for; every level occurs."""
    random = np.random.default_rng(groups)
    levels = random.integers(-8, 8, (out, groups, group)).astype(np.int8)
    scale = random.uniform(0.5, 1, (out, groups)).astype(jnp.bfloat16)
    plain = levels * scale.astype(np.float64)[..., None]
    words = packed.pack(jnp.asarray(levels))
    return words, jnp.asarray(scale), plain.reshape(out, -1)


def tokens(count: int, width: int, dtype: Any) -> jax.Array:
    """With a mean, which is what an excess of the levels would be multiplied by."""
    x = np.random.default_rng(count).standard_normal((1, count, width)) + 1
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize(
    ("groups", "group", "dtype"),
    [(4, 128, "bfloat16"), (33, 128, "float16"), (14, 32, "bfloat16")],
)
@pytest.mark.parametrize(
    ("count", "tiles"), [(COUNT, None), (16, Tiles(outs=16, split=3)), (1, None)]
)
def test_a_product(
    groups: int, group: int, dtype: str, count: int, tiles: Tiles | None
) -> None:
    """Whole steps and a part of one, shares of a sum, an empty share, a full tile."""
    words, scale, plain = weights(groups, group)
    x = tokens(count, groups * group, dtype)
    got = times_packed(x, words, scale, tiles=tiles, interpret=True)
    assert got.dtype == jnp.float32 and got.shape == (1, count, OUT)
    wide = np.asarray(x, np.float64)
    bound = EPS * (np.abs(wide) @ np.abs(plain.T))
    assert (np.abs(np.asarray(got, np.float64) - wide @ plain.T) <= bound).all()


@pytest.mark.parametrize("groups", [1, 32, 33, 86, 112])
def test_a_token_has_a_kernel_of_its_own(
    groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in one step and in several, of which some programs have one less."""
    out = 112
    words, scale, plain = weights(groups, 32, out)
    x = tokens(1, groups * 32, "bfloat16")
    wide = np.asarray(x, np.float64)
    bound = EPS * (np.abs(wide) @ np.abs(plain.T))
    for programs in (512, 4):
        monkeypatch.setattr(packed_row, "PROGRAMS", programs)
        got = times_packed(x, words, scale, interpret=True)
        assert got.dtype == jnp.float32 and got.shape == (1, 1, out)
        assert (np.abs(np.asarray(got, np.float64) - wide @ plain.T) <= bound).all()


@pytest.mark.parametrize(
    ("count", "name"), [(8, "rows_times_packed"), (1, "row_times_packed")]
)
def test_triton_takes_it(count: int, name: str) -> None:
    shape = jax.ShapeDtypeStruct
    given = (
        shape((1, count, 14336), jnp.bfloat16),
        shape((4096, 14336 // 8), jnp.uint32),
        shape((4096, 112), jnp.bfloat16),
    )
    assert name in text_for_cuda(times_packed, *given)


def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    words, scale, _ = weights(4, 128)
    x = tokens(COUNT, 512, "bfloat16")
    assert not kernel_takes(x, words, scale)  # no GPU
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert kernel_takes(x, words, scale)
    assert kernel_takes(tokens(2, 512, "float16"), words, scale)
    assert kernel_takes(tokens(1, 512, "float16"), words, scale)
    assert not kernel_takes(x.astype(jnp.float32), words, scale)
    assert not kernel_takes(tokens(17, 512, "bfloat16"), words, scale)
    assert not kernel_takes(x[:, :0], words, scale)
    assert not kernel_takes(x, words[:-1], scale[:-1])  # no whole tile
    assert not kernel_takes(x[..., :96], words[:, :12], scale[:, :1])
    assert not kernel_takes(x[..., :16], words[:, :2], scale[:, :1])
    assert not kernel_takes(x, words, scale[:, :2])  # groups of 256
    monkeypatch.setattr(decode_parts, "find_spec", lambda name: None)
    assert not kernel_takes(x, words, scale)


@pytest.mark.parametrize("count", [COUNT, 1])
def test_linear_takes_it(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values are the kernel's, derivatives those of the other way."""
    words, scale, plain = weights(4, 128)
    held = {"weight": words, "scale": scale, "bias": jnp.ones(OUT, jnp.bfloat16)}
    x, taken = tokens(count, 512, "bfloat16"), list[int]()

    def interpreted(*given: Any) -> jax.Array:
        taken.append(1)
        return times_packed(*given, interpret=True)

    def loss(x: jax.Array) -> jax.Array:
        return jnp.sum(linear(held, x, dtype=jnp.float32))

    want = loss(x), jax.grad(loss)(x)
    monkeypatch.setattr(products, "on_cuda", partial(_on_any, interpreted))
    monkeypatch.setattr(packed_kernel, "kernel_takes", lambda *given: True)
    got = loss(x), jax.grad(loss)(x)
    assert taken
    np.testing.assert_allclose(float(got[0]), float(want[0]), rtol=1e-2)
    np.testing.assert_array_equal(*(np.asarray(y[1], np.float32) for y in (got, want)))
    rows = jax.vmap(partial(linear, held, dtype=jnp.float32))(jnp.stack([x, 2 * x]))
    wide = np.asarray(x, np.float64) @ plain.T
    for row, factor in zip(np.asarray(rows), (1, 2), strict=True):
        np.testing.assert_allclose(row - 1, factor * wide, atol=2e-3, rtol=0)


def _on_any(own: Any, kernel: Any, plain: Any) -> Any:
    """`on_cuda` for every platform, whose kernel is another."""
    assert kernel is times_packed

    @jax.custom_jvp
    def either(*given: Any) -> Any:
        return own(*given)

    either.defjvp(partial(jax.jvp, plain))
    return either
