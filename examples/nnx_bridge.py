"""The model as an nnx.Module, with the loaded parameters, through flax.nnx's bridge.

Run `python examples/nnx_bridge.py [FOLDER]`, a Hugging Face folder; the embedded model if none is given.
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

state = nnx.state(model, nnx.Param)
count = sum(leaf.size for leaf in jax.tree.leaves(state))
print(f"nnx.state: {len(state.flat_state())} parameters, {count:,} numbers, such as")
weight = model.model["layers"]["0"]["self_attn"]["q_proj"]["weight"]
print(f"  model.layers.0.self_attn.q_proj.weight  {weight.shape}")

logits, _ = nnx.jit(lambda model, tokens: model(tokens))(model, tokens)
wanted, _ = jax.jit(jrope.forward, static_argnames="config")(
    params, tokens, config=config
)
difference = float(jnp.max(jnp.abs(logits - wanted)))
print(f"logits {logits.shape}: largest difference to jrope.forward {difference:.1e}")


@nnx.value_and_grad
def loss(model: nnx.Module) -> jax.Array:
    """Mean -log p of each next token."""
    logprobs = jax.nn.log_softmax(model(tokens)[0][:, :-1])
    return -jnp.mean(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1))


value, grads = nnx.jit(loss)(model)
norm = float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))))
print(f"nnx.value_and_grad: loss {value:.3f}, gradient norm {norm:.3f}")
