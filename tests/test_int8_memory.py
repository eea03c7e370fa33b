"""8-bit weights: no wide copies, neither of a decode step nor of loading."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_helpers import prefill_temp
from int8_helpers import (
    middling,
    model,
)
from model_helpers import assert_equal

from jrope.bench.model import cache_bytes, named_shape, random_params, with_layers
from jrope.bench.runs import Decode
from jrope.hf.checkpoint import load, save
from jrope.model.config import parameter_shapes
from jrope.model.products import BLOCK
from jrope.tree import flatten
from jrope.weights import int8
from jrope.weights.fuse import fuse
from jrope.weights.int8 import Quantization, quantize, weight_bytes

of_the_cpu_backend = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="memory as XLA's CPU backend uses it"
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoding_one_row_holds_no_wide_weights(dtype: str, tied: bool) -> None:
    config, params = middling(4, dtype, tied)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params) if leaf.dtype == jnp.int8]
    program = Decode(params, config, np.full(1, 32), 4, 64).program
    assert program.temp < max(sizes) / 2, "not even one matrix's integers twice"
    assert_loop_carries_no_wide_matrix(program.call.as_text(), plain=not tied)


@of_the_cpu_backend
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


@of_the_cpu_backend  # others take several at once
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


@of_the_cpu_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_prompt_takes_no_more_with_integers(dtype: str) -> None:
    """But for a block widened and one result; deeper models no more than plain ones."""

    def temporaries(layers: int, how: Quantization | None) -> int:
        config = with_layers(named_shape("smollm2-135m"), layers)
        params = jax.eval_shape(lambda: fuse(random_params(config, dtype, how)))
        return prefill_temp(params, config, 256)

    block = 1024 * 1536 * jnp.dtype(dtype).itemsize
    for layers in (2, 5):
        plain, narrow = temporaries(layers, None), temporaries(layers, "int8")
        assert narrow <= plain + block + 256 * 3072 * 4
