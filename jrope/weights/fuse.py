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
import numpy as np

from jrope.errors import JropeError
from jrope.model.config import LlamaConfig
from jrope.model.layers import FUSED
from jrope.model.placed import share_of
from jrope.sharding.axes import spec_of, unnamed_heads
from jrope.sharding.meshes import Layout, layout_of, stand
from jrope.tree import Params, Tree
from jrope.weights.int8 import is_quantized

Order = Literal["out_in", "in_out"]


def fuse(params: Params, order: Order = "out_in") -> Tree:
    """Join the projections that read the same input; the given tree stays as it is.

    Those of a layer that lie in different ways, of which some are int4, stay apart.
    `forward`, `generate` and `score` take either tree; `unfuse` gives the first back.
    On a mesh each device joins the shares that it holds, key/value heads that stand on
    replicas too: [shares, rows of a share, in].

    Args:
      params: a parameter tree.
      order: of the layers' matrices: "out_in" for one row, "in_out" for batches.

    Raises:
      JropeError: another order; in_out of quantised parameters; replicas on an axis of
        another name.
    """
    names = {"out_in": ("kernel", "weight"), "in_out": ("weight", "kernel")}
    if order not in names:
        raise JropeError(f"order: got {order!r}, want one of {', '.join(names)}")

    if order == "in_out" and is_quantized(params):
        raise JropeError("order: quantised weights have scales of rows; want out_in")

    layout = layout_of(params)
    join = _concatenate
    if layout is not None and layout.axes.tensor:
        if layout.axes.kv_heads != unnamed_heads(layout.axes.tensor):
            hint = 'name the axis "replica", or leave fuse out'
            raise JropeError(f"fuse: key/value heads stand on replicas; {hint}")
        join = partial(_join_shares, layout=layout)

    def change(block: Mapping[str, Any]) -> Tree:
        joined = _join(block, join)
        return {n: _turn(leaves, *names[order]) for n, leaves in joined.items()}

    return stand(_each_block(params, change), layout)


def order_for(params: Params, rows: int) -> Order:
    """What suits decoding so many rows at once best here.

    On a CPU rows of the weights are read as they lie, whatever the batch: 22 ms instead
    of 37 for the products of 32 rows of SmolLM2-135M (bfloat16, two cores, jax 0.10).
    """
    batches = rows > 1 and jax.default_backend() != "cpu"
    return "in_out" if batches and not is_quantized(params) else "out_in"


def each_layer(
    params: Params, change: Callable[[Tree], Tree], keep: bool = False
) -> Tree:
    """Apply `fuse`, or the like, to layer after layer, of which one is there twice.

    Args:
      params: a parameter tree, which loses its layers.
      change: what is done to a tree of one layer.
      keep: leave the given tree as it is.
    """
    model: Tree = params["model"]
    layers: Tree = dict(model["layers"])
    if not keep:
        model["layers"].clear()
    for index in list(layers):
        part: Tree = {"layers": {index: layers.pop(index)}}
        # whose place tells of the mesh
        part["embed_tokens"] = model["embed_tokens"]
        part = change({"model": part})
        layers[index] = jax.block_until_ready(part["model"]["layers"][index])
    return {**params, "model": {**model, "layers": layers}}


def unfuse(params: Params, config: LlamaConfig) -> Tree:
    """Split what `fuse` joined, bit for bit."""
    layout = layout_of(params)
    share, split = config, _split_whole
    if layout is not None and layout.axes.tensor:
        share, split = share_of(config, layout), partial(_split_shares, layout=layout)
    heads = share.num_attention_heads * share.head_dim
    kv_heads = share.num_key_value_heads * share.head_dim
    sizes = {
        "q_proj": heads,
        "k_proj": kv_heads,
        "v_proj": kv_heads,
        "gate_proj": share.intermediate_size,
        "up_proj": share.intermediate_size,
    }

    def change(block: Mapping[str, Any]) -> Tree:
        turned = {n: _turn(leaves, "kernel", "weight") for n, leaves in block.items()}
        return _split(turned, sizes, split)

    return stand(_each_block(params, change), layout)


def _turn(leaves: Mapping[str, Any], old: str, new: str) -> Tree:
    """Transpose the matrix called `old` and call it `new`; biases and norms stay."""
    if old not in leaves or leaves[old].ndim < 2:
        return dict(leaves)
    turned = {name: leaf for name, leaf in leaves.items() if name != old}
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


def _join(
    block: Mapping[str, Any], join: Callable[[str, dict[str, Any]], jax.Array]
) -> Tree:
    for joined, names in FUSED.values():
        if joined in block or names[0] not in block:
            continue
        if any(_kind(block[name]) != _kind(block[names[0]]) for name in names):
            break
        rest = {name: leaf for name, leaf in block.items() if name not in names}
        whole = {
            key: join(joined, {f"{name}.{key}": block[name][key] for name in names})
            for key in block[names[0]]
        }
        return rest | {joined: whole}
    return dict(block)


def _kind(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What matrices must have in common to be one; a folder may have some as int4."""
    return {key: (leaf.dtype, np.shape(leaf)[1:]) for key, leaf in leaves.items()}


def _split(
    block: Mapping[str, Any],
    sizes: Mapping[str, int],
    split: Callable[[str, jax.Array, dict[str, int]], list[jax.Array]],
) -> Tree:
    for joined, names in FUSED.values():
        if joined not in block:
            continue
        rest: Tree = {name: leaf for name, leaf in block.items() if name != joined}
        rest |= {name: {} for name in names}
        for key, leaf in block[joined].items():
            rows = {f"{name}.{key}": sizes[name] for name in names}
            parts = split(f"{joined}.{key}", leaf, rows)
            for name, part in zip(names, parts, strict=True):
                rest[name][key] = part
        return rest
    return dict(block)


def _concatenate(_: str, parts: dict[str, jax.Array]) -> jax.Array:
    """Matrices [out, in], or vectors [out], as one."""
    return jnp.concatenate([*parts.values()])


def _cut(joined: jax.Array, rows: Mapping[str, int]) -> list[jax.Array]:
    """What was concatenated, of so many rows each."""
    ends = np.cumsum([*rows.values()]).tolist()
    return [joined[end - n : end] for end, n in zip(ends, rows.values(), strict=True)]


def _split_whole(name: str, joined: jax.Array, rows: dict[str, int]) -> list[jax.Array]:
    if len(joined) != sum(rows.values()):
        hint = "`unfuse` them on that mesh before you take them off it"
        raise JropeError(f"{name}: joined in shares, for a mesh; {hint}")
    return _cut(joined, rows)


def _join_shares(
    joined: str, parts: dict[str, jax.Array], *, layout: Layout
) -> jax.Array:
    """What each device holds of them, joined: [shares, rows of a share, in]."""
    leaf = f"{joined}.{next(iter(parts)).split('.')[-1]}"
    return _run_join([*parts.values()], leaf, tuple(parts), layout)


@partial(jax.jit, static_argnames=("joined", "names", "layout"))
def _run_join(
    parts: list[jax.Array], joined: str, names: tuple[str, ...], layout: Layout
) -> jax.Array:
    given = [spec_of(n, x.ndim, layout.axes) for n, x in zip(names, parts, strict=True)]
    found = spec_of(joined, parts[0].ndim + 1, layout.axes)
    return layout.map(lambda own: jnp.concatenate(own)[None], (given,), found)(parts)


def _split_shares(
    name: str, joined: jax.Array, rows: dict[str, int], *, layout: Layout
) -> list[jax.Array]:
    """What `_join_shares` joined, as `shard` places it."""
    return _run_split(joined, name, tuple(rows.items()), layout)


@partial(jax.jit, static_argnames=("name", "rows", "layout"))
def _run_split(
    joined: jax.Array, name: str, rows: tuple[tuple[str, int], ...], layout: Layout
) -> list[jax.Array]:
    found = [spec_of(n, joined.ndim - 1, layout.axes) for n, _ in rows]
    given = spec_of(name, joined.ndim, layout.axes)
    return layout.map(lambda own: _cut(own[0], dict(rows)), given, found)(joined)
