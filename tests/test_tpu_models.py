"""Models of 8B to 405B on TPUs: what their programs take and tell each other."""

import os

import numpy as np
import pytest
from tpu_helpers import MOVES, loop_bodies, results, shapes_on, tiny

import jrope
from jrope.bench.model import named_shape
from jrope.generation.request import Options
from jrope.plan.compiled import compiled_temporaries, compiler
from jrope.plan.devices import parse_cluster
from jrope.plan.memory import Mesh, Work, cache_shard, temporaries, weight_shards

MODELS = [  # shape, topology, mesh, rows
    ("llama3-8b", "v5e:2x2", Mesh(data=1, model=4), 8),
    ("llama3-8b", "v6e:1x1", Mesh(data=1, model=1), 1),
    ("llama3-70b", "v6e:4x4", Mesh(data=2, model=8), 16),
    ("llama3-405b", "v5e:16x16", Mesh(data=2, model=8, replica=16), 16),
]


def decode_of(work, mesh, on):
    there = jrope.mesh(str(mesh), on=on)
    params = shapes_on(there, work.config, work.quantize or work.dtype)
    prompt = np.ones((work.batch, work.prompt), np.int32)
    how: Options = {"max_new_tokens": work.new, "prefill_chunk": 256}
    return jrope.compile_ahead(params, prompt, config=work.config, **how)["decode"]


@pytest.mark.skipif(not os.environ.get("JROPE_TPU_MODELS"), reason="MODELS=1")
@pytest.mark.parametrize(("name", "on", "mesh", "rows"), MODELS)
def test_a_decode_step_fits_and_moves_no_cache(name, on, mesh, rows):
    work = Work(config=named_shape(name), batch=rows, context=8192)
    program = decode_of(work, mesh, on)
    sizes, text = program.memory_analysis(), program.as_text()
    held = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    assert held <= parse_cluster(on).device.usable
    cache = cache_shard(work, mesh, work.slots)
    known = sum(weight_shards(work, mesh).values()) + cache
    assert sizes.argument_size_in_bytes == pytest.approx(known, rel=0.01)
    layers, own = work.config.num_hidden_layers, rows // mesh.data
    hidden = own * work.config.hidden_size
    sums = results(loop_bodies(text), "all-reduce")
    assert [n for _, n in sums].count(hidden) == (2 * layers + 1) * (mesh.ways > 1)
    slots = cache // (2 * layers * work.itemsize)
    assert not [n for _, n in results(text, f"{MOVES}|all-gather") if n >= slots]


def test_the_plan_asks_the_compiler():
    cluster = parse_cluster("v5e")
    assert compiler(cluster).startswith("libtpu 0.")
    assert compiler(parse_cluster("h100")) is None
    work = Work(config=tiny(), batch=2, context=600, new=8)
    mesh = Mesh(data=1, model=1)
    got, formula = (f(work, mesh, cluster) for f in (compiled_temporaries, temporaries))
    assert 0.3 < got / formula < 3
