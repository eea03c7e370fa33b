"""4-bit weights on a mesh: groups stay whole, and products are the same."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_hf
from model_helpers import assert_equal
from quantized_helpers import FORMATS, write_folder
from sharding_helpers import CONFIG, LENGTHS, ROPE, TOKENS, make_params

import jrope
from jrope.plan.memory import Mesh, Work, weight_shards
from jrope.tree import flatten, nest
from jrope.weights.fuse import fuse, unfuse

WIDE = dataclasses.replace(
    CONFIG,
    hidden_size=256,
    intermediate_size=512,
    head_dim=16,
    rope=dataclasses.replace(ROPE, rotary_dim=16),
)


def test_a_mesh_holds_whole_groups() -> None:
    params = make_params(WIDE)
    narrow = jrope.quantize(params, "int4")
    there = jrope.shard(params, jrope.mesh("fsdp=2,model=2"), WIDE)
    placed = jrope.quantize(there, "int4")
    assert_equal(placed, narrow)
    flat = flatten(placed)
    for name, parts in {"down_proj": (2, 2), "up_proj": (2, 2)}.items():
        scale = flat[f"model.layers.0.mlp.{name}.scale"]
        split = tuple(n // k for n, k in zip(scale.shape, parts, strict=True))
        assert scale.sharding.shard_shape(scale.shape) == split
    assert_equal(unfuse(fuse(placed), WIDE), narrow)


def test_zeros_lie_as_scales_do() -> None:
    """And products on a mesh are the same, each device's groups with their own."""
    random = np.random.default_rng(0)
    flat = flatten(jrope.quantize(make_params(WIDE), "int4"))
    for name in [n for n in flat if n.endswith(".scale")]:
        levels = random.integers(-8, 8, flat[name].shape).astype(np.int8)
        flat[name.replace(".scale", ".zero")] = jnp.asarray(levels)
    whole = nest(flat)
    placed = jrope.shard(whole, jrope.mesh("fsdp=2,model=2"), WIDE)
    there = flatten(placed)
    for name in [n for n in there if n.endswith(".zero")]:
        beside = there[name.replace(".zero", ".scale")]
        assert there[name].sharding == beside.sharding, name
    joined = fuse(placed)
    assert_equal(unfuse(joined, WIDE), whole)
    got, want = (
        jrope.score(tree, jnp.asarray(TOKENS), LENGTHS, config=WIDE)
        for tree in (joined, whole)
    )
    np.testing.assert_allclose(got, want, atol=1e-4)


def test_a_folder_goes_to_a_mesh_as_it_is(tmp_path: Path) -> None:
    sizes = {"layers": 1, "vocab_size": 64, "intermediate_size": 128}
    folder, _ = write_folder(make_tiny_hf(**sizes), tmp_path, *FORMATS["awq"])
    want, _ = jrope.load(folder, quantize="int4")
    meshes = jrope.mesh("fsdp=2,model=2"), jrope.mesh("model=2")
    for there in meshes:
        got, _ = jrope.load(folder, quantize="int4", mesh=there)
        assert_equal(got, want)
        shapes, _ = jrope.load_shapes(folder, quantize="int4", mesh=there)
        assert jax.tree.map(lambda x: x.sharding, got) == jax.tree.map(
            lambda x: x.sharding, shapes
        )


def test_planned_bytes_are_those_of_a_device() -> None:
    shapes = jrope.quantize(make_params(WIDE), "int4")
    flat = flatten(jrope.shard(shapes, jrope.mesh("model=2"), WIDE))
    how = {"context": 64, "new": 8, "dtype": "float32", "quantize": "int4"}
    sizes = weight_shards(Work(config=WIDE, batch=1, **how), Mesh(data=1, model=2))
    for name, size in sizes.items():
        scale = name.replace(".weight", ".scale")
        arrays = [flat[n] for n in {name, scale} if n in flat]
        held = [x.addressable_shards[0].data.nbytes for x in arrays]
        if "bias" not in name:
            assert sum(held) == size, name


def test_cut_groups_are_refused_by_name() -> None:
    narrow = jrope.quantize(make_params(), "int4")
    wanted = r"(o|down)_proj.scale: got 1 groups of int4 inputs over 2 devices, want at"
    with pytest.raises(jrope.JropeError, match=wanted):
        jrope.shard(narrow, jrope.mesh("model=2"), CONFIG)


def test_cut_groups_of_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    tiny = make_tiny_hf(layers=1, vocab_size=64)
    folder, _ = write_folder(tiny, tmp_path, *FORMATS["gptq-sym"])
    with pytest.raises(
        jrope.JropeError, match=r"down_proj.scale: got 3 groups of int4"
    ):
        jrope.load(folder, quantize="int4", mesh=jrope.mesh("model=2"))
