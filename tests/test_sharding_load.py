"""Loading onto a mesh: every part once, no more of them on the host than one."""

import weakref

import jax
import numpy as np
import pytest
from sharding_helpers import CONFIG, make_params

import jrope
from jrope.hf import tensors as files
from jrope.hf.tensors import open_tensors
from jrope.sharding.meshes import layout_of
from jrope.tree import flatten, nest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return jrope.save(tmp_path_factory.mktemp("mesh") / "model", make_params(), CONFIG)


def assert_same(got, want):
    assert {*flatten(got)} == {*flatten(want)}
    for name, x in flatten(want).items():
        y = flatten(got)[name]
        assert (y.dtype, y.sharding) == (x.dtype, x.sharding), name
        np.testing.assert_array_equal(np.asarray(y), np.asarray(x), err_msg=name)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("data=2,model=4", {}),
        ("fsdp=2,model=4", {"dtype": "bfloat16"}),
        ("fsdp=4,model=2", {"quantize": "int8", "check_finite": True}),
    ],
)
def test_loaded_parameters_are_those_that_shard_places(folder, text, options):
    mesh = jrope.mesh(text)
    got, config = jrope.load(folder, mesh=mesh, **options)
    want, _ = jrope.load(folder, **options)
    flat = flatten(want)
    specs = flatten(layout_of(got).params(want))
    where = {name: layout_of(got).sharding(spec) for name, spec in specs.items()}
    assert_same(got, nest({n: jax.device_put(x, where[n]) for n, x in flat.items()}))
    assert config == CONFIG


def test_shapes_stand_where_the_arrays_will(folder):
    mesh = jrope.mesh("fsdp=2,model=4")
    shapes, _ = jrope.load_shapes(folder, mesh=mesh)
    params, _ = jrope.load(folder, mesh=mesh)
    for name, x in flatten(params).items():
        y = flatten(shapes)[name]
        assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)


def test_every_byte_is_read_once_and_no_more_than_a_part_waits(folder, monkeypatch):
    read, fill, aligned = [0], files._fill, files._aligned
    alive, most = weakref.WeakValueDictionary(), [0]

    def counted(file, start, out):
        read[0] += out.size
        fill(file, start, out)

    def watched(shape, dtype):
        out = aligned(shape, dtype)
        alive[id(out.base)] = out.base
        most[0] = max(most[0], sum(x.nbytes for x in alive.values()))
        return out

    def copied(x, where=None):  # as to an accelerator: a CPU keeps the host's memory
        return put(np.array(x) if isinstance(x, np.ndarray) else x, where)

    put = jax.device_put
    monkeypatch.setattr(files, "_fill", counted)
    monkeypatch.setattr(files, "_aligned", watched)
    monkeypatch.setattr(jax, "device_put", copied)
    jrope.load(folder, mesh=jrope.mesh("data=2,model=4"))
    slots = open_tensors(folder).slots
    assert read[0] == sum(slot.stop - slot.start for slot in slots.values())
    largest = max(
        (slot.stop - slot.start) // (4 if len(slot.shape) == 2 else 1)
        for slot in slots.values()
    )
    assert most[0] <= 2 * (largest + 64), "the part that is read, and the one before"


def test_a_part_of_a_tensor_is_its_slice(folder):
    found = open_tensors(folder)
    name = "model.layers.0.mlp.down_proj.weight"
    whole = found.read(name)
    for part in ((slice(8, 16), slice(None)), (slice(None), slice(12, 24))):
        np.testing.assert_array_equal(found.read(name, None, part), whole[part])
    corner, wide = (slice(3, 5), slice(1, 4)), np.dtype(np.float16)
    got = found.read(name, wide, corner)
    np.testing.assert_array_equal(got, whole[corner].astype(wide))


def test_a_mesh_is_refused_before_anything_is_read(folder, monkeypatch):
    monkeypatch.setattr(files.Tensors, "read", None)
    with pytest.raises(jrope.JropeError, match="num_key_value_heads 8 over"):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:3]), ("model",))
        jrope.load(folder, mesh=mesh)


def test_parameters_on_a_mesh_are_saved_whole(folder, tmp_path):
    placed, config = jrope.load(folder, mesh=jrope.mesh("fsdp=2,model=4"))
    again = jrope.save(tmp_path / "again", placed, config)
    file = "model.safetensors"
    assert (again / file).read_bytes() == (folder / file).read_bytes()
