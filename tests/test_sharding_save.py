"""Saving from a mesh: one device's folder, and Orbax's checkpoints there and back."""

import jax
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from sharding_helpers import CONFIG, explicit, make_params

import jrope
from jrope.sharding.meshes import layout_of

MESHES = ["data=2,model=4", "fsdp=2,context=2,model=2"]


def assert_equal(got, want):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


@pytest.mark.parametrize("text", MESHES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_has_the_bytes_of_one_device(text, dtype, tmp_path):
    params = make_params(dtype=dtype)
    placed = jrope.shard(params, explicit(text), CONFIG)
    how = {"config": CONFIG, "max_shard_size": 4000}
    one, other = (
        jrope.save(tmp_path / name, tree, **how)
        for name, tree in (("one", params), ("other", placed))
    )
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir()) and len(names) > 4
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_no_more_than_a_tensor_comes_to_the_host(tmp_path, monkeypatch):
    placed = jrope.shard(make_params(), jrope.mesh("fsdp=2,model=4"), CONFIG)
    sizes = []
    seen = np.asarray

    def gathered(x, *args, **kwargs):
        if isinstance(x, jax.Array):
            sizes.append(x.nbytes)
        return seen(x, *args, **kwargs)

    monkeypatch.setattr(np, "asarray", gathered)
    jrope.save(tmp_path / "model", placed, CONFIG)
    assert sorted(sizes) == sorted(x.nbytes for x in jax.tree.leaves(placed))


def test_orbax_takes_what_stands_on_a_mesh(tmp_path):
    text = "fsdp=2,context=2,model=2"
    ocp = pytest.importorskip("orbax.checkpoint")
    params = make_params(dtype="bfloat16")
    placed = jrope.shard(params, explicit(text), CONFIG)
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "mesh", placed)
        saver.save(tmp_path / "one", params)
        saver.wait_until_finished()
        here = SingleDeviceSharding(jax.devices()[0])

        def shape(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)

        # From a mesh to one device, and from one device to a mesh.
        one = saver.restore(tmp_path / "mesh", jax.tree.map(shape, params))
        shapes = jrope.shard(jax.eval_shape(lambda: params), explicit(text), CONFIG)
        back = saver.restore(tmp_path / "one", shapes)
    jax.tree.map(assert_equal, one, params)
    jax.tree.map(assert_equal, back, placed)
    assert layout_of(back) == layout_of(placed)
