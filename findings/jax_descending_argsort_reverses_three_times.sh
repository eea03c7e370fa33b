#!/usr/bin/env bash
# jax 0.10.2: `jnp.argsort(x, descending=True)` is one sort and three reversals, of the
# keys, of their indices before the sort and of those behind it; none of them is a matter
# of how two keys are compared.
#
# Seen: the lowered program has three `stablehlo.reverse` and one `stablehlo.sort`;
# compiled for a CPU all three are still there.  `jnp.argsort(-x)` has none and gives the
# same order, ties included.  On an NVIDIA H200 (jax 0.11.2) each reversal is a kernel of
# its own, 1.3 to 1.6 us in every pass of a loop, beside 5.4 us for the sort of 128 keys.
#
# It matters where rows are put in order inside a loop over tokens: negate small integers
# or floats instead (not unsigned ones, and not the least of the signed ones).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2

cat > "$folder/see.py" <<'PY'
import jax
import jax.numpy as jnp

x = jnp.array([3, 9, 3, 1, 9, 0], jnp.int32)
ways = {
    "descending": jax.jit(lambda x: jnp.argsort(x, descending=True)),
    "negated": jax.jit(lambda x: jnp.argsort(-x)),
}
found = {}
for name, way in ways.items():
    lowered = way.lower(x)
    text, compiled = lowered.as_text(), lowered.compile().as_text()
    found[name] = (
        text.count("stablehlo.reverse"),
        text.count('"stablehlo.sort"'),
        compiled.count(" reverse("),
        way(x).tolist(),
    )
    print("jax", jax.__version__, name, found[name])
order = [1, 4, 0, 2, 3, 5]
wanted = {"descending": (3, 1, 3, order), "negated": (0, 1, 0, order)}
raise SystemExit(0 if found == wanted else "the behaviour has changed")
PY
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/see.py"
