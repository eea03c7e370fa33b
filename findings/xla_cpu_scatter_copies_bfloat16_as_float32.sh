#!/usr/bin/env bash
# jax 0.10.2, CPU: a scatter into bfloat16 makes a float32 copy of the whole operand and
# rounds it back, a donated one, too; into float16 or integers it is in place.
#
# Seen: writing one token [192] into each of 32 rows of a donated [32, 384, 192] takes
# 9,437,440 bytes of temporaries in bfloat16, which is a float32 for every element, and 256
# in float16 and in uint16.  A select over the slots, jnp.where(slots == place, new, old),
# takes none in bfloat16 either.
#
# It matters for a KV cache with a length of its own for each row, which is written by a
# scatter: on a CPU a bfloat16 step then costs as much as its capacity, twice over, for every
# layer, and bit casts to uint16 around the scatter are copies of their own.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
  jax==0.10.2 jaxlib==0.10.2

cat > "$folder/see.py" <<'PY'
import jax
import jax.numpy as jnp


def scattered(old, new, at):
    return old.at[jnp.arange(len(at)), at].set(new)


def selected(old, new, at):
    own = jnp.arange(old.shape[1])[None, :] == at[:, None]
    return jnp.where(own[..., None], new[:, None], old)


def temporaries(write, dtype):
    old = jax.ShapeDtypeStruct((32, 384, 192), dtype)
    new = jax.ShapeDtypeStruct((32, 192), dtype)
    at = jax.ShapeDtypeStruct((32,), jnp.int32)
    program = jax.jit(write, donate_argnums=0).lower(old, new, at).compile()
    return program.memory_analysis().temp_size_in_bytes


copy = 32 * 384 * 192 * 4
seen = {
    (write.__name__, dtype.__name__): temporaries(write, dtype)
    for write in (scattered, selected)
    for dtype in (jnp.bfloat16, jnp.float16, jnp.uint16)
}
for name, size in seen.items():
    print("jax", jax.__version__, *name, size, "bytes of temporaries")
large = {name for name, size in seen.items() if size >= copy}
small = all(size < 4096 for name, size in seen.items() if name not in large)
same = large == {("scattered", "bfloat16")} and small
raise SystemExit(0 if same else "the behaviour has changed")
PY
JAX_PLATFORMS=cpu "$folder/venv/bin/python" "$folder/see.py"
