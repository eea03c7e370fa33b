"""Attention over arrays that a mesh splits, outside of `jax.shard_map`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_helpers import WAYS, choose
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from sharding_helpers import assert_close, collectives

from jrope.model import blockwise
from jrope.model.attention import attend

MESHES = {
    "rows and heads": ((2, 4), PartitionSpec("data", None, "model")),
    "heads": ((1, 3), PartitionSpec(None, None, "model")),
    "rows": ((3, 1), PartitionSpec("data")),
}


def split(mesh, spec, kind):
    """q, k and v of as many rows and key heads as the mesh has, and their mesh."""
    devices = np.array(jax.devices()[: mesh[0] * mesh[1]]).reshape(mesh)
    there = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(kind,) * 2)
    spec = NamedSharding(there, spec)
    normal = np.random.default_rng(0).standard_normal
    shapes = ((mesh[0], 24, heads * mesh[1], 8) for heads in (2, 1, 1))
    given = [jnp.asarray(normal(shape, np.float32)) for shape in shapes]
    return there, given, [jax.device_put(x, spec) for x in given]


def check(mesh, kind):
    there, given, placed = split(*MESHES[mesh], kind)
    see = partial(attend, window=20)
    with jax.set_mesh(there):
        program = jax.jit(lambda *x: see(*x)).lower(*placed).compile()
    assert_close(program(*placed), see(*given))
    assert not collectives(program.as_text())


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("way", WAYS)
def test_rows_and_heads_need_no_other_device(way, mesh, monkeypatch):
    choose(monkeypatch, way)
    check(mesh, AxisType.Auto)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("few", [False, True])
def test_axes_of_short_prompts_may_be_explicit(few, mesh, monkeypatch):
    """However few scores a CPU computes at a time."""
    if few:
        monkeypatch.setattr(blockwise, "SCORES", 0)
        monkeypatch.setattr(blockwise, "SIZES", (8, 8))
    check(mesh, AxisType.Explicit)
