"""Parameters arranged for speed: the same numbers, fewer and better placed matrices.

`fuse` joins q, k, v and gate, up into one matrix each: one product instead of three or
two.  It may also turn every layer's matrices from a `weight` [out, in], which is what
checkpoints hold and what suits the batch-1 matrix-vector product, into a `kernel`
[in, out], which suits larger batches.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from jrope.errors import JropeError
from jrope.model.config import LlamaConfig
from jrope.model.layers import FUSED
from jrope.tree import Params, Tree
from jrope.weights.int8 import is_quantized

Order = Literal["out_in", "in_out"]


def fuse(params: Params, order: Order = "out_in") -> Tree:
    """Join the projections that read the same input; the given tree stays as it is.

    `forward`, `generate` and `score` take either tree; `unfuse` gives the first back.

    Args:
      params: a parameter tree.
      order: of the layers' matrices: "out_in" for one row, "in_out" for batches.

    Raises:
      JropeError: another order; in_out of quantised parameters.
    """
    names = {"out_in": ("kernel", "weight"), "in_out": ("weight", "kernel")}
    if order not in names:
        raise JropeError(f"order: got {order!r}, want one of {', '.join(names)}")

    if order == "in_out" and is_quantized(params):
        raise JropeError("order: int8 weights have a scale for each row; want out_in")

    def change(block: Mapping[str, Any]) -> Tree:
        return {n: _turn(leaves, *names[order]) for n, leaves in _join(block).items()}

    return _each_block(params, change)


def unfuse(params: Params, config: LlamaConfig) -> Tree:
    """Split what `fuse` joined, bit for bit."""
    heads = config.num_attention_heads * config.head_dim
    kv_heads = config.num_key_value_heads * config.head_dim
    sizes = {
        "q_proj": heads,
        "k_proj": kv_heads,
        "v_proj": kv_heads,
        "gate_proj": config.intermediate_size,
        "up_proj": config.intermediate_size,
    }

    def change(block: Mapping[str, Any]) -> Tree:
        turned = {n: _turn(leaves, "kernel", "weight") for n, leaves in block.items()}
        return _split(turned, sizes)

    return _each_block(params, change)


def _turn(leaves: Mapping[str, Any], old: str, new: str) -> Tree:
    """Transpose the matrix called `old` and call it `new`; biases stay."""
    turned = {name: leaf for name, leaf in leaves.items() if name != old}
    return turned | {new: leaves[old].T} if old in leaves else turned


def _each_block(params: Params, change: Any) -> Tree:
    """Apply `change` to the attention and MLP subtree of every layer."""
    model = params["model"]
    layers = {
        index: {
            name: change(block) if name in FUSED else block
            for name, block in layer.items()
        }
        for index, layer in model["layers"].items()
    }
    return {**params, "model": {**model, "layers": layers}}


def _join(block: Mapping[str, Any]) -> Tree:
    for joined, names in FUSED.values():
        if joined in block or names[0] not in block:
            continue
        parts = [block[name] for name in names]
        rest = {name: leaf for name, leaf in block.items() if name not in names}
        keys = parts[0].keys()
        return rest | {
            joined: {
                key: jnp.concatenate([part[key] for part in parts]) for key in keys
            }
        }
    return dict(block)


def _split(block: Mapping[str, Any], sizes: Mapping[str, int]) -> Tree:
    for joined, names in FUSED.values():
        if joined not in block:
            continue
        rest = {name: leaf for name, leaf in block.items() if name != joined}
        start = 0
        for name in names:
            end = start + sizes[name]
            rest[name] = {key: leaf[start:end] for key, leaf in block[joined].items()}
            start = end
        return rest
    return dict(block)
