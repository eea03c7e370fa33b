"""From the parameters of transformers 4's FlaxLlama to ours, paths side by side.

This is for a tree in memory; for checkpoint files, convert/flax_msgpack_to_hf.py.
FlaxLlama always had its own head and rotated with theta 10000, without scaling.
Run `python examples/from_flax_llama.py [FOLDER]`.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

import jrope

EMBEDDED = Path(__file__).parent / "models" / "jrope-tiny"


def from_flax_llama(old: dict[str, Any]) -> dict[str, Any]:
    """Kernels [in, out] become weights [out, in]; all else keeps its shape."""
    new = {}
    for (*path, last), leaf in flatten_dict(old).items():
        new[*path, "weight"] = leaf.T if last == "kernel" else leaf
    return unflatten_dict(new)


def to_flax_llama(params: dict[str, Any]) -> dict[str, Any]:
    """The same model as FlaxLlama held it: it stands for your own checkpoint here."""
    head = params.get("lm_head", params["model"]["embed_tokens"])
    params = params | {"lm_head": head}
    old = {}
    for (*path, last), leaf in flatten_dict(params).items():
        kernel = leaf.ndim == 2 and path[-1] != "embed_tokens"
        name = "kernel" if kernel else "embedding" if leaf.ndim == 2 else last
        old[*path, name] = leaf.T if kernel else leaf
    return unflatten_dict(old)


params, config = jrope.load(sys.argv[1] if sys.argv[1:] else EMBEDDED, dtype="float32")
old = to_flax_llama(params)
new = from_flax_llama(old)

print(f"{'FlaxLlama':54} jrope")
for path, leaf in flatten_dict(old, sep="/").items():
    ours = path.rpartition("/")[0] + "/weight"
    if "/layers/" not in path or "/0/" in path:  # the other layers look alike
        shape = flatten_dict(new, sep="/")[ours].shape
        print(f"{path} {leaf.shape}".ljust(54), ours, shape)

tokens = jnp.asarray([[config.bos_token_id or 0, 5, 6, 7, 8]], jnp.int32)
wanted, _ = jrope.forward(params, tokens, config=config)
untied = replace(config, tie_word_embeddings=False)
logits, _ = jrope.forward(new, tokens, config=untied)
difference = float(jnp.max(jnp.abs(logits - wanted)))
print(f"logits {logits.shape}: largest difference {difference:.1e}")
