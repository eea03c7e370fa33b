"""Parameters arranged for speed: the same numbers, fewer and better placed matrices.

`fuse` joins q, k, v and gate, up into one matrix each: one product instead of three or
two.  It may also turn every layer's matrices from a `weight` [out, in], which is what
checkpoints hold and what suits the batch-1 matrix-vector product, into a `kernel`
[in, out], which suits larger batches.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jrope.errors import JropeError
from jrope.model.config import LlamaConfig
from jrope.model.layers import FUSED
from jrope.sharding.axes import entry
from jrope.sharding.meshes import Layout, layout_of, stand
from jrope.tree import Params, Tree
from jrope.weights.int8 import is_quantized

Order = Literal["out_in", "in_out"]


def fuse(params: Params, order: Order = "out_in") -> Tree:
    """Join the projections that read the same input; the given tree stays as it is.

    `forward`, `generate` and `score` take either tree; `unfuse` gives the first back.
    On a mesh each device joins the shares that it holds: [shares, out / shares, in].

    Args:
      params: a parameter tree.
      order: of the layers' matrices: "out_in" for one row, "in_out" for batches.

    Raises:
      JropeError: another order; in_out of quantised parameters; replicas.
    """
    names = {"out_in": ("kernel", "weight"), "in_out": ("weight", "kernel")}
    if order not in names:
        raise JropeError(f"order: got {order!r}, want one of {', '.join(names)}")

    if order == "in_out" and is_quantized(params):
        raise JropeError("order: int8 weights have a scale for each row; want out_in")

    layout = layout_of(params)
    join = partial(jnp.concatenate, axis=0)
    if layout is not None and layout.axes.tensor:
        if layout.axes.kv_heads != layout.axes.tensor:
            raise JropeError("fuse: key/value heads stand on replicas; leave it out")
        join = partial(_join_shares, layout=layout)

    def change(block: Mapping[str, Any]) -> Tree:
        joined = _join(block, join)
        return {n: _turn(leaves, *names[order]) for n, leaves in joined.items()}

    return stand(_each_block(params, change), layout)


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

    return stand(_each_block(params, change), layout_of(params))


def _turn(leaves: Mapping[str, Any], old: str, new: str) -> Tree:
    """Transpose the matrix called `old` and call it `new`; biases stay."""
    turned = {name: leaf for name, leaf in leaves.items() if name != old}
    if old not in leaves:
        return turned
    return turned | {new: jnp.swapaxes(leaves[old], -1, -2)}


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


def _join_shares(parts: list[jax.Array], *, layout: Layout) -> jax.Array:
    """[out, in] matrices that stand on a mesh: [shares, sum of out / shares, in]."""
    tensor, fsdp = entry(layout.axes.tensor), entry(layout.axes.fsdp)
    rest = [fsdp] * (parts[0].ndim - 1)
    split, joined = PartitionSpec(tensor, *rest), PartitionSpec(tensor, None, *rest)
    join = layout.map(lambda *own: jnp.concatenate(own)[None], split, joined)
    return jax.jit(join)(*parts)


def _join(
    block: Mapping[str, Any], join: Callable[[list[jax.Array]], jax.Array]
) -> Tree:
    for joined, names in FUSED.values():
        if joined in block or names[0] not in block:
            continue
        parts = [block[name] for name in names]
        rest = {name: leaf for name, leaf in block.items() if name not in names}
        keys = parts[0].keys()
        return rest | {
            joined: {key: join([part[key] for part in parts]) for key in keys}
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
            rest[name] = {
                key: _rows(leaf, start, end, block[joined]["weight"].ndim == 3)
                for key, leaf in block[joined].items()
            }
            start = end
        return rest
    return dict(block)


def _rows(leaf: jax.Array, start: int, end: int, shares: bool) -> jax.Array:
    """Rows start to end of what was joined; of each share its part of them."""
    if not shares:
        return leaf[start:end]
    count = leaf.shape[0]
    return leaf[:, start // count : end // count].reshape(-1, *leaf.shape[2:])
