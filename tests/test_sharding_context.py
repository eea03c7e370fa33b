"""Prompts and caches split along their tokens: the same numbers, less memory."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_helpers import small_blocks
from jax.sharding import PartitionSpec
from sharding_helpers import (
    CONFIG,
    LENGTHS,
    TOKENS,
    assert_close,
    collectives,
    explicit,
    make_params,
    with_rope,
)

import jrope
from jrope.generation.loop import decode, prefill, prefill_and_first_token
from jrope.generation.request import chunk_inputs, prepare
from jrope.model.attention import attend
from jrope.model.config import parameter_shapes
from jrope.model.context import attend_share, context_share
from jrope.sharding.meshes import layout, layout_of
from jrope.tree import nest

MESHES = {  # a mesh, and a rope for it
    "context=8": "dynamic",
    "fsdp=2,context=4": "dynamic-growing",
    "context=2,model=4": "longrope-growing",
    "data=2,context=2,model=2": "dynamic-hf",
}


def forward_thrice(params, config):
    """A prompt, more tokens onto its cache wherever rows stand, and one more."""
    parts = [jnp.asarray(TOKENS[:, a:b]) for a, b in ((0, 8), (8, 11), (11, 12))]
    lengths = np.minimum(LENGTHS, 8)
    run = partial(jrope.forward, config=config)
    run = run if layout_of(params) else jax.jit(run, static_argnames="capacity")
    a, cache = run(params, parts[0], lengths=lengths, capacity=16)
    b, cache = run(params, parts[1], cache=cache)
    c, cache = run(params, parts[2], cache=cache)
    valid = np.arange(8)[None, :] < lengths[:, None]
    return np.where(valid[..., None], a, 0), b, c


@pytest.mark.parametrize(("text", "rope"), MESHES.items())
def test_forward_gives_one_devices_logits(text, rope):
    config, params = with_rope(rope), make_params()
    placed = jrope.shard(params, jrope.mesh(text), config)
    got = forward_thrice(placed, config)
    jax.tree.map(assert_close, got, forward_thrice(params, config))


RANDOM = np.random.default_rng(5)
SEGMENTS = np.sort(RANDOM.integers(0, 4, (2, 30)), axis=1).astype(np.int32)


@pytest.mark.parametrize("width", [8, 4000])  # of an MLP: a ring, and gathered
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_a_ring_and_gathered(width, masked, monkeypatch):
    small_blocks(monkeypatch, 4)
    q, k, v = (
        jnp.asarray(RANDOM.standard_normal((2, 30, n, 8), np.float32))
        for n in (4, 2, 2)
    )
    given = {"window": None, "segments": None}
    if masked:
        given = {"window": 5, "segments": jnp.asarray(SEGMENTS)}
    config = dataclasses.replace(CONFIG, intermediate_size=width)
    there = layout(jrope.mesh("context=4"))

    def own(q, k, v):
        share = context_share(q[..., 0, 0], None, there.axes)
        mine = (
            jnp.take_along_axis(x, share.own[..., None, None], axis=1, mode="clip")
            for x in (q, k, v)
        )
        q, *keys = mine
        return share.whole(attend_share(q, keys, share, config=config, **given))

    none = PartitionSpec()
    run = jax.jit(there.map(own, (none, none, none), none))
    assert_close(run(q, k, v), attend(q, k, v, **given))
    kinds = {kind for kind, _ in collectives(run.lower(q, k, v).compile().as_text())}
    assert ("collective-permute" in kinds) == (width == 8)


def test_tokens_and_scores_are_one_devices_in_chunks_of_a_prompt():
    config, params = with_rope("longrope"), make_params()
    placed = jrope.shard(params, explicit("context=4,model=2"), config)
    how = {"config": config, "prefill_chunk": 5, "stop_ids": [5], "logprobs": True}
    got, want = (
        jrope.generate(tree, TOKENS, LENGTHS, max_new_tokens=12, **how)
        for tree in (placed, params)
    )
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    assert_close(got.logprobs, want.logprobs)
    assert_close(got.prompt_logprobs, want.prompt_logprobs)


def test_a_single_token_is_a_prompt():
    params, tokens = make_params(), jnp.asarray(TOKENS[:, :1])
    placed = jrope.shard(params, jrope.mesh("context=8"), CONFIG)
    run = partial(jrope.forward, config=CONFIG, logits="last")
    assert_close(run(placed, tokens)[0], jax.jit(run)(params, tokens)[0])


def test_a_step_sends_the_same_whatever_the_cache_holds():
    params, how = make_params(), {"max_new_tokens": 20}
    placed = jrope.shard(params, jrope.mesh("context=8"), CONFIG)
    request = prepare(TOKENS, LENGTHS, CONFIG, layout_of(placed), **how)
    cache, state, _ = prefill_and_first_token(placed, request, CONFIG, False)
    assert request.capacity == 40
    for x in (*cache.keys, *cache.values):
        assert {s.data.shape for s in x.addressable_shards} == {(8, 5, 8, 8)}
    limit = request.place(jnp.asarray(20, jnp.int32))
    given = placed, cache, state, request.sampling, limit
    program = decode.lower(*given, config=CONFIG, layout=request.layout).compile()
    heads, size = CONFIG.num_attention_heads, CONFIG.head_dim
    assert collectives(program.as_text()) == {
        ("all-reduce", f"f32[8,{heads},1]"): 1,
        ("all-reduce", f"f32[8,{heads},{size + 1}]"): 1,
    }
    _, state = program(*given)
    want = jrope.generate(params, TOKENS, LENGTHS, config=CONFIG, **how).tokens
    np.testing.assert_array_equal(state.tokens[:, :20], want)


def test_score_takes_segments_and_lengths():
    params, tokens = make_params(), jnp.asarray(TOKENS)
    placed = jrope.shard(params, explicit("context=4,model=2"), CONFIG)
    run = partial(jrope.score, config=CONFIG)
    assert_close(run(placed, tokens, LENGTHS), run(params, tokens, LENGTHS))
    segments = jnp.asarray(np.repeat([[0] * 5 + [1] * 7], 8, axis=0), jnp.int32)
    run = partial(run, segment_ids=segments, remat=True)
    assert_close(run(placed, tokens), run(params, tokens))


def test_gradients_are_one_devices():
    params, tokens = make_params(), jnp.asarray(TOKENS)
    placed = jrope.shard(params, explicit("context=4,model=2"), CONFIG)

    def loss(params):
        return -jnp.mean(jrope.score(params, tokens, LENGTHS, config=CONFIG))

    got, want = (jax.jit(jax.grad(loss))(p) for p in (placed, params))
    jax.tree.map(partial(assert_close, tolerance=2e-4), got, want)


def test_a_cache_of_one_device_is_refused():
    params, tokens = make_params(), jnp.asarray(TOKENS)
    placed = jrope.shard(params, jrope.mesh("context=4,model=2"), CONFIG)
    _, cache = jrope.forward(params, tokens[:, :8], config=CONFIG, capacity=16)
    with pytest.raises(jrope.JropeError, match="another order than over context=4"):
        jrope.forward(placed, tokens[:, 8:], cache=cache, config=CONFIG)


def long_prefill(text, count):
    """The memory of a prompt of 131,072 in a model of 2 layers, compiled, not run."""
    config = dataclasses.replace(
        CONFIG,
        num_hidden_layers=2,
        hidden_size=256,
        intermediate_size=512,
        num_key_value_heads=count,
        attention_bias=False,
        mlp_bias=False,
    )
    shapes: dict = {
        name: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        for name, shape in parameter_shapes(config).items()
    }
    params = jrope.shard(nest(shapes), jrope.mesh(text), config)
    prompt = np.zeros((1, 2**17), np.int32)
    request = prepare(prompt, None, config, layout_of(params), max_new_tokens=16)
    static = {"config": config, "scored": False, "layout": request.layout}
    given = params, *chunk_inputs(request, 0), None, None
    lowered = prefill.lower(*given, capacity=request.capacity, **static)
    return lowered.compile().memory_analysis()


@pytest.mark.parametrize("count", [2, 16])  # key/value heads: gathered, and in a ring
def test_memory_of_a_long_prompt_falls_with_the_devices(count):
    one, eight = (long_prefill(f"context={n}", count) for n in (1, 8))
    assert eight.temp_size_in_bytes < one.temp_size_in_bytes / 6
    cache = eight.output_size_in_bytes / one.output_size_in_bytes
    assert 1 / 8 <= cache < 1 / 7.9
