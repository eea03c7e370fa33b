"""Gradient steps with optax: the loss is the mean of -jrope.score.

Ten steps of AdamW on four short windows of one text, which the model learns by heart;
train_tiny.py trains a model from nothing.
Run `python examples/train_step.py [FOLDER]`.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from tokenizers import Tokenizer

import jrope

EMBEDDED = Path(__file__).parent / "models" / "jrope-tiny"
WINDOWS, LENGTH, STEPS = 4, 128, 10

folder = Path(sys.argv[1] if sys.argv[1:] else EMBEDDED)
params, config = jrope.load(folder, dtype="float32")
text = (EMBEDDED / "held_out.txt").read_text("utf-8")
ids = Tokenizer.from_file(f"{folder}/tokenizer.json").encode(text).ids
tokens = jnp.asarray(ids[: WINDOWS * LENGTH], jnp.int32).reshape(WINDOWS, LENGTH)

optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4))
moments = optimizer.init(params)


def loss(params: Any, tokens: jax.Array) -> jax.Array:
    """Mean -log p of each next token."""
    return -jnp.mean(jrope.score(params, tokens, config=config))


@jax.jit
def step(params: Any, moments: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
    """One update; gradients have the shape of the parameters."""
    value, gradients = jax.value_and_grad(loss)(params, tokens)
    updates, moments = optimizer.update(gradients, moments, params)
    return optax.apply_updates(params, updates), moments, value


losses = []
for i in range(STEPS):
    params, moments, value = step(params, moments, tokens)
    losses.append(float(value))
    print(f"step {i + 1:2}: loss {losses[-1]:.3f} nats per token", flush=True)
print(f"from {losses[0]:.2f} to {losses[-1]:.2f}: jrope.save writes the folder again")
