"""The model as an nnx.Module, with the loaded parameters, through flax.nnx's bridge.

Run `python examples/nnx_bridge.py [FOLDER]`.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import jrope

EMBEDDED = Path(__file__).parent / "models" / "jrope-tiny"

params, config = jrope.load(sys.argv[1] if sys.argv[1:] else EMBEDDED, dtype="float32")
tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, config.vocab_size)

# The bridge makes fresh weights under the same names; the loaded ones replace them.
model = nnx.bridge.ToNNX(jrope.Llama(config), rngs=nnx.Rngs(0)).lazy_init(tokens)
nnx.update(model, params)

leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
count = sum(leaf.size for leaf in leaves)
print(f"nnx.state: {len(leaves)} parameters, {count:,} numbers, such as")
weight = model.model["layers"]["0"]["self_attn"]["q_proj"]["weight"]
print(f"  model.layers.0.self_attn.q_proj.weight  {weight.shape}")

logits, _ = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
forward = jax.jit(jrope.forward, static_argnames="config")
wanted, _ = forward(params, tokens, config=config)
difference = float(jnp.max(jnp.abs(logits - wanted)))
print(f"logits {logits.shape}: largest difference to jrope.forward {difference:.1e}")
