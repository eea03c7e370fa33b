#!/usr/bin/env bash
# jax 0.10.2 on a CPU: jnp.max of float32 loses a NaN that jnp.sum and jnp.argmax find.
#
# Seen: of 8 rows of 64 float32 numbers with one NaN each, jnp.max along the row, under
# jit, is NaN as NumPy's is.  Of 64 such rows, or of rows of 4,096, it is the largest of
# the other numbers, wherever the NaN stands.  jnp.sum is NaN and jnp.argmax points at the
# NaN in every size: small tests of code that relies on the maximum pass.
#
# It matters wherever a maximum is taken for a check: absmax quantisation makes finite
# integers of a row with a NaN, and `isfinite(max(abs(x)))` passes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2

JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'PY'
import sys

import jax
import jax.numpy as jnp
import numpy as np

seen = {}
for shape in ((8, 64), (64, 64), (8, 4096), (64, 4096)):
    lost = found = 0
    for at in (0, 1, 17, 63):
        x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        x[:, at] = np.nan
        assert np.isnan(x.max(axis=1)).all()
        lost += int((~np.isnan(jax.jit(lambda x: jnp.max(x, axis=1))(x))).sum())
        found += int(np.isnan(jax.jit(lambda x: jnp.sum(x, axis=1))(x)).sum())
        found += int((jax.jit(lambda x: jnp.argmax(x, axis=1))(x) == at).sum())
    rows = 4 * shape[0]
    seen[shape] = lost / rows, found / (2 * rows)
    print(f"jax {jax.__version__} {shape}: max lost {lost} of {rows} NaN")
wanted = {(8, 64): (0, 1), (64, 64): (1, 1), (8, 4096): (1, 1), (64, 4096): (1, 1)}
sys.exit(0 if seen == wanted else f"the behaviour has changed: {seen}")
PY
