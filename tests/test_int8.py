"""8-bit weights: the definition bit for bit, and the same products."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from int8_helpers import (
    EMBEDDED,
    EPS,
    TOKENS,
    definition,
    each_model,
    largest_gap,
    matrix,
    model,
    rms_gap,
    run,
    wide,
)
from model_helpers import assert_equal

import jrope
from jrope.errors import JropeError
from jrope.generation.run import generate
from jrope.hf.checkpoint import load, save
from jrope.model import products
from jrope.model.cache import KVCache
from jrope.model.products import linear
from jrope.model.scores import score
from jrope.tree import flatten, nest
from jrope.weights import int8
from jrope.weights.fuse import fuse, unfuse
from jrope.weights.int8 import dequantize, quantize

# the integers


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_values_are_the_definition(dtype: Any) -> None:
    w = matrix(dtype)
    found = int8.quantize_tensor("a.weight", w)
    assert {*found} == {"a.weight", "a.scale"}
    whole, scale = definition(w)
    assert found["a.weight"].dtype == jnp.int8
    assert found["a.scale"].dtype == jnp.float32
    np.testing.assert_array_equal(found["a.scale"], scale)
    np.testing.assert_array_equal(found["a.weight"], whole)
    assert (
        np.abs(whole.astype(int)).max(1)[[i for i in range(40) if i != 3]].min() > 126
    )


def test_no_element_is_off_by_more_than_half_a_scale() -> None:
    """And by what a product of at most 127 with a rounded inverse is rounded."""
    w = matrix(np.float32)
    found = int8.quantize_tensor("w.weight", w)
    scale = wide(found["w.scale"])[:, None]
    off = np.abs(wide(w) - scale * wide(found["w.weight"]))
    assert (off <= scale * (0.5 + 3 * 128 * EPS)).all()
    assert (off > 0.4 * scale).any()


def test_zero_rows_are_zeros() -> None:
    params, config = model("untied")
    flat = flatten(params)
    name = "model.layers.0.self_attn.v_proj"
    flat[f"{name}.weight"] = flat[f"{name}.weight"].at[5].set(0.0)
    narrow = flatten(quantize(nest(flat)))
    assert float(narrow[f"{name}.scale"][5]) == 0
    assert not np.asarray(narrow[f"{name}.weight"][5]).any()
    logits, _ = run(nest(narrow), TOKENS, config=config)
    assert np.isfinite(logits).all()
    assert not np.asarray(flatten(dequantize(nest(narrow)))[f"{name}.weight"][5]).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_weights_stay_visible(bad: float) -> None:
    params, config = model("untied")
    flat = flatten(params)
    flat["lm_head.weight"] = flat["lm_head.weight"].at[7, 3].set(bad)
    logits, _ = run(quantize(nest(flat)), TOKENS, config=config)
    found = np.isnan(logits)
    assert found[..., 7].all()
    assert found.sum() == TOKENS.size


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(64, 4096), (5, 1000), (1, 96)])
def test_a_damaged_row_is_nan(shape: tuple[int, int], dtype: str, bad: float) -> None:
    """Wherever it is damaged, and no other row: XLA's CPU maximum may lose a NaN."""
    random = np.random.default_rng(3).standard_normal(shape, np.float32)
    want = int8.quantize_tensor("w.weight", jnp.asarray(random, dtype))
    for column in (0, shape[1] // 2 + 1, shape[1] - 1):
        damaged = random.copy()
        damaged[0, column] = bad
        got = int8.quantize_tensor("w.weight", jnp.asarray(damaged, dtype))
        assert np.isnan(got["w.scale"][0])
        for name, array in want.items():
            np.testing.assert_array_equal(got[name][1:], array[1:])


# the tree


@each_model
def test_what_is_quantised(case: str) -> None:
    params, config = model(case, "bfloat16")
    before, narrow = flatten(params), flatten(quantize(params))
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    names = {f"{head}.weight"}
    for layer in range(config.num_hidden_layers):
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            names.add(f"model.layers.{layer}.self_attn.{part}.weight")
        for part in ("gate_proj", "up_proj", "down_proj"):
            names.add(f"model.layers.{layer}.mlp.{part}.weight")
    scales = {name.replace("weight", "scale") for name in names}
    assert {*narrow} == {*before} | scales
    for name, array in before.items():
        if name in names:
            whole, scale = definition(np.asarray(array))
            np.testing.assert_array_equal(narrow[name], whole, err_msg=name)
            np.testing.assert_array_equal(
                narrow[name.replace("weight", "scale")], scale
            )
        else:
            assert narrow[name] is array
    assert flatten(params).keys() == before.keys()  # the given tree stays


@each_model
def test_fusing_and_quantising_commute(case: str) -> None:
    params, config = model(case)
    narrow = quantize(params)
    fused = fuse(narrow)
    assert_equal(fused, quantize(fuse(params)))
    assert_equal(unfuse(fused, config), narrow)
    assert_equal(fuse(dequantize(narrow)), dequantize(fused))


def test_dequantised_is_scale_times_integers() -> None:
    params, _ = model("biases")
    narrow, plain = flatten(quantize(params)), flatten(dequantize(quantize(params)))
    assert {*plain} == {*flatten(params)}
    for name, array in plain.items():
        assert array.dtype == jnp.float32
        scale = narrow.get(name.replace("weight", "scale"))
        want = wide(narrow[name])
        if array.ndim == 2 and "embed" not in name:
            want = wide(scale)[:, None] * want
        np.testing.assert_array_equal(array, want.astype(np.float32), err_msg=name)
    half = flatten(dequantize(quantize(params), "bfloat16"))
    assert {x.dtype.name for x in half.values()} == {"bfloat16"}


def test_public_names() -> None:
    assert jrope.quantize is quantize and jrope.dequantize is dequantize


WRONG: dict[str, tuple[Any, str]] = {
    "twice": (lambda p, c: quantize(quantize(p)), "quantised already"),
    "fused, twice": (lambda p, c: quantize(fuse(quantize(p))), "quantised already"),
    "kernels": (lambda p, c: quantize(fuse(p, "in_out")), "quantise before `fuse`"),
    "to kernels": (lambda p, c: fuse(quantize(p), "in_out"), "want out_in"),
    "plain": (lambda p, c: dequantize(p), "are not quantised"),
    "saved": (lambda p, c: save("/no", quantize(p), c), "`jrope.dequantize` them"),
    "loaded": (lambda p, c: load(EMBEDDED, quantize="int3"), "'int3', want None or"),
}


@pytest.mark.parametrize("case", WRONG)
def test_says_what_is_wrong(case: str) -> None:
    act, message = WRONG[case]
    with pytest.raises(JropeError, match=message):
        act(*model("untied"))


# the products


@pytest.mark.parametrize("fused", [False, True])
@each_model
def test_logits_are_those_of_the_dequantised_weights(case: str, fused: bool) -> None:
    """s (q x) beside (s q) x in float32: each element of s q is rounded, each sum too.

    Sums of up to 96 products, seven in a row in each of 2 layers: measured 1.1e-6.
    """
    params, config = model(case)
    narrow = quantize(params)
    want, _ = run(dequantize(narrow), TOKENS, config=config)
    got, _ = run(fuse(narrow) if fused else narrow, TOKENS, config=config)
    assert got.dtype == jnp.float32
    assert largest_gap(got, want) <= 4e-6


@pytest.mark.parametrize(("rows", "sums"), [(40, 2), (41, 1)])
def test_a_gpu_reads_two_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, rows: int, sums: int
) -> None:
    """Rows in the order they were in; 96 products and their sums, rounded each."""
    monkeypatch.setattr(products, "PAIRED", 1)
    random = np.random.default_rng(2)
    weights = {
        "weight": jnp.asarray(random.integers(-127, 128, (rows, 96)), jnp.int8),
        "scale": jnp.asarray(random.uniform(1e-3, 1e-2, rows), jnp.float32),
    }
    x = jnp.asarray(random.standard_normal((1, 1, 96)), jnp.float32)
    want = wide(x) @ (wide(weights["scale"])[:, None] * wide(weights["weight"])).T
    most = (
        np.abs(wide(x))
        @ np.abs(wide(weights["weight"]) * wide(weights["scale"])[:, None]).T
    )
    got = products._row_sums(weights["weight"], x[0], parts=sums) * weights["scale"]
    assert (np.abs(wide(got) - want) <= 98 * EPS * most).all()
    traced = jax.jit(linear).trace(weights, x)
    for platform, count in {"cuda": sums, "cpu": 1, "tpu": 1}.items():
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("stablehlo.reduce(") == count, platform


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each_model
def test_sixteen_bit_activations_lose_no_more_than_with_wide_weights(
    case: str, dtype: str
) -> None:
    """Beside float32 with the same integers; the wide weights are rounded, too.

    One row of one token goes the way of the multiply-reduce.  Of n values the measured
    error is off by 1 / sqrt(2 n) of itself, and two of them meet: three deviations.
    """
    params, config = model(case, dtype)
    narrow = quantize(params)
    truth, plain = dequantize(narrow, jnp.float32), dequantize(narrow)
    for tokens in (TOKENS, TOKENS[:1, :1]):
        want, _ = run(truth, tokens, config=config)
        got, cache = run(fuse(narrow), tokens, config=config)
        other, _ = run(plain, tokens, config=config)
        assert cache.keys[0].dtype == jnp.dtype(dtype) and got.dtype == jnp.float32
        step = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
        chance = 1 + 3 / np.sqrt(want.size)
        assert rms_gap(got, want) <= max(chance * rms_gap(other, want), step)
        assert largest_gap(got, want) <= 4 * step


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2])
@each_model
def test_decoding_is_the_full_pass(case: str, rows: int, dtype: str) -> None:
    params, config = model(case, dtype)
    narrow = fuse(quantize(params))
    want, _ = run(narrow, TOKENS[:rows], config=config)
    cache, got = KVCache.empty(config, rows, 9, dtype), []
    for t in range(9):
        logits, cache = run(
            narrow, TOKENS[:rows, t : t + 1], None, cache, config=config
        )
        got.append(logits[:, 0])
    gap = largest_gap(np.stack(got, 1), want)
    assert gap <= (4e-6 if dtype == "float32" else 2.0**-5)


def test_generate_and_score_take_it() -> None:
    params, config = model("tied")
    narrow = quantize(params)
    plain = dequantize(narrow)
    options: dict[str, Any] = {"config": config, "max_new_tokens": 12}
    got, want = (generate(tree, TOKENS, **options) for tree in (narrow, plain))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    scores = [score(tree, TOKENS, config=config) for tree in (narrow, plain)]
    np.testing.assert_allclose(*scores, atol=4e-5)


@each_model
def test_ids_outside_the_vocabulary_are_nan(case: str) -> None:
    params, config = model(case)
    tokens = np.array([[1, 61], [-1, 2], [3, 4]], np.int32)
    logits, _ = run(quantize(params), tokens, config=config)
    np.testing.assert_array_equal(
        np.isnan(logits).all(-1), [[True, True], [True, True], [False, False]]
    )
