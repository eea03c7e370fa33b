"""8-bit weights: the definition bit for bit, the same products, no wide copies."""

import dataclasses
import json
import re
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from conftest import make_tiny_hf

import jrope
from jrope import int8
from jrope.bench_model import (
    cache_bytes,
    named_shape,
    random_params,
    read_bytes,
    step_bytes,
    with_layers,
)
from jrope.bench_runs import Decode, Prefill
from jrope.cache import KVCache
from jrope.checkpoint import load, save
from jrope.cli import bench, main
from jrope.cli import generate as cli_generate
from jrope.config import LlamaConfig, flatten, nest, parameter_shapes
from jrope.errors import JropeError
from jrope.evaluate import score
from jrope.fuse import fuse, unfuse
from jrope.generate import generate, stream
from jrope.hf import config_from_hf
from jrope.int8 import dequantize, quantize, weight_bytes
from jrope.lab.journal import read_journal
from jrope.layers import BLOCK
from jrope.model import forward

MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True, "kv_heads": 1},
    "biases": {"kv_heads": 4, "bias": True, "head_dim": 24, "layers": 1},
}
each_model = pytest.mark.parametrize("case", MODELS)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)
EMBEDDED = Path(__file__).parents[1] / "examples" / "models" / "jrope-tiny"
EPS = 2.0**-24  # half a last bit of float32

run = jax.jit(forward, static_argnames="config")


@cache
def model(case: str, dtype: str = "float32") -> tuple[dict[str, Any], LlamaConfig]:
    tiny = make_tiny_hf(**MODELS[case])
    flat = {name: jnp.asarray(x, dtype) for name, x in tiny.weights.items()}
    return nest(flat), config_from_hf(tiny.config)


def definition(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales in float64, rounded to float32 where the formula is.

    (A product or quotient of float32 numbers in float64, rounded, is float32's own.)
    """
    wide = w.astype(np.float64)
    most = np.abs(wide).max(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = (127 / most).astype(np.float32).astype(np.float64)
        whole = np.rint((wide * steps[:, None]).astype(np.float32))
    whole = np.where(most[:, None] == 0, 0, np.clip(whole, -127, 127))
    return whole.astype(np.int8), (most / 127).astype(np.float32)


def matrix(dtype: Any) -> np.ndarray:
    """Rows of every size, ties, a row of zeros, a lonely large number."""
    random = np.random.default_rng(1)
    w = random.standard_normal((40, 96)) * 10.0 ** random.integers(-4, 4, (40, 1))
    w[3] = 0
    w[4] = np.arange(96) / 2 + 0.5
    w[4, 0] = -127  # scale 1: halves go to even
    w[5, 1:] = 1e-3
    w[5, 0] = 3e4
    return w.astype(dtype)


def assert_equal(got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    got, want = flatten(got), flatten(want)
    assert {*got} == {*want}
    for name, x in want.items():
        assert got[name].dtype == x.dtype, name
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def wide(got: Any) -> np.ndarray:
    return np.asarray(got, np.float64)


def largest_gap(got: Any, want: Any) -> float:
    """As a part of the largest."""
    return float(np.abs(wide(got) - wide(want)).max() / np.abs(wide(want)).max())


def rms_gap(got: Any, want: Any) -> float:
    gap = np.mean((wide(got) - wide(want)) ** 2) / np.mean(wide(want) ** 2)
    return float(np.sqrt(gap))


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
    "loaded": (lambda p, c: load(EMBEDDED, quantize="int4"), "'int4', want None or"),
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@each_model
def test_sixteen_bit_activations_lose_no_more_than_with_wide_weights(
    case: str, dtype: str
) -> None:
    """Beside float32 with the same integers; the wide weights are rounded, too.

    One row of one token goes the way of the multiply-reduce.
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
        assert rms_gap(got, want) <= max(1.1 * rms_gap(other, want), step)
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


# memory


def middling(layers: int, dtype: str, tied: bool = True) -> Any:
    """Integers of 3.5 MB a layer beside activations of kilobytes."""
    shape = with_layers(named_shape("smollm2-135m"), layers)
    config = dataclasses.replace(shape, vocab_size=8192, tie_word_embeddings=tied)
    return config, fuse(random_params(config, jnp.dtype(dtype), "int8"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_one_row_holds_no_wide_weights(dtype: str, tied: bool) -> None:
    config, params = middling(4, dtype, tied)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.int8]
    program = Decode(params, config, np.full(1, 32), 4, 64).program
    assert program.temp < max(sizes) / 2, "not even one matrix's integers twice"
    assert_loop_carries_no_wide_matrix(program.call.as_text(), plain=not tied)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_rows_widens_a_block_at_a_time(dtype: str) -> None:
    """XLA's CPU backend widens for a product; left alone, the weights of all layers.

    (In bfloat16 it widens the cache, too.)
    """
    temps = []
    for layers in (2, 6):
        config, params = middling(layers, dtype)
        program = Decode(params, config, np.full(2, 32), 4, 64).program
        assert_loop_carries_no_wide_matrix(program.call.as_text())
        temps.append(program.temp)
    more = cache_bytes(config, 2 * 64, 4) if dtype == "bfloat16" else 2**18
    assert temps[1] - temps[0] < more, "nothing more for four more layers"
    assert temps[1] < 2 * 4 * BLOCK * 1536


def assert_loop_carries_no_wide_matrix(hlo: str, plain: int = 0) -> None:
    """What the decode loop carries around: the integers, and no matrix of floats."""
    loops = [s.split(" while(")[0] for s in hlo.splitlines() if " while(" in s]
    (carried,) = (s for s in loops if "s8[8192,576]" in s and "s8[960,576]" in s)
    floats = re.findall(r"f(?:32|16)\[(?:960|576|3072|8192),", carried)
    assert len(floats) == plain, "but an embedding that is no head"


def test_loading_holds_the_integers_and_one_wide_tensor(tmp_path: Path) -> None:
    config = dataclasses.replace(
        with_layers(named_shape("smollm2-135m"), 2), vocab_size=4096
    )
    save(tmp_path / "m", random_params(config, jnp.bfloat16), config)
    held, steps = 0, list[tuple[str, int, int]]()
    before = sum(x.nbytes for x in jax.live_arrays())

    def progress(name: str, size: int) -> None:
        now = sum(x.nbytes for x in jax.live_arrays()) - before
        steps.append((name, size, now))

    narrow, _ = load(tmp_path / "m", "float32", quantize="int8", progress=progress)
    sizes = weight_bytes(config, 4, "int8")
    for name, size, now in steps:
        held += sizes[name]
        assert size == 4 * np.prod(parameter_shapes(config)[name]), "as it arrived"
        assert held <= now <= held + 4096, "the wide one is gone"
    assert sum(x.nbytes for x in flatten(narrow).values()) == held
    assert_equal(narrow, quantize(load(tmp_path / "m", "float32")[0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantising_makes_no_wider_copy(dtype: str) -> None:
    w = jax.ShapeDtypeStruct((2048, 1024), jnp.dtype(dtype))
    memory = int8._quantize.lower(w).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= w.size * w.dtype.itemsize + 8 * 2048


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_load_is_quantize_of_load(
    dtype: str | None, tied: bool, tmp_path: Path
) -> None:
    params, config = model("tied" if tied else "biases", "float16")
    save(tmp_path / "m", params, config)
    got, found = load(tmp_path / "m", dtype, quantize="int8")
    assert found == config
    assert_equal(got, quantize(load(tmp_path / "m", dtype)[0]))


# bench


@pytest.mark.parametrize("tied", [True, False])
def test_random_integers_are_shaped_like_quantised_weights(tied: bool) -> None:
    config = dataclasses.replace(
        with_layers(named_shape("smollm2-135m"), 1),
        vocab_size=64,
        tie_word_embeddings=tied,
    )
    made = flatten(random_params(config, jnp.bfloat16, "int8"))
    want = flatten(quantize(random_params(config, jnp.bfloat16)))
    assert {*made} == {*want}
    for name, x in made.items():
        assert (x.shape, x.dtype) == (want[name].shape, want[name].dtype), name
        if x.dtype == jnp.int8:
            whole = np.asarray(x)
            assert whole.min() == -127 and whole.max() == 127
            scale = np.asarray(made[name.replace("weight", "scale")])
            np.testing.assert_allclose(scale * 127, 0.02, rtol=1e-6)
    sizes = weight_bytes(config, 2, "int8")
    assert sum(sizes.values()) == sum(x.nbytes for x in made.values())


def test_bytes_are_those_by_hand() -> None:
    config = named_shape("llama3-8b")
    d, f, layers, v, kv = 4096, 14336, 32, 128256, 1024
    layer = d * d + 2 * kv * d + d * d + 3 * d * f  # q, k, v, o; gate, up, down
    rows = d + 2 * kv + d + 2 * f + d
    norms = (2 * layers + 1) * d * 2
    head = v * d + 4 * v
    want = layers * (layer + 4 * rows) + norms + head
    assert read_bytes(config, 2, "int8") == want
    assert sum(weight_bytes(config, 2, "int8").values()) == want + v * d * 2
    slots = 10 * 2 * layers * kv * 2
    assert step_bytes(config, 10, 2, "int8") == want + slots
    assert step_bytes(config, 10, 2) == read_bytes(config, 2) + slots
    assert round(read_bytes(config, 2) / want, 3) == 1.998


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings of a moment, environment as it was."""
    measure = bench.measure_ceilings
    small = {"size": 2**18, "products": ((32, 32, 32),), "repeats": 1}
    monkeypatch.setattr(bench, "measure_ceilings", partial(measure, **small))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    monkeypatch.setenv("JROPE_CACHE_DIR", "")


def test_bench_counts_integers_and_scales(quick: None, capsys: Any) -> None:
    words = ["--shape", "smollm2-135m", "--layers", "1", "--context", "64"]
    words += ["--new", "4", "--repeat", "1", "--batch", "1,2", "--only", "decode"]
    words += ["--json", "-"]
    assert main(["bench", *words, "--quantize", "int8"]) == 0
    out, err = capsys.readouterr()
    assert "1 layers, bfloat16, int8 weights: 32.1 MB of weights" in err
    report, config = json.loads(out), with_layers(named_shape("smollm2-135m"), 1)
    assert report["model"]["quantize"] == "int8"
    assert report["model"]["dtype"] == "bfloat16"
    bytes_ = sum(weight_bytes(config, 2, "int8").values())
    assert report["model"]["weight_bytes"] == report["model"]["read_bytes"] == bytes_
    for row, filled in zip(report["rows"], (64 + 2, 2 * 48 + 2 * 2), strict=True):
        assert row["counted"] == step_bytes(config, filled, 2, "int8")
        at_best = row["counted"] / row["seconds"] / report["ceilings"]["read"]
        assert row["of_ceiling"] == pytest.approx(at_best)
        assert row["memory_bytes"] < 1.5 * bytes_
    assert {row["order"] for row in report["rows"]} == {"out_in"}


def test_bench_takes_a_folder(quick: None, capsys: Any) -> None:
    words = ["--context", "16", "--new", "2", "--repeat", "1", "--fuse", "none"]
    words += ["--only", "prefill"]
    words += ["--quantize", "int8", "--json", "-"]
    assert main(["bench", str(EMBEDDED), *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {row["order"] for row in report["rows"]} == {"none"}
    assert report["load_seconds"] > 0


def test_prefill_runs_in_the_loops_arrangement() -> None:
    config, params = middling(1, "bfloat16")
    work = Prefill(params, config, 1, 32, 32)
    assert work.run() > 0


# the command line


@pytest.mark.parametrize(
    "words, message",
    [
        (["generate", EMBEDDED, "x", "--quantize", "int4"], "invalid choice: 'int4'"),
        (["evaluate", EMBEDDED, "--quantize", "8"], "invalid choice: '8'"),
        (["bench", EMBEDDED, "--quantize"], "--quantize: expected one argument"),
        (["bench", EMBEDDED, "--quantize", "int8", "--fuse", "in_out"], "lie out_in"),
        (
            ["bench", EMBEDDED, "--quantize", "int8", "--versus", "transformers"],
            "transformers does not have these int8 weights",
        ),
        (["generate", "/no/folder", "x", "--quantize", "int8"], "no folder /no/folder"),
    ],
)
def test_wrong_arguments_are_one_line(
    words: list[Any], message: str, capsys: Any
) -> None:
    assert main([str(word) for word in words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("jrope: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_weights_that_fit_only_as_integers(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(bench, "memory_limit", lambda: 70 * 10**9)
    assert main(["bench", "--shape", "llama3-70b", "--quantize", "int8"]) == 2
    assert "71.6 GB of int8 weights" in capsys.readouterr().err


def test_generate_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The text alone would not tell: 48 greedy tokens are those of wide weights."""
    given: list[Any] = []

    def spy(params: Any, *args: Any, **options: Any) -> Any:
        given.append(params)
        return stream(params, *args, **options)

    monkeypatch.setattr(cli_generate, "stream", spy)
    words = ["Emma had never been", "--max-new-tokens", "8", "--dtype", "float32"]
    assert main(["generate", str(EMBEDDED), *words, "--quantize", "int8"]) == 0
    params, _ = load(EMBEDDED, "float32")
    assert_equal(given[0], quantize(params))
    assert len(capsys.readouterr().out) > 10


def evaluate(path: Path, *words: object, status: int = 0) -> float:
    """The perplexity's logarithm on the embedded model's unseen text."""
    text = ("--text", EMBEDDED / "held_out.txt", "--context", 256, "--stride", 256)
    command = ["evaluate", EMBEDDED, *text, "--out", path, "--tokens", 8192, *words]
    assert main([str(word) for word in command]) == status
    (nll,) = (r["nll"] for r in read_journal(path) if r.get("windows") == "sliding")
    return nll


def test_perplexity_of_the_embedded_model_hardly_changes(
    tmp_path: Path, capsys: Any
) -> None:
    """And a journal is gone on with only as it was begun."""
    plain, narrow = tmp_path / "plain.jsonl", tmp_path / "int8.jsonl"
    before = evaluate(plain, "--dtype", "float32")
    after = evaluate(narrow, "--dtype", "float32", "--quantize", "int8")
    assert before != after
    assert abs(np.expm1(after - before)) < 0.003
    assert "float32, int8 weights" in capsys.readouterr().out
    kept = narrow.read_bytes()
    evaluate(narrow, "--dtype", "float32", "--quantize", "int8")
    assert narrow.read_bytes() == kept, "nothing was measured again"
    evaluate(narrow, "--dtype", "float32", status=2)
    err = capsys.readouterr().err
    assert "a run with dtype float32, int8 weights (now float32): run it as" in err
    evaluate(plain, "--dtype", "float32", "--quantize", "int8", status=2)
