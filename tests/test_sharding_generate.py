"""Generation on a mesh: one device's tokens, few and small collectives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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
from jrope.generation.loop import decode, prefill_and_first_token
from jrope.generation.request import prepare
from jrope.model.placed import cache_specs
from jrope.sharding.meshes import layout_of
from jrope.weights.fuse import fuse

HOT = {
    "sampler": jrope.Sampler(
        temperature=np.array([0, 1.3] * 4, np.float32),
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.2,
    ),
    "key": jax.random.key(3),
}
NEW = {"max_new_tokens": 12, "stop_ids": [5]}
MESHES = {
    "data=8,model=1": "dynamic",
    "data=1,model=8": "longrope",
    "data=2,model=4": "plain",
    "data=4,model=2": "dynamic-growing",
}


def run(params, config, **options):
    how = {"config": config, "logprobs": True, **NEW, **options}
    return jrope.generate(params, TOKENS, LENGTHS, **how)


@pytest.mark.parametrize(("text", "rope"), MESHES.items())
def test_generate_draws_one_devices_tokens(text, rope):
    config, params = with_rope(rope), make_params()
    placed = jrope.shard(params, jrope.mesh(text), config)
    got, want = (run(p, config, **HOT) for p in (placed, params))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    assert_close(got.logprobs, want.logprobs)
    assert_close(got.prompt_logprobs, want.prompt_logprobs)
    assert np.asarray(got.finite).all()


def test_stream_and_chunks_of_a_prompt_give_the_same_tokens():
    params, how = make_params(), {"config": CONFIG, **NEW}
    placed = fuse(jrope.shard(params, explicit("data=2,model=4"), CONFIG))
    want = np.asarray(jrope.generate(params, TOKENS, LENGTHS, **how).tokens)
    blocks = jrope.stream(placed, TOKENS, LENGTHS, chunk=5, prefill_chunk=8, **how)
    got = np.concatenate([*blocks], axis=1)
    np.testing.assert_array_equal(got, want[:, : got.shape[1]])


def test_a_row_whose_logits_are_not_finite_is_told_apart():
    params = make_params()
    head = np.array(params["lm_head"]["weight"])
    head[40, 0] = np.nan  # held by one device
    params["lm_head"]["weight"] = jnp.asarray(head)
    placed = jrope.shard(params, jrope.mesh("data=2,model=4"), CONFIG)
    assert not np.asarray(run(placed, CONFIG).finite).any()


def test_compile_ahead_compiles_what_generate_runs():
    config = dataclasses.replace(CONFIG, rms_norm_eps=2e-5)  # which no other test has
    params, mesh = make_params(config), jrope.mesh("data=2,model=4")
    placed = jrope.shard(params, mesh, config)
    shapes = jrope.shard(jax.eval_shape(lambda: params), mesh, config)
    how = {"config": config, "max_new_tokens": 12}
    jrope.compile_ahead(shapes, TOKENS, LENGTHS, **how)
    compiled = []

    def heard(event, _, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(more.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(heard)
    jrope.generate(placed, TOKENS, LENGTHS, **how)
    jax.monitoring.unregister_event_duration_listener(heard)
    big = ("prefill", "first_token", "decode")
    assert not [name for name in compiled if any(part in str(name) for part in big)]


def decode_program(params, config, rows):
    layout = layout_of(params)
    request = prepare(TOKENS[:rows], None, config, layout, max_new_tokens=12)
    cache, state, _ = prefill_and_first_token(params, request, config, False)
    wanted = layout.sharding(cache_specs(layout).keys)
    assert all(x.sharding.is_equivalent_to(wanted, 4) for x in cache.keys)
    limit = request.place(jnp.asarray(12, jnp.int32))
    given = params, cache, state, request.sampling, limit
    return decode.lower(*given, config=config, layout=layout).compile().as_text()


@pytest.mark.parametrize(
    ("text", "rows", "form"),
    [
        ("data=1,model=8", 1, "bfloat16"),
        ("data=1,model=8", 8, "plain"),
        ("data=2,model=4", 8, "fuse"),
        ("data=8,model=1", 8, "int8"),
    ],
)
def test_a_step_sums_hidden_states_and_gathers_nothing_large(text, rows, form):
    config = dataclasses.replace(CONFIG, num_hidden_layers=2)
    params = make_params(config, "bfloat16" if form == "bfloat16" else "float32")
    mesh = jrope.mesh(text)
    placed = jrope.shard(params, mesh, config)
    placed = {"fuse": fuse, "int8": jrope.quantize}.get(form, lambda p: p)(placed)
    found = collectives(decode_program(placed, config, rows))
    own, shares = rows // mesh.shape["data"], mesh.shape["model"]
    hidden = f"f32[{own},1,{config.hidden_size}]"
    layers = 2 * config.num_hidden_layers
    # Of the embedding's rows one more: each is held by one device.
    assert found.pop(("all-reduce", hidden), 0) == (layers + 1) * (shares > 1)
    allowed = {f"{t}[{own},1]" for t in ("f32", "u32")}  # of a row one number
    allowed |= {f"f32[{own}]", "s32[]"}
    allowed |= {f"f32[{own},{n}]" for n in (2, 16)}  # sums of the search for a cut-off
    sums = {shape for kind, shape in found if kind == "all-reduce"}
    assert sums <= allowed
    gathers = {(kind, shape) for kind, shape in found if kind != "all-reduce"}
    assert gathers <= {("all-gather", f"s32[{shares},2,{own}]")}  # each device's best
