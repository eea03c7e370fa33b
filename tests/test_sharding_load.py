"""Loading onto a mesh: every part once, no more of them on the host than one."""

import collections
import dataclasses
import itertools
import json
import math
import os
import threading
import weakref

import jax
import numpy as np
import pytest
from sharding_helpers import CONFIG, make_params

import jrope
from jrope.hf import config_to_hf
from jrope.hf import tensors as files
from jrope.hf.tensors import open_tensors
from jrope.model.config import parameter_shapes
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


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_shapes_stand_where_the_arrays_will(folder, quantize):
    how = {"mesh": jrope.mesh("fsdp=2,model=4"), "quantize": quantize}
    shapes, _ = jrope.load_shapes(folder, **how)
    params, _ = jrope.load(folder, **how)
    assert {*flatten(shapes)} == {*flatten(params)}
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
    assert most[0] <= largest + 64, "the part that is read"


def sparse_folder(path, config):
    """A folder of zeros in bfloat16 that take no room on the disk."""
    path.mkdir()
    entries, end = {}, 0
    for name, shape in parameter_shapes(config).items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    file = path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, 8 + len(header) + end)
    (path / "config.json").write_text(json.dumps(config_to_hf(config)))
    return path


def read_before_an_accelerator(folder, text, monkeypatch):
    """Load as if devices were no part of this machine's memory, and kept nothing.

    Returns:
      The most bytes held at once, of each tensor the ranges of bytes that were read,
      and the parts that reached devices.
    """
    held, most, lock = [0], [0], threading.Lock()
    read, put = collections.defaultdict(list), collections.Counter()
    aligned, fill = files._aligned, files._fill

    def count(size):
        with lock:
            held[0] += size
            most[0] = max(most[0], held[0])

    def watched(shape, dtype):
        out = aligned(shape, dtype)
        count(out.base.nbytes)
        weakref.finalize(out.base, count, -out.base.nbytes)
        return out

    def counted(file, start, out):
        read[file.name].append((start, start + out.size))
        fill(file, start, out)

    class Gone:
        nbytes = 0

        def __init__(self, x, where=None):
            self.shape = getattr(x, "shape", ())
            put[where] += x.nbytes if isinstance(x, np.ndarray) else 0

        def block_until_ready(self):
            return self

    monkeypatch.setattr(files, "_fill", counted)
    monkeypatch.setattr(files, "_aligned", watched)
    monkeypatch.setattr(jax, "device_put", Gone)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(
        jax,
        "make_array_from_single_device_arrays",
        lambda shape, *_: Gone(jax.ShapeDtypeStruct(shape, np.int8)),
    )
    jrope.load(folder, mesh=jrope.mesh(text))
    return most[0], read, {where: n for where, n in put.items() if where in DEVICES}


DEVICES = {*jax.devices()}


@pytest.mark.parametrize("text", ["model=8", "data=2,model=4", "fsdp=4,context=2"])
def test_eight_readers_hold_a_part_each(text, tmp_path, monkeypatch):
    wide = {"hidden_size": 512, "intermediate_size": 1024, "vocab_size": 4096}
    config = dataclasses.replace(CONFIG, num_hidden_layers=6, **wide)
    folder = sparse_folder(tmp_path / "sparse", config)
    most, read, put = read_before_an_accelerator(folder, text, monkeypatch)
    size = sum(map(math.prod, parameter_shapes(config).values())) * 2
    (ranges,) = map(sorted, read.values())
    assert sum(stop - start for start, stop in ranges) == size
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges)), "each byte once"
    shares = math.prod(
        n for name, n in jrope.mesh(text).shape.items() if name in ("model", "fsdp")
    )
    assert most <= 8 * (2 * 4096 * 512 // shares + 64), "a part of the embedding each"
    assert len(put) == 8 and min(put.values()) >= size / shares


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
