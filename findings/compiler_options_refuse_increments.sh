#!/usr/bin/env bash
# jax 0.10.2: a list of XLA's own names is changed by "+NAME" in XLA_FLAGS, and refused in
# that form by compiler_options, where a list replaces the default instead.
#
# Seen: XLA_FLAGS=--xla_gpu_enable_command_buffer=+COLLECTIVES compiles with the default
# names and COLLECTIVES.  The same value as compiler_options of Lowered.compile is an
# INVALID_ARGUMENT, "'+COLLECTIVES' is not a valid enum value"; "COLLECTIVES" is taken,
# and the program's debug options then hold that name alone: fusions and products, which
# the default records into CUDA graphs, are left out of them.
#
# It matters when flags that made a program fast move from the environment into jit: the
# whole list has to be written out.  Needs no GPU; debug options are the same on a CPU.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check jax==0.10.2 jaxlib==0.10.2

cat > "$folder/one.py" <<'PY'
import sys

import jax
import jax.numpy as jnp

def one(x):
    return x + 1

options = {"xla_gpu_enable_command_buffer": sys.argv[1]} if sys.argv[1:] else None
try:
    jax.jit(one).lower(jnp.ones(3)).compile(compiler_options=options)
except jax.errors.JaxRuntimeError as error:
    print("INVALID_ARGUMENT" if "is not a valid enum value" in str(error) else error)
PY
names() { # that a program was compiled with, where not the default: FLAGS [OPTION]
  rm -rf "$folder/dump"
  JAX_PLATFORMS=cpu XLA_FLAGS="$1 --xla_dump_to=$folder/dump" \
    "$folder/venv/bin/python" "$folder/one.py" "${@:2}"
  find "$folder/dump" -name '*jit_one*debug_options' -exec cat {} + |
    sed -n 's/^xla_gpu_enable_command_buffer: //p' | tr '\n' ' '
}
added=$(names --xla_gpu_enable_command_buffer=+COLLECTIVES)
refused=$(names "" +COLLECTIVES)
replaced=$(names "" COLLECTIVES)
printf '%s\n' "jax 0.10.2" "XLA_FLAGS +COLLECTIVES: $added" \
  "option +COLLECTIVES: $refused" "option COLLECTIVES: $replaced"
[[ $added == *COLLECTIVES*FUSION* && $refused == INVALID_ARGUMENT* &&
  $replaced == "COLLECTIVES " ]] || { echo "the behaviour has changed"; exit 1; }
