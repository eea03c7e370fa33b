"""forward and score on a mesh: one device's numbers, split as asked."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from sharding_helpers import (
    CONFIG,
    LENGTHS,
    TOKENS,
    assert_close,
    explicit,
    make_params,
    with_rope,
)

import jrope
from jrope.sharding.meshes import layout_of
from jrope.weights.fuse import fuse, unfuse

MESHES = {  # a mesh, and a rope for it: each method once, each mesh once or twice
    "data=8,model=1": "longrope-hf",
    "data=1,model=8": "dynamic",
    "data=2,model=4": "longrope",
    "data=4,model=2": "dynamic-growing",
    "fsdp=2,model=4": "dynamic-hf",
    "fsdp=2,data=2,model=2": "longrope-growing",
}


def forward_twice(params, config):
    """A prompt, then more tokens onto its cache."""
    first, more = jnp.asarray(TOKENS[:, :8]), jnp.asarray(TOKENS[:, 8:])
    lengths = np.minimum(LENGTHS, 8)
    run = partial(jrope.forward, config=config)
    run = run if layout_of(params) else jax.jit(run, static_argnames="capacity")
    a, cache = run(params, first, lengths=lengths, capacity=16)
    b, cache = run(params, more, cache=cache)
    return (a, b), cache


@pytest.mark.parametrize(("text", "rope"), MESHES.items())
def test_forward_gives_one_devices_logits_and_cache(text, rope):
    config, params = with_rope(rope), make_params()
    mesh = jrope.mesh(text)
    placed = jrope.shard(params, mesh, config)
    got, cache = forward_twice(placed, config)
    want, wanted = forward_twice(params, config)
    jax.tree.map(assert_close, (got, cache.keys), (want, wanted.keys))
    rows = tuple(n for n in ("data", "fsdp") if mesh.shape.get(n, 1) > 1)
    model = "model" if mesh.shape["model"] > 1 else None
    size = np.array([8 // np.prod([mesh.shape[n] for n in rows]), 16, 8, 8], int)
    size[2] //= mesh.shape["model"]
    for slots in (*cache.keys, *cache.values):
        assert {s.data.shape for s in slots.addressable_shards} == {tuple(size)}
    assert model is None or got[0].sharding.spec[2] == model


def test_key_value_heads_may_stand_on_replicas():
    config = dataclasses.replace(with_rope("yarn"), num_key_value_heads=4)
    params = make_params(config)
    placed = jrope.shard(params, jrope.mesh("model=4,replica=2"), config)
    run, tokens = partial(jrope.forward, config=config), jnp.asarray(TOKENS)
    got, cache = run(placed, tokens)
    assert_close(got, jax.jit(run)(params, tokens)[0])
    assert cache.keys[0].sharding.spec == PartitionSpec(None, None, "model")
    joined = fuse(placed)
    assert_close(run(joined, tokens)[0], got)
    jax.tree.map(assert_same, unfuse(joined, config), placed)
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    named = jrope.Axes(batch=(), tensor=("x", "y"), kv_heads=("x",), fsdp=())
    with pytest.raises(jrope.JropeError, match='name the axis "replica"'):
        fuse(jrope.shard(params, mesh, config, named))


@pytest.mark.parametrize("form", ["fuse", "kernel", "int8", "int8-fuse", "tied-int8"])
def test_score_takes_every_form_of_parameters(form):
    config = dataclasses.replace(CONFIG, tie_word_embeddings="tied" in form)
    params = make_params(config)
    placed = jrope.shard(params, jrope.mesh("data=2,model=4"), config)

    def change(tree):
        tree = jrope.quantize(tree) if "int8" in form else tree
        order = "in_out" if form == "kernel" else "out_in"
        return fuse(tree, order) if form in ("fuse", "kernel", "int8-fuse") else tree

    got, want = (
        jrope.score(change(tree), jnp.asarray(TOKENS), LENGTHS, config=config)
        for tree in (placed, params)
    )
    assert_close(got, want)


@pytest.mark.parametrize("text", ["data=2,model=4", "context=4,model=2"])
def test_greedy_tokens_are_one_devices(text):
    """Of equal logits on all devices the first one, too."""
    params, tokens = make_params(), TOKENS.copy()
    logits, _ = jrope.forward(params, jnp.asarray(tokens[:, :1]), config=CONFIG)
    tokens[:, 1] = np.argmax(logits[:, 0], axis=-1)
    tokens[:, 5] = 0
    even = {**params, "lm_head": jax.tree.map(jnp.zeros_like, params["lm_head"])}
    for tree, column in ((params, 0), (even, 4)):
        placed = jrope.shard(tree, jrope.mesh(text), CONFIG)
        got, want = (
            jrope.score(x, tokens, LENGTHS, config=CONFIG, greedy=True)
            for x in (placed, tree)
        )
        assert_close(got.logprobs, want.logprobs)
        np.testing.assert_array_equal(got.greedy, want.greedy)
        assert want.greedy[:, column].any()


def assert_same(got, want):
    """The same bits, and the same place if both stand on a mesh."""
    np.testing.assert_array_equal(got, want)
    if want.sharding.num_devices > 1:
        assert got.sharding == want.sharding


def test_forms_of_parameters_are_the_same_bits_on_a_mesh():
    params = make_params()
    placed = jrope.shard(params, jrope.mesh("fsdp=2,model=4"), CONFIG)
    jax.tree.map(assert_same, unfuse(fuse(placed, "in_out"), CONFIG), placed)
    narrow, wide = jrope.quantize(placed), jrope.quantize(params)
    jax.tree.map(assert_same, narrow, wide)
    jax.tree.map(assert_same, jrope.dequantize(narrow), jrope.dequantize(wide))
    joined = jax.device_get(fuse(placed))
    with pytest.raises(jrope.JropeError, match=r"_proj.*: joined in shares"):
        unfuse(joined, CONFIG)


def test_explicit_axes_are_a_mesh_too():
    params, tokens = make_params(), jnp.asarray(TOKENS)
    placed = jrope.shard(params, explicit("data=2,model=4"), CONFIG)
    run = partial(jrope.score, config=CONFIG)
    want = run(params, tokens)
    assert_close(run(placed, tokens), want)
    assert_close(jax.jit(run)(placed, tokens), want)


def test_an_id_outside_the_vocabulary_makes_its_row_nan():
    placed = jrope.shard(make_params(), jrope.mesh("data=2,model=4"), CONFIG)
    tokens = TOKENS.copy()
    tokens[0, 0], tokens[1, 0] = CONFIG.vocab_size, -1
    got = np.isnan(jrope.forward(placed, jnp.asarray(tokens), config=CONFIG)[0])
    assert got[:2].all() and not got[2:].any()
