"""Meshes and layouts: what is split over what, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sharding_helpers import CONFIG, LENGTHS, TOKENS, make_params

import jrope
from jrope.errors import JropeError
from jrope.sharding.axes import Axes, spec_of, specs_of
from jrope.sharding.meshes import layout, layout_of
from jrope.tree import flatten
from jrope.weights.fuse import fuse


def changed(**fields):
    return dataclasses.replace(CONFIG, **fields)


def test_mesh_has_the_axes_in_the_order_given():
    mesh = jrope.mesh("data=2, model=4")
    assert mesh.axis_names == ("data", "model") and mesh.devices.shape == (2, 4)
    assert jrope.mesh("model=2").devices.size == 2, "fewer than there are"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tensor=2",
            "got axis 'tensor', want one of data, fsdp, context, model, replica",
        ),
        ("modle=2", r"\(did you mean 'model'\?\)"),
        ("data=2,data=4", "got data twice"),
        ("data=two", "got 'data=two', want data=2"),
        ("data", "got 'data', want data=2"),
        ("data=0", "got 'data=0'"),
        ("data=2,model=8", "has 16 devices, there are 8; .* fits is data=2,model=4"),
    ],
)
def test_bad_meshes_are_refused(text, message):
    with pytest.raises(JropeError, match=message):
        jrope.mesh(text)


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        (
            "model=4",
            {"num_key_value_heads": 2},
            "num_key_value_heads 2 over model=4; .* is model=2,replica=2",
        ),
        ("model=8", {"intermediate_size": 44}, "intermediate_size 44 .* is model=4"),
        ("model=8", {"vocab_size": 61}, "vocab_size 61 over model=8; .* is model=1"),
        ("fsdp=8", {"hidden_size": 36}, "hidden_size 36 over fsdp=8; .* is fsdp=4"),
        ("model=4,replica=2", {}, "replicas hold the same .* take model=8"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_does(text, fields, message):
    config = changed(**fields)
    with pytest.raises(JropeError, match=message):
        jrope.shard(
            jrope.init_params(jax.random.key(0), config), jrope.mesh(text), config
        )


def test_every_axis_of_a_mesh_must_split_something():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    with pytest.raises(JropeError, match=r"got axes \['x', 'y'\] that split nothing"):
        layout(mesh)
    named = Axes(batch=("x",), tensor=("y",), kv_heads=("y",), fsdp=(), context=())
    params = jrope.shard(make_params(), mesh, CONFIG, named)
    assert layout_of(params).axes == named


SPECS = {
    "model.embed_tokens.weight": ("model", "fsdp"),
    "model.layers.0.self_attn.q_proj.weight": (("model", "replica"), "fsdp"),
    "model.layers.0.self_attn.k_proj.weight": ("model", "fsdp"),
    "model.layers.0.self_attn.k_proj.scale": ("model",),
    "model.layers.0.self_attn.o_proj.weight": ("fsdp", ("model", "replica")),
    "model.layers.0.self_attn.o_proj.bias": (None,),
    "model.layers.0.self_attn.o_proj.scale": (None,),
    "model.layers.0.mlp.up_proj.bias": (("model", "replica"),),
    "model.layers.0.mlp.down_proj.kernel": (("model", "replica"), "fsdp"),
    "model.layers.0.mlp.gate_up_proj.weight": (("model", "replica"), None, "fsdp"),
    "model.norm.weight": (None,),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_parameter_is_split_as_its_name_says(name):
    want = list(SPECS[name])
    if "embed" in name:
        want[0] = ("model", "replica")
    assert spec_of(name, len(want), Axes()) == PartitionSpec(*want)


def test_parameters_say_where_they_stand():
    params = make_params()
    assert layout_of(params) is None
    for text in ("data=2,model=4", "fsdp=2,model=4", "data=8,model=1"):
        placed = jrope.shard(params, jrope.mesh(text), CONFIG)
        found = layout_of(placed)
        assert found == layout(jrope.mesh(text))
        for name, spec in specs_of(flatten(params), found.axes).items():
            assert flatten(placed)[name].sharding == found.sharding(spec)


def test_parameters_placed_in_another_way_are_refused():
    mesh = jrope.mesh("data=2,model=4")
    params = jrope.shard(make_params(), mesh, CONFIG)
    down = params["model"]["layers"]["0"]["mlp"]["down_proj"]
    down["weight"] = jax.device_put(
        down["weight"], NamedSharding(mesh, PartitionSpec())
    )
    with pytest.raises(JropeError, match=r"0.mlp.down_proj.weight is P.*jrope.shard"):
        jrope.generate(params, TOKENS, LENGTHS, config=CONFIG)
    down["weight"] = jnp.asarray(np.asarray(down["weight"]))
    with pytest.raises(JropeError, match=r"down_proj.weight is elsewhere, want P"):
        jrope.score(params, jnp.asarray(TOKENS), config=CONFIG)


def test_joined_matrices_are_refused_where_they_would_be_misread():
    params, mesh = make_params(), jrope.mesh("data=2,model=4")
    with pytest.raises(JropeError, match="`unfuse` them first"):
        jrope.shard(fuse(params), mesh, CONFIG)
    joined = jax.device_get(fuse(jrope.shard(params, mesh, CONFIG)))
    with pytest.raises(JropeError, match="qkv_proj: joined in shares"):
        jrope.forward(joined, jnp.asarray(TOKENS), config=CONFIG)


@pytest.mark.parametrize("call", ["generate", "forward"])
def test_rows_that_a_mesh_does_not_divide_are_refused(call):
    params = jrope.shard(make_params(), jrope.mesh("data=4,model=2"), CONFIG)
    tokens = jnp.asarray(TOKENS[:6])
    with pytest.raises(JropeError, match=r"6 rows over data=4; give 8, or .* 2 ways"):
        getattr(jrope, call)(params, tokens, config=CONFIG)
