"""4-bit weights: the definition bit for bit, and products of what they stand for."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import make_tiny_hf
from int8_helpers import EMBEDDED, EPS, TOKENS, largest_gap, run, unpacked, wide
from model_helpers import assert_equal, params_of

from jrope.bench.model import random_params
from jrope.cli import main
from jrope.cli.loading import Loading
from jrope.errors import JropeError
from jrope.generation.run import generate
from jrope.hf.checkpoint import load, save
from jrope.model import packed
from jrope.model.products import BLOCK, linear
from jrope.tree import flatten, nest
from jrope.weights.fuse import fuse, unfuse
from jrope.weights.int8 import (
    dequantize,
    quantize,
    quantize_tensor,
    weight_bytes,
)

BFLOAT16 = ml_dtypes.bfloat16


def definition(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Levels [out, in] and bfloat16 scales [out, groups], operation by operation.

    Quotients and products of float32 numbers in float64, rounded, are float32's own.
    """
    group = {96: 96, 192: 64, 256: 128}[w.shape[1]]
    groups = w.astype(np.float64).reshape(len(w), -1, group)
    scale = (np.abs(groups).max(-1) / 7).astype(np.float32).astype(BFLOAT16)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = (1 / scale.astype(np.float64)).astype(np.float32).astype(np.float64)
        levels = np.rint((groups * steps[..., None]).astype(np.float32))
    levels = np.where(scale[..., None] == 0, 0, np.clip(levels, -7, 7))
    return levels.reshape(w.shape).astype(np.int8), scale


def matrix(width: int, dtype: Any) -> np.ndarray:
    """Groups of every size, ties, a group of zeros, a scale that is rounded down."""
    random = np.random.default_rng(1)
    w = random.standard_normal((40, width))
    group = {96: 96, 192: 64, 256: 128}[width]
    for start in range(0, width, group):
        w[:, start : start + group] *= 10.0 ** random.integers(-4, 4, (40, 1))
    w[3, :group] = 0
    w[4] = np.arange(width) % 7 + 0.5
    w[4, ::group] = -7  # scale 1: halves go to even
    w[5, :group] = 7 * (1 + 2.0**-8) * np.sign(w[5, :group])  # more than 7 scales
    return w.astype(dtype)


@cache
def wide_model() -> Any:
    """Two groups in the hidden size, four in the MLP's width."""
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    made = make_tiny_hf(layers=1, tied=True, **sizes)
    return params_of(made, "float32")


# the integers


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16, np.float16])
@pytest.mark.parametrize("width", [96, 192, 256])
def test_values_are_the_definition(width: int, dtype: Any) -> None:
    w = matrix(width, dtype)
    found = quantize_tensor("a.weight", w, "int4")
    levels, scale = definition(w)
    words = found["a.weight"]
    assert words.dtype == jnp.uint32 and words.shape == (40, width // 8)
    np.testing.assert_array_equal(found["a.scale"], scale)
    np.testing.assert_array_equal(unpacked(words, scale.shape[1]), levels)
    want = (levels.reshape(*scale.shape, -1) * scale[..., None].astype(np.float32),)
    got = packed.widen(words, found["a.scale"], jnp.float32)
    np.testing.assert_array_equal(got, want[0].reshape(w.shape))
    assert {-7, 0, 7} <= {*levels.flat} and levels[4].tolist()[1] == 2  # 1.5
    assert (abs(wide(w)[5, 0]) / wide(scale)[5, 0] > 7) == (dtype != BFLOAT16)


def test_words_hold_every_level() -> None:
    """On the host, too, where a folder's own integers are put into words."""
    levels = np.random.default_rng(0).integers(-8, 8, (3, 2, 128)).astype(np.int8)
    words = packed.pack(jnp.asarray(levels))
    np.testing.assert_array_equal(unpacked(words, 2), levels.reshape(3, -1))
    assert {*levels.flat} == {*range(-8, 8)}
    host = packed.pack(levels)
    assert isinstance(host, np.ndarray) and host.dtype == np.uint32
    np.testing.assert_array_equal(host, words)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_damaged_group_is_nan(bad: float) -> None:
    w = matrix(256, np.float32)
    w[7, 200] = bad
    got = wide(quantize_tensor("w.weight", w, "int4")["w.scale"])
    assert np.isnan(got[7, 1]) and np.isnan(got).sum() == 1


# the products


@pytest.mark.parametrize("width", [96, 256])
def test_a_product_is_that_of_the_dequantised_weights(width: int) -> None:
    """On a CPU, and as a GPU computes it, for a row and for several."""
    w = matrix(width, np.float32)
    w[:, :] = np.random.default_rng(3).standard_normal(w.shape)
    found = quantize_tensor("weight", w, "int4")
    held, scale = found["weight"], found["weight.scale"]
    weights = {"weight": held, "scale": scale, "bias": jnp.ones(40)}
    x = np.random.default_rng(2).standard_normal((2, 3, width)).astype(np.float32)
    plain = wide(packed.widen(held, scale, jnp.float32))
    most = 7 * np.abs(wide(x)) @ np.repeat(wide(scale), min(width, 128), 1).T
    bound = 8 * EPS * np.sqrt(width) * (most + 1)
    want = wide(x) @ plain.T
    for rows in (x, x[:1, :1]):
        got = wide(linear(weights, jnp.asarray(rows)))
        off = np.abs(got - 1 - want[: len(rows), : rows.shape[1]])
        assert (off <= bound[: len(rows), : rows.shape[1]]).all()
    got = wide(packed.row_sums(held, scale, jnp.asarray(x[1, 2])))
    assert (np.abs(got - want[1, 2]) <= bound[1, 2]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_zero_is_taken_off_each_group(dtype: str) -> None:
    """Levels and zeros of any kind, for a row and several, biases and factors beside.

    A level times its scale is off by half a last bit of x's dtype, the float32 sums by
    some of theirs; a row is summed in float32 whatever x is.
    """
    random = np.random.default_rng(4)
    levels = random.integers(-8, 8, (40, 2, 128)).astype(np.int8)
    zero = random.integers(-8, 8, (40, 2)).astype(np.int8)
    scale = jnp.asarray(random.uniform(0.1, 1, (40, 2)), jnp.float16)
    weights = {"weight": packed.pack(jnp.asarray(levels)), "scale": scale}
    weights |= {"zero": jnp.asarray(zero), "bias": jnp.ones(40)}
    exact = (levels - wide(zero)[..., None]) * wide(scale)[..., None]
    plain = packed.widen(*[weights[n] for n in ("weight", "scale")], jnp.float32, zero)
    np.testing.assert_array_equal(wide(plain), exact.reshape(40, 256))
    x = jnp.asarray(random.standard_normal((2, 3, 256)) + 1, dtype)
    most = 16 * np.abs(wide(x)) @ np.repeat(wide(scale), 128, 1).T
    for rows, eps in ((x, float(jnp.finfo(dtype).eps) / 2), (x[1:, 2:], EPS)):
        got = wide(linear(weights, rows, dtype=jnp.float32, factor=jnp.float32(2)))
        off = np.abs(got - 1 - 2 * wide(rows) @ exact.reshape(40, 256).T)
        sums = 8 * EPS * 16
        bound = 2 * (eps / 2 + sums) * most[-len(rows) :, -rows.shape[1] :]
        assert (off <= bound).all()


def test_a_gpu_makes_one_sum_of_a_row() -> None:
    weights = {"weight": jnp.ones((40, 32), jnp.uint32), "scale": jnp.ones((40, 2))}
    x = jnp.ones((1, 1, 256))
    weights["scale"] = weights["scale"].astype(jnp.bfloat16)
    traced = jax.jit(linear).trace(weights, x)
    text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cuda", "tpu")}
    assert "dot_general" in text["tpu"] and "dot_general" not in text["cuda"]


def test_logits_and_tokens_are_those_of_the_dequantised_weights() -> None:
    params, config = wide_model()
    narrow = quantize(params, "int4")
    plain = dequantize(narrow)
    tree = fuse(narrow)
    assert flatten(narrow)["model.layers.0.mlp.down_proj.scale"].shape == (256, 4)
    want, _ = run(plain, TOKENS, config=config)
    got, _ = run(tree, TOKENS, config=config)
    assert largest_gap(got, want) <= 4e-6
    assert largest_gap(want, run(params, TOKENS, config=config)[0]) > 1e-2
    assert flatten(narrow)["model.embed_tokens.scale"].shape == (61, 2)
    new = generate(tree, TOKENS[:1], config=config, max_new_tokens=12).tokens
    text = np.concatenate([TOKENS[:1], new], axis=1)
    want, _ = run(plain, text, config=config)
    np.testing.assert_array_equal(new, np.argmax(want, -1)[:, 8:-1])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="as XLA's CPU backend is")
@pytest.mark.parametrize(("rows", "zeros"), [(1, False), (2, False), (2, True)])
def test_a_cpu_widens_a_block_at_a_time(rows: int, zeros: bool) -> None:
    """In a loop, too, ahead of which XLA would widen all."""
    out, width = 8 * BLOCK, 256
    words = jax.ShapeDtypeStruct((out, width // 8), jnp.uint32)
    scale = jax.ShapeDtypeStruct((out, width // 128), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((rows, 1, width), jnp.bfloat16)

    @jax.jit
    def steps(weights: Any, x: jax.Array) -> jax.Array:
        def step(_: int, x: jax.Array) -> jax.Array:
            return linear(weights, x)[..., :width]

        return jax.lax.fori_loop(0, 9, step, x)

    weights = {"weight": words, "scale": scale}
    if zeros:
        weights["zero"] = jax.ShapeDtypeStruct(scale.shape, jnp.int8)
    program = steps.lower(weights, x).compile()
    assert program.memory_analysis().temp_size_in_bytes < 3 * 4 * BLOCK * width


# the tree


def test_fusing_and_quantising_commute() -> None:
    params, config = wide_model()
    narrow = quantize(params, "int4")
    fused = fuse(narrow)
    assert_equal(fused, quantize(fuse(params), "int4"))
    assert_equal(unfuse(fused, config), narrow)
    assert_equal(fuse(dequantize(narrow)), dequantize(fused))
    kinds = {x.dtype.name for x in flatten(dequantize(narrow, "bfloat16")).values()}
    assert kinds == {"bfloat16"}


def test_what_lies_in_another_way_is_not_joined() -> None:
    """As where a folder holds some projections of a layer in 4 bits."""
    params, config = wide_model()
    narrow, flat = flatten(quantize(params, "int4")), flatten(params)
    name = "model.layers.0.self_attn.v_proj"
    del narrow[f"{name}.scale"]
    mixed = nest({**narrow, f"{name}.weight": flat[f"{name}.weight"]})
    joined = fuse(mixed)
    names = {n.split(".")[-2] for n in flatten(joined) if "_proj" in n}
    assert names == {f"{n}_proj" for n in ("q", "k", "v", "o", "gate_up", "down")}
    assert_equal(unfuse(joined, config), mixed)
    got, want = (run(x, TOKENS, config=config)[0] for x in (joined, mixed))
    assert largest_gap(got, want) <= 4e-6


def test_load_is_quantize_of_load_and_bytes_are_counted(tmp_path: Path) -> None:
    params, config = wide_model()
    save(tmp_path / "m", params, config)
    with Loading(tmp_path / "m", None, "int4") as weights:
        got, _ = weights.wait()
        assert_equal(weights.shapes, jax.eval_shape(lambda: got))
    assert_equal(got, quantize(params, "int4"))
    sizes = weight_bytes(config, 4, "int4")
    for tree in (got, random_params(config, jnp.float32, "int4")):
        flat = flatten(tree)
        assert flat.keys() == flatten(got).keys()
        for name, size in sizes.items():
            scale = flat.get(name.replace("weight", "scale"))
            held = 0 if scale is None or scale is flat[name] else scale.nbytes
            assert flat[name].nbytes + held == size, name


WRONG: dict[str, tuple[Any, str]] = {
    "kind": (lambda p, c: quantize(p, "int3"), "'int3', want 'int8' or 'int4'"),
    "loaded": (lambda p, c: load(EMBEDDED, quantize="int3"), "want None or 'int8' or"),
    "twice": (lambda p, c: quantize(quantize(p, "int4")), "quantised already"),
    "to kernels": (lambda p, c: fuse(quantize(p, "int4"), "in_out"), "want out_in"),
    "saved": (lambda p, c: save("/no", quantize(p, "int4"), c), "`jrope.dequantize`"),
    "no whole groups": (
        lambda p, c: quantize_tensor("a.weight", np.ones((2, 144)), "int4"),
        "a.weight: int4 weights have groups of 128 or 32 inputs, got 144, want a multi",
    ),
    "no whole words": (
        lambda p, c: quantize_tensor("a.weight", np.ones((2, 60)), "int4"),
        "got 60, want a multiple of 32, or of 8 below 128",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_says_what_is_wrong(case: str) -> None:
    act, message = WRONG[case]
    with pytest.raises(JropeError, match=message):
        act(*wide_model())


# the commands


def test_plan_takes_it(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--shape", "llama3-8b", "--on", "h100:2", "--quantize", "int4"]
    assert main(["plan", *shape]) == 0
    assert "in int4" in capsys.readouterr().out
