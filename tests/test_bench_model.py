"""The benchmark's counts, random weights and arrangements."""

import dataclasses
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench_helpers import tiny

from jrope.bench.model import (
    SHAPES,
    Weights,
    cache_bytes,
    first_layers,
    named_shape,
    prefill_flops,
    random_params,
    read_bytes,
    step_bytes,
    tree_bytes,
    weight_count,
    with_layers,
)
from jrope.errors import JropeError
from jrope.model.llama import forward
from jrope.tree import flatten
from jrope.weights.fuse import fuse
from jrope.weights.int8 import weight_bytes


def test_counts_of_a_tiny_model_are_those_by_hand():
    config = tiny()
    attention = 8 * 8 + 4 * 8 + 4 * 8 + 8 * 8  # q, k, v, o
    layer = attention + 3 * 8 * 12
    norms = 2 * 2 * 8 + 8
    assert weight_count(config) == 2 * layer + norms + 2 * 50 * 8
    assert read_bytes(config, 2) == 2 * (2 * layer + norms + 50 * 8)
    slots = 2 * 2 * 1 * 4 * 10  # keys and values, layers, K, H, slots
    assert cache_bytes(config, 10, 2) == slots * 2
    assert step_bytes(config, 10, 2) == read_bytes(config, 2) + 2 * slots
    # per row: matrices, scores and weighted sums of half the square, one token's head
    row = 2 * (2 * layer) * 6 + 2 * (2 * 2 * 8 * 6 * 6) // 2 + 2 * 50 * 8
    assert prefill_flops(config, 3, 6) == 3 * row


def test_windows_see_fewer_pairs():
    config = tiny()
    narrow = replace(config, windows=(3, None))
    seen = sum(min(t + 1, 3) for t in range(6)) + sum(t + 1 for t in range(6))
    full = 2 * sum(t + 1 for t in range(6))
    # the square's half, which a causal pass counts, is less by half of the diagonal
    pairs = 4 * 8  # FLOPs of a head's channels, all heads
    less = prefill_flops(config, 1, 6) - prefill_flops(narrow, 1, 6)
    assert less == pairs * (full - seen) - pairs * (6 - 3) // 2


def test_tied_head_is_read():
    config = tiny(tie_word_embeddings=True)
    assert read_bytes(config, 1) == weight_count(config) == read_bytes(tiny(), 1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_tree_has_the_bytes_that_its_shapes_tell(tied: bool, quantize: Any) -> None:
    config = tiny(tie_word_embeddings=tied)
    for layout in (lambda tree: tree, fuse):
        tree = layout(random_params(config, "bfloat16", quantize))
        whole, read = tree_bytes(tree)
        assert whole == sum(weight_bytes(config, 2, quantize).values())
        assert read == read_bytes(config, 2, quantize)


def test_counts_of_llama3_8b_are_the_known_ones():
    config = named_shape("llama3-8b")
    assert weight_count(config) == 8_030_261_248
    assert round(weight_count(config) * 2 / 1e9, 2) == 16.06
    assert round(read_bytes(config, 2) / 1e9, 2) == 15.01
    assert cache_bytes(config, 1, 2) == 131072


def test_counts_of_llama2_7b_are_the_known_ones():
    assert weight_count(named_shape("llama2-7b")) == 6_738_415_616


@pytest.mark.parametrize("name", SHAPES)
def test_counts_are_those_of_the_arrays(name):
    config = with_layers(named_shape(name), 1)
    config = dataclasses.replace(
        config, vocab_size=16, hidden_size=32, intermediate_size=24
    )
    leaves = jax.tree.leaves(random_params(config, jnp.bfloat16))
    assert weight_count(config) == sum(leaf.size for leaf in leaves)


def test_unknown_shapes_and_layers_are_refused():
    with pytest.raises(JropeError, match="want one of llama2-7b"):
        named_shape("llama9")
    with pytest.raises(JropeError, match="got 3, want 1 to 2"):
        with_layers(tiny(), 3)


def test_random_weights_are_neither_zero_nor_equal():
    params = flatten(random_params(tiny(), jnp.bfloat16))
    for name, array in params.items():
        values = np.asarray(array, np.float32)
        if values.ndim == 1:
            assert (values == 1).all(), name
        else:
            assert len(np.unique(values)) > 8, name
            assert 0 < np.abs(values).max() <= 0.0201, name


@pytest.mark.parametrize("keep", [False, True])
def test_weights_are_the_same_in_every_arrangement(keep):
    config, tokens = tiny(), jnp.arange(6, dtype=jnp.int32)[None]
    want = forward(random_params(config, jnp.float32), tokens, config=config)[0]
    weights = Weights(random_params(config, jnp.float32), config, keep=keep)
    for order in ("none", "out_in", "in_out", "none", "in_out", "out_in"):
        tree = weights.arranged(order)
        layer = tree["model"]["layers"]["0"]
        assert ("qkv_proj" in layer["self_attn"]) == (order != "none")
        assert ("kernel" in layer["mlp"]["down_proj"]) == (order == "in_out")
        got = forward(tree, tokens, config=config)[0]
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_only_one_arrangement_is_kept():
    params = random_params(tiny(), jnp.float32)
    weights = Weights(params, tiny())
    weights.arranged("out_in")
    assert params["model"]["layers"] == {}
    kept = random_params(tiny(), jnp.float32)
    Weights(kept, tiny(), keep=True).arranged("out_in")
    assert len(kept["model"]["layers"]) == 2


def test_first_layers_are_the_first():
    params = random_params(tiny(layers=3), jnp.float32)
    got = first_layers(params, 2)
    assert {*got["model"]["layers"]} == {"0", "1"}
    assert got["lm_head"] is params["lm_head"]
