#!/usr/bin/env bash
# jax 0.10.2 with libtpu 0.0.42.1: jax.make_mesh((2, 8)) gives a mesh on a TPU v5e:4x4 and
# raises on a v6e:4x4, which has as many chips in the same torus.
#
# Seen: an axis of 8 on 4x4 chips needs an axis of the torus split between two of the
# mesh.  make_mesh allows that on v5e, and on v6e says NotImplementedError ("Failed to
# find assignment for logical_axis_index 1 of size 8").  mesh_utils.create_device_mesh
# raises on both, and gives a mesh on both with allow_split_physical_axes=True.
#
# It matters to code that was tried on a v5e: eight-way tensor parallelism beside two-way
# data parallelism on 16 chips of v6e wants create_device_mesh.
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
import sys
from functools import partial
from importlib import metadata

import jax
from jax.experimental import mesh_utils, topologies

split = partial(mesh_utils.create_device_mesh, allow_split_physical_axes=True)
ways = {
    "make_mesh": lambda devices: jax.make_mesh((2, 8), ("a", "b"), devices=devices),
    "create_device_mesh": lambda devices: mesh_utils.create_device_mesh((2, 8), devices),
    "the same, axes may be split": lambda devices: split((2, 8), devices),
}
print(f"jax {jax.__version__}, libtpu {metadata.version('libtpu')}")
seen = []
for kind in ("v5e:4x4", "v6e:4x4"):
    devices = topologies.get_topology_desc(kind, platform="tpu").devices
    for name, make in ways.items():
        try:
            make(devices)
            seen.append("a mesh")
        except NotImplementedError:
            seen.append("NotImplementedError")
        print(f"{kind}, {name}: {seen[-1]}")
no = "NotImplementedError"
wanted = ["a mesh", no, "a mesh", no, no, "a mesh"]
sys.exit(0 if seen == wanted else "the behaviour has changed")
PY
