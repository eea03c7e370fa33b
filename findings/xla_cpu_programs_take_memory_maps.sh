#!/usr/bin/env bash
# jax 0.10.2 on a CPU: a compiled program takes memory maps of its process until it is let
# go, and Linux gives a process 65,530 of them.
#
# Seen: 100 programs of one line each (a sine and a sum) take six maps each, and 50 of four
# matrix products, softmaxes and sorts 24 each (18 to 30 wanted here: it is a number of
# kernels).  `del` of the compiled functions gives them back, `jax.clear_caches()` those of
# functions that are kept.  At six, a process is full with some 10,900 small programs.
#
# It matters wherever one process compiles much: a test worker with 2,800 tests was seen at
# 63,952 maps and 7.7 GB.  In a process whose maps are used up, compiling is no Python error:
# it ended by a segmentation fault, after LLVM said "Cannot allocate memory".
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import gc
import sys

import jax
import jax.numpy as jnp


def maps() -> int:
    gc.collect()
    with open("/proc/self/maps") as file:
        return sum(1 for _ in file)


def small(x, i):
    return jnp.sin(x) * i + jnp.sum(x)


def large(x, i):
    y = jnp.outer(x, x)
    for _ in range(4):
        y = jnp.where(y > 0, jax.nn.softmax(y @ y + i), jnp.sort(y, 1))
    return y


def compiled(function, count):
    """Its programs, and the maps that each of them takes."""
    before = maps()
    kept = [jax.jit(lambda x, i=i: function(x, i)) for i in range(count)]
    jax.block_until_ready([f(x) for f in kept])
    return kept, (maps() - before) / count


x = jnp.ones(8)
jax.block_until_ready([small(x, 0), large(x, 0)])
first = maps()
few, each_small = compiled(small, 100)
many, each_large = compiled(large, 50)
full = maps()
del few
dropped = maps()
jax.clear_caches()
cleared = maps()
print(f"jax {jax.__version__}: {each_small:.1f} maps a small program, {each_large:.1f} a large")
print(f"{first} maps at first, {full} in the end, {dropped} less the small, {cleared} cleared")
as_seen = (
    round(each_small) == 6
    and 18 <= each_large <= 30
    and full - dropped >= 550
    and cleared < first + 50
)
sys.exit(0 if as_seen else "the behaviour has changed")
PY
