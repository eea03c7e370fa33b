#!/usr/bin/env bash
# jax 0.10.2 on a CPU (seen with amx_bf16): a product of bfloat16 matrices of which one was
# transposed is computed from float32 copies of both; the same product as one einsum is not.
#
# Seen: in the compiled program the operands of `jnp.einsum("mk,nk->mn", x, w)` are bfloat16,
# those of `jnp.matmul(x, w.T)` float32; so they are behind an optimization_barrier between the
# transposition and the product, and where the transposed matrix was doubled first.
# Transpositions elsewhere in the program do no harm.
#
# It matters for attention written with heads moved to the front: 256 tokens of nine heads
# of 64 took two to three times as long as with the same arrays left as they lie.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import re
import sys

import jax
import jax.numpy as jnp

barrier = jax.lax.optimization_barrier
matmul = lambda x, w: jnp.matmul(x, w, preferred_element_type=jnp.float32)  # noqa: E731
ways = {
    "einsum": lambda x, w: jnp.einsum(
        "mk,nk->mn", x, w, preferred_element_type=jnp.float32
    ),
    "transposed": lambda x, w: matmul(x, w.T),
    "behind a barrier": lambda x, w: matmul(x, barrier(w.T)),
    "doubled after": lambda x, w: matmul(x, w.T * 2),
    "elsewhere": lambda x, w: (matmul(x, w[:576]), x.T * 2),
}
seen = {}
for name, way in ways.items():
    x, w = (jnp.ones((rows, 576), jnp.bfloat16) for rows in (2048, 960))
    text = jax.jit(way).lower(x, w).compile().as_text()
    types = dict(re.findall(r"%([\w.\-]+) = (\w+)\[", text))
    (operands,) = re.findall(r" dot\(([^)]*)\)", text)
    seen[name] = {types[word.strip().split("%")[-1]] for word in operands.split(",")}
    print(f"jax {jax.__version__} {name}: {', '.join(sorted(seen[name]))}")
wide, narrow = {"f32"}, {"bf16"}
wanted = dict.fromkeys(ways, wide) | {"einsum": narrow, "elsewhere": narrow}
sys.exit(0 if seen == wanted else "the behaviour has changed")
PY
