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
        top_k=np.array([20, 3, 0, 0] * 2, np.int32),  # no group of rows wants all
        top_p=np.array([1, 1, 0.9, 0.9] * 2, np.float32),
        min_p=0.01,
        repetition_penalty=1.2,
        frequency_penalty=np.array([0.4, -0.3] * 4, np.float32),
        presence_penalty=0.2,
    ),
    "key": jax.random.key(3),
}
NEW = {"max_new_tokens": 12, "stop_ids": [5]}
NEW |= {"min_new_tokens": 4, "logit_bias": {5: 2.0, 17: 1.0, 40: -100}}
CASES = {  # mesh: rope, rows, form of the parameters
    "data=8,model=1": ("dynamic", 8, "int8"),
    "data=1,model=8": ("longrope", 1, "bfloat16"),
    "data=2,model=4": ("plain", 8, "fuse"),
    "data=4,model=2": ("dynamic-growing", 8, "plain"),
}


def decoded(params, config, rows):
    """What `generate` does, by hand: the rows at its end, and its compiled loop."""
    layout = layout_of(params)
    how = {"sampler": HOT["sampler"], "key": HOT["key"], **NEW}
    if rows == 1:
        one = {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "frequency_penalty": 0.4}
        how["sampler"] = dataclasses.replace(HOT["sampler"], **one)
    request = prepare(TOKENS[:rows], LENGTHS[:rows], config, layout, **how)
    cache, state, scores = prefill_and_first_token(params, request, config, True)
    if layout is not None:
        wanted = layout.sharding(cache_specs(layout).keys)
        assert all(x.sharding.is_equivalent_to(wanted, 4) for x in cache.keys)
    limit = request.place(jnp.asarray(12, jnp.int32))
    given = params, cache, state, request.sampling, limit
    program = decode.lower(*given, config=config, layout=layout).compile()
    return program(*given)[1], scores, program.as_text()


@pytest.mark.parametrize(("text", "case"), CASES.items())
def test_tokens_are_one_devices_and_what_devices_tell_each_other_is_small(text, case):
    rope, rows, form = case
    config, mesh = with_rope(rope), jrope.mesh(text)
    params = make_params(config, "bfloat16" if form == "bfloat16" else "float32")
    change = {"fuse": fuse, "int8": jrope.quantize}.get(form, lambda tree: tree)
    placed = change(jrope.shard(params, mesh, config))
    got, scores, program = decoded(placed, config, rows)
    want, wanted, _ = decoded(change(params), config, rows)
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.lengths, want.lengths)
    tolerance = 2e-2 if form == "bfloat16" else 2e-5
    assert_close(got.logprobs, want.logprobs, tolerance)
    assert_close(scores, wanted, tolerance)
    assert np.asarray(got.finite).all()
    check_collectives(program, rows // mesh.shape["data"], mesh.shape["model"])


def check_collectives(program, own, shares):
    """Of a step for so many rows of a device: sums of hidden states, and small ones."""
    found = collectives(program)
    sums = 2 * CONFIG.num_hidden_layers + 1  # the embedding's rows are summed, too
    hidden = f"f32[{own},1,{CONFIG.hidden_size}]"
    assert found.pop(("all-reduce", hidden), 0) == sums * (shares > 1)
    small = {f"f32[{own}]", f"f32[{own},1]", f"u32[{own},1]", "s32[]", "s32[4]"}
    small |= {f"f32[{own},{n}]" for n in (2, 16)}  # of the search for a cut-off
    assert {shape for kind, shape in found if kind == "all-reduce"} <= small
    others = {(kind, shape) for kind, shape in found if kind != "all-reduce"}
    assert others <= {("all-gather", f"s32[{shares},2,{own}]")}  # each device's best


def test_stream_and_chunks_of_a_prompt_give_the_same_tokens():
    params, how = make_params(), {"config": CONFIG, **NEW}
    placed = fuse(jrope.shard(params, explicit("data=2,model=4"), CONFIG))
    want = np.asarray(jrope.generate(params, TOKENS, LENGTHS, **how).tokens)
    blocks = jrope.stream(placed, TOKENS, LENGTHS, chunk=5, prefill_chunk=8, **how)
    got = np.concatenate([*blocks], axis=1)
    np.testing.assert_array_equal(got, want[:, : got.shape[1]])


def test_compile_ahead_compiles_what_generate_runs_which_tells_of_a_nan():
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
    assert np.asarray(jrope.generate(placed, TOKENS, LENGTHS, **how).finite).all()
    # With the same programs: one device's weights hold a NaN, and all rows know.
    placed["lm_head"]["weight"] = placed["lm_head"]["weight"].at[40, 0].set(jnp.nan)
    placed = jrope.shard(placed, mesh, config)
    assert not np.asarray(jrope.generate(placed, TOKENS, LENGTHS, **how).finite).any()
    jax.monitoring.unregister_event_duration_listener(heard)
    big = ("prefill", "first_token", "decode")
    assert not [name for name in compiled if any(part in str(name) for part in big)]
