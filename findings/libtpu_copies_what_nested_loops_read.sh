#!/usr/bin/env bash
# libtpu 0.0.42.1 (jax 0.10.2), compiling for TPU v5e: what a loop inside of a loop reads
# in blocks is copied whole, ahead of the outer loop, into the layout that suits a block.
#
# Seen: words uint32 [16384, 2048], eight 4-bit numbers to each, are arguments that no loop
# changes.  An inner loop takes 1024 rows at a time with dynamic_slice, shifts and masks
# groups of 16 words, and multiplies.  Within an outer loop of 8 steps the entry of the
# program has a copy of all words with layout {0,1}, and 134,411,776 bytes of temporaries;
# the words are 134,217,728.  An optimisation barrier on the words in each outer step, or
# with_layout_constraint on them there, changes nothing: the same copy, the same bytes.
# with_layout_constraint on the block inside of the inner loop leaves no copy but that of
# a block, and 0 bytes.  So does an inner loop alone.
#
# It matters for decoding with quantised weights: the steps are the outer loop, and memory
# holds the words twice.  [8192, 1024] are copied as well, but into the nearer memory, S(1)
# in the program's text, which is not counted: 0 bytes do not say that nothing is copied.
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
from jax.experimental import topologies
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import SingleDeviceSharding

ROWS, STEPS = 1024, 8


def as_given(words):
    return words


def by_rows(words):
    return with_layout_constraint(words, Layout(major_to_minor=(0, 1)))


ways = {  # what becomes of all words in an outer step, and of a block in an inner one
    "nothing": (as_given, as_given),
    "a barrier": (jax.lax.optimization_barrier, as_given),
    "a layout for all": (by_rows, as_given),
    "a layout for a block": (as_given, by_rows),
}


def numbers(words):
    shifts = jnp.arange(0, 32, 4, dtype=jnp.uint32)[:, None]
    parts = words.reshape(len(words), -1, 1, 16) >> shifts & 15
    return parts.astype(jnp.int32).astype(jnp.bfloat16).reshape(len(words), -1)


def product(words, x, outer, inner):
    words = outer(words)

    def block(i, y):
        rows = inner(jax.lax.dynamic_slice_in_dim(words, i * ROWS, ROWS))
        part = jnp.einsum("bi,oi->bo", x, numbers(rows))
        return jax.lax.dynamic_update_slice_in_dim(y, part, i * ROWS, axis=1)

    return jax.lax.fori_loop(0, len(words) // ROWS, block, jnp.zeros_like(x))


def steps(words, x, outer, inner):
    def step(_, x):
        return product(words, x, outer, inner)

    return jax.lax.fori_loop(0, STEPS, step, x)


(device,) = topologies.get_topology_desc(
    "v5e:1x1", platform="tpu", chips_per_host_bounds=(1, 1, 1)
).devices
shape = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(device))
print(f"jax {jax.__version__}, libtpu {metadata.version('libtpu')}")


def seen(loops, way, width=16384):
    outer, inner = ways[way]
    own = partial(loops, outer=outer, inner=inner)
    words, x = shape((width, width // 8), jnp.uint32), shape((8, width), jnp.bfloat16)
    program = jax.jit(own).lower(words, x).compile()
    entry = program.as_text().partition("\nENTRY ")[2]
    copied = re.search(rf"= u32\[{width},{width // 8}\]{{0,1\S* copy\(", entry)
    size = program.memory_analysis().temp_size_in_bytes
    how = "copied whole" if copied else "not copied whole"
    print(f"{loops.__name__}, {way}, {width}: {size} bytes, {how}")
    return size >= words.size * 4, copied is not None


wanted = [
    (seen(steps, "nothing"), (True, True)),
    (seen(steps, "a barrier"), (True, True)),
    (seen(steps, "a layout for all"), (True, True)),
    (seen(steps, "a layout for a block"), (False, False)),
    (seen(product, "nothing"), (False, False)),
    (seen(steps, "nothing", 8192), (False, True)),
    (seen(steps, "a layout for a block", 8192), (False, False)),
]
same = all(got == was for got, was in wanted)
sys.exit(0 if same else "the behaviour has changed")
PY
