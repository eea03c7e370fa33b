#!/usr/bin/env bash
# libtpu 0.0.42.1 (jax 0.10.2), compiling for TPU v5e: a sum over devices of float32
# numbers that are rounded to bfloat16 afterwards is itself taken in bfloat16.
#
# Seen: psum of a float32 product, then astype(bfloat16), is a float32 all_reduce in the
# StableHLO that jax hands over, and a bfloat16 all-reduce in the compiled program, each
# device's part rounded before it is added.  An optimisation barrier between the sum and
# the cast changes nothing.
#
# It matters for tensor parallelism: "summed in float32, rounded once" holds on one device
# and on GPUs, and not over the shares of several TPUs.
# Needs no TPU.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  "jax[tpu]==0.10.2" jaxlib==0.10.2 libtpu==0.0.42.1

export JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 TPU_WORKER_HOSTNAMES=localhost
export ALLOW_MULTIPLE_LIBTPU_LOAD=1
"$folder/venv/bin/python" - <<'PY'
import re
import sys
from functools import partial
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

devices = topologies.get_topology_desc("v5e:2x2", platform="tpu").devices
mesh = Mesh(np.array(devices), ("x",))
rows, columns = PartitionSpec("x", None), PartitionSpec(None, "x")


def product(x, w, barrier):
    contract = (((1,), (0,)), ((), ()))
    y = jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.float32)
    y = jax.lax.psum(y, "x")
    y = jax.lax.optimization_barrier(y) if barrier else y
    return y.astype(jnp.bfloat16)


def shape(size, spec):
    where = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=where)


seen = []
for barrier in (False, True):
    own = partial(product, barrier=barrier)
    specs = {"in_specs": (columns, rows), "out_specs": PartitionSpec()}
    program = jax.jit(jax.shard_map(own, mesh=mesh, **specs))
    lowered = program.lower(shape((8, 4096), columns), shape((4096, 4096), rows))
    given = lowered.as_text().replace("\n", " ")
    given = re.findall(r"all_reduce.*?-> tensor<8x4096x(\w+)>", given)
    made = re.findall(r"= (\w+)\[\S+ all-reduce", lowered.compile().as_text())
    print(f"jax {jax.__version__}, libtpu {metadata.version('libtpu')},", end=" ")
    print(f"barrier {barrier}: all_reduce of {given} became {made}")
    seen.append((given, made))
sys.exit(0 if seen == [(["f32"], ["bf16"])] * 2 else "the behaviour has changed")
PY
