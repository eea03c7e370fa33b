#!/usr/bin/env bash
# jax 0.10.2, CPU: a scan that stacks bfloat16 results goes over the whole stack in every
# step, so its time grows with their square; in float16 and float32 it writes
# the step's part in place.
#
# Seen, on two cores: 64 steps that give [64, 64] each take 1.9 ms, 256 steps 9.9 ms and
# 1,024 steps 109 ms in bfloat16, and 0.3, 0.8 and 2.9 ms in float16.  The loop's body holds
# convert(dynamic-update-slice(convert(stack), convert(part))), an update of float32
# [steps, 64, 64], as one loop over the stack; in float16 the update is of f16 itself.
#
# It matters for attention block by block, recurrent layers and whatever else scans over
# time: on a CPU let the scan give float32 and round behind it, or give fewer, larger parts.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2

cat > "$folder/see.py" <<'PY'
import re
import statistics
import time

import jax
import jax.numpy as jnp


@jax.jit
def scanned(xs):
    def step(carry, x):
        return carry, jnp.tanh(x.astype(jnp.float32)).astype(x.dtype)

    return jax.lax.scan(step, None, xs)[1]


def seconds(program, xs):
    found = []
    for _ in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(program(xs))
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


updates = {}
for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
    for steps in (64, 256, 1024):
        xs = jnp.ones((steps, 64, 64), dtype)
        program = scanned.lower(xs).compile()
        pattern = rf"= (\w+)\[{steps},64,64\]\S* dynamic-update-slice\("
        updates[dtype.__name__, steps] = {*re.findall(pattern, program.as_text())}
        took = f"{seconds(program, xs) * 1e3:.1f} ms, updates of"
        print("jax", jax.__version__, dtype.__name__, steps, took, updates[dtype.__name__, steps])
wanted = {"bfloat16": {"f32"}, "float16": {"f16"}, "float32": {"f32"}}
same = all(found == wanted[name] for (name, _), found in updates.items())
raise SystemExit(0 if same else "the behaviour has changed")
PY
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/see.py"
