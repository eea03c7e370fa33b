#!/usr/bin/env bash
# jax 0.10.2 on a CPU: the fusion emitters take most of the time in which small
# programs compile, also where LLVM is told to optimise nothing.
#
# Seen: the forward pass and the gradient of transformer layers of width 32 compile in
# 5 times the CPU seconds that they take with --xla_cpu_use_fusion_emitters=false,
# which brings back the emitters before them, at --xla_backend_optimization_level=0 on
# both sides.  Results agree to 1e-5.
#
# It matters to test suites, which compile far more than they run: the level alone, which
# is what one finds recommended, leaves most of the time where it was.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2

cat > "$folder/compile.py" <<'PY'
import os
import time

import jax
import jax.numpy as jnp

def layer(w, x):
    y = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
    q, k, v = (jnp.einsum("btd,dnh->bnth", y, w[n]) for n in "qkv")
    scores = jnp.einsum("bnth,bnsh->bnts", q, k) / 4
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
    x = x + jnp.einsum("bnts,bnsh,nhd->btd", weights, v, w["o"])
    return x + jnp.tanh(x @ w["up"]) @ w["down"]

def loss(w, x):
    return jnp.mean(jnp.square(layer(w, layer(w, x))))

key = jax.random.key(0)
shapes = {n: (32, 2, 16) for n in "qkv"} | {"o": (2, 16, 32), "up": (32, 64), "down": (64, 32)}
w = {n: jax.random.normal(jax.random.fold_in(key, i), s) / 8 for i, (n, s) in enumerate(shapes.items())}
x = jax.random.normal(key, (2, 24, 32))
lowered = jax.jit(layer).lower(w, x), jax.jit(jax.grad(loss)).lower(w, x)
begin = time.process_time()
compiled = [one.compile() for one in lowered]
spent = time.process_time() - begin
print(spent, float(sum(jnp.sum(jnp.abs(g)) for g in jax.tree.leaves(compiled[1](w, x)))))
PY
export JAX_PLATFORMS=cpu
level=--xla_backend_optimization_level=0
for _ in 1 2 3; do
  XLA_FLAGS="$level" "$folder/venv/bin/python" "$folder/compile.py" >> "$folder/new"
  XLA_FLAGS="$level --xla_cpu_use_fusion_emitters=false" \
    "$folder/venv/bin/python" "$folder/compile.py" >> "$folder/old"
done
"$folder/venv/bin/python" - "$folder" <<'PY'
import statistics
import sys

import jax

rows = {n: [[*map(float, line.split())] for line in open(f"{sys.argv[1]}/{n}")] for n in ("new", "old")}
new, old = (statistics.median(row[0] for row in rows[n]) for n in ("new", "old"))
a, b = rows["new"][0][1], rows["old"][0][1]
print(f"jax {jax.__version__}: {new:.2f} s of CPU with fusion emitters, {old:.2f} without")
print(f"ratio {new / old:.2f}; gradients' absolute sum {a:.6f} and {b:.6f}")
sys.exit(0 if new > 1.5 * old and abs(a / b - 1) < 1e-5 else "the behaviour has changed")
PY
