#!/usr/bin/env bash
# jax 0.10.2, CPU: a choice between an array and itself, jnp.where(flag, w, w) with a scalar
# flag, is dropped in float32 and kept in bfloat16, where a product then holds all of the
# array in float32.
#
# Seen: weights [2048, 1024] times a row, as a multiply and a sum along the rows, take 0
# bytes of temporaries in either type.  With w = jnp.where(flag, w, w) before it, float32
# still takes 0, and bfloat16 8,388,608, which is a float32 for every weight.  An
# optimisation barrier after the choice changes nothing.  jax.lax.select(flag, w, w), which
# does not broadcast the flag, is dropped in both.
#
# It matters where a choice is written for its type alone: for example to make an array
# vary over a mesh's axes as another does, which jax.shard_map checks.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2

cat > "$folder/see.py" <<'PY'
from functools import partial

import jax
import jax.numpy as jnp

ways = {
    "no choice": lambda flag, w: w,
    "where": lambda flag, w: jnp.where(flag, w, w),
    "where, barrier": lambda flag, w: jax.lax.optimization_barrier(
        jnp.where(flag, w, w)
    ),
    "select": lambda flag, w: jax.lax.select(flag, w, w),
}
copy = 2048 * 1024 * 4


def product(flag, w, row, way):
    return jnp.sum(ways[way](flag, w).astype(jnp.float32) * row, axis=1)


def temporaries(way, dtype):
    flag = jax.ShapeDtypeStruct((), jnp.bool_)
    w = jax.ShapeDtypeStruct((2048, 1024), dtype)
    row = jax.ShapeDtypeStruct((1024,), jnp.float32)
    program = jax.jit(partial(product, way=way)).lower(flag, w, row).compile()
    return program.memory_analysis().temp_size_in_bytes


seen = {
    (dtype.__name__, way): temporaries(way, dtype)
    for dtype in (jnp.float32, jnp.bfloat16)
    for way in ways
}
for name, size in seen.items():
    print("jax", jax.__version__, *name, size, "bytes of temporaries")
large = {name for name, size in seen.items() if size >= copy}
small = all(size < 65536 for name, size in seen.items() if name not in large)
same = large == {("bfloat16", "where"), ("bfloat16", "where, barrier")} and small
raise SystemExit(0 if same else "the behaviour has changed")
PY
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/see.py"
