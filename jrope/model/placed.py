"""The model on a mesh: what a device's share of it is, and running that on them all."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jrope.errors import JropeError
from jrope.model.cache import KVCache
from jrope.model.config import LlamaConfig
from jrope.model.inputs import integer_array
from jrope.sharding.axes import Axes, Names, entry, is_joined
from jrope.sharding.meshes import Layout, layout, mesh_text, stands
from jrope.tree import Params, Tree, flatten

_WHOLE_ONLY = ("windows", "attention_scale", "score_cap")  # attention of all the text


def shard(
    params: Params, mesh: Mesh, config: LlamaConfig, axes: Axes | None = None
) -> Tree:
    """Place parameters on a mesh; `load(mesh=)` does so as it reads.

    `forward`, `score`, `generate` and `stream` see from the parameters where they stand
    and run on that mesh: each device its share of the model, for its share of the rows.

    Args:
      params: a parameter tree, plain or quantised; `fuse` comes after.
      mesh: of `jrope.mesh`, or any other; 1 x 1 is a mesh, too.
      config: the model's.
      axes: what the mesh's axes split, where they have names of their own.

    Raises:
      JropeError: an axis that splits nothing, or does not divide what it splits.
    """
    there = layout_on(mesh, config, axes)
    if any(is_joined(name) for name in flatten(params)):
        hint = "`unfuse` them first, and `fuse` what this returns"
        raise JropeError(f"shard: got joined matrices, split in another way; {hint}")
    return there.place(params, there.params(params))


def layout_on(mesh: Mesh, config: LlamaConfig, axes: Axes | None = None) -> Layout:
    """A mesh and what its axes split of this model; raises as `shard` does."""
    there = layout(mesh, axes)
    check_divides(config, there)
    return there


def share_of(config: LlamaConfig, layout: Layout) -> LlamaConfig:
    """The narrower model that one device computes.

    Raises:
      JropeError: heads, MLP or vocabulary that the mesh does not divide.
    """
    check_divides(config, layout)
    shares, kv_shares = (
        layout.size(names) for names in (layout.axes.tensor, layout.axes.kv_heads)
    )
    return dataclasses.replace(
        config,
        vocab_size=config.vocab_size // shares,
        intermediate_size=config.intermediate_size // shares,
        num_attention_heads=config.num_attention_heads // shares,
        num_key_value_heads=config.num_key_value_heads // kv_shares,
    )


def check_divides(config: LlamaConfig, layout: Layout) -> None:
    """Raise a JropeError unless the mesh divides what it splits, each by its size."""
    axes, size = layout.axes, layout.size
    split: dict[str, Names] = {
        "num_key_value_heads": axes.kv_heads,
        "num_attention_heads": axes.tensor,
        "intermediate_size": axes.tensor,
        "vocab_size": axes.tensor,
        "hidden_size": axes.fsdp,
    }
    wrong = [n for n, names in split.items() if getattr(config, n) % size(names)]
    if wrong:
        told = [
            f"{n} {getattr(config, n)} over {_sizes(layout, split[n])}" for n in wrong
        ]
        nearest = _nearest(config, layout, wrong)
        raise JropeError(f"mesh: does not divide {', '.join(told)}; {nearest}")
    if config.qk_norm == "whole" and axes.tensor:
        raise JropeError(
            f"mesh: got {_sizes(layout, axes.tensor)}, but qk_norm 'whole' is a mean "
            "over all heads; split rows alone, by data or fsdp"
        )
    lost = [name for name in _WHOLE_ONLY if getattr(config, name) is not None]
    if axes.context and lost:
        raise JropeError(
            f"mesh: got {_sizes(layout, axes.context)}, which splits the sequence, but "
            f"the model has {', '.join(lost)}; split rows or heads instead"
        )
    heads = config.num_key_value_heads
    if axes.tensor != axes.kv_heads and heads > size(axes.kv_heads):
        raise JropeError(
            f"mesh: got {_sizes(layout, axes.tensor)} for num_key_value_heads {heads}; "
            "replicas hold the same heads, which is for one a device: take "
            f"{_wanted(axes.kv_heads, heads)}, or no replica"
        )


def _sizes(layout: Layout, names: Names) -> str:
    return mesh_text({name: layout.mesh.shape[name] for name in names})


def _wanted(names: Names, size: int) -> str:
    return f"{names[-1] if names else 'model'}={size}"


def _nearest(config: LlamaConfig, layout: Layout, wrong: list[str]) -> str:
    """The largest mesh below this one that divides everything."""
    asked, heads = layout.size(layout.axes.tensor), config.num_key_value_heads
    if wrong == ["hidden_size"]:
        size = math.gcd(config.hidden_size, layout.size(layout.axes.fsdp))
        return f"the nearest that fits is {_wanted(layout.axes.fsdp, size)}"
    if wrong == ["num_key_value_heads"] and asked % heads == 0:
        return (
            f"the nearest that fits is model={heads},replica={asked // heads}, "
            "whose replicas hold the same key/value heads"
        )
    split = (config.num_attention_heads, config.intermediate_size, config.vocab_size)
    size = math.gcd(heads, *split)
    size = max(n for n in range(1, min(size, asked) + 1) if size % n == 0)
    return f"the nearest that fits is {_wanted(layout.axes.kv_heads, size)}"


def check_rows(rows: int, layout: Layout) -> None:
    """Raise a JropeError unless the mesh divides a batch of so many rows."""
    size = layout.size(layout.axes.batch)
    if rows % size:
        up, over = -(-rows // size) * size, _sizes(layout, layout.axes.batch)
        raise JropeError(
            f"mesh: does not divide {rows} rows over {over}; give {up}, or a mesh that "
            f"splits them {math.gcd(rows, size)} ways"
        )


def cache_specs(layout: Layout) -> Any:
    """How a `KVCache` is split: a cache of specs, rows, slots and key/value heads."""
    rows, heads = entry(layout.axes.batch), entry(layout.axes.kv_heads)
    slots: Any = PartitionSpec(rows, entry(layout.axes.context), heads, None)
    lengths: Any = PartitionSpec(rows)
    return KVCache(keys=slots, values=slots, lengths=lengths, rope_lengths=lengths)


def logit_specs(layout: Layout, ndim: int) -> PartitionSpec:
    """How logits [B, ..., V] are split."""
    middle = [None] * (ndim - 2)
    axes = layout.axes
    return PartitionSpec(entry(axes.batch), *middle, entry(axes.tensor))


def row_specs(layout: Layout, tree: Any) -> Any:
    """The specs of arrays whose first axis, where they have one, is the batch."""

    def spec(x: Any) -> Any:
        if isinstance(x, KVCache):
            return cache_specs(layout)
        return layout.rows() if jnp.ndim(x) else PartitionSpec()

    return jax.tree.map(spec, tree, is_leaf=lambda x: isinstance(x, KVCache))


def on_mesh(
    function: Callable[..., Any],
    layout: Layout,
    params: Params,
    tokens: Any,
    given: Mapping[str, Any],
    how: Mapping[str, Any],
    returned: Any,
) -> Any:
    """A function of the model, run for every device's share of parameters and rows.

    Args:
      function: takes params and, by name, tokens, axes, what is `given`, and `how`.
      layout: where the parameters stand.
      params, tokens: the model's and [B, T], whole.
      given: arrays, rows first, or None.
      how: hashable arguments: config, for the whole model, and others.
      returned: the specs of what the function returns.
    """
    tokens = integer_array("tokens", tokens, "integers [B, T]")
    check_rows(tokens.shape[0], layout)
    _check_cache(given.get("cache"), layout)
    arrays = {name: x for name, x in given.items() if x is not None}
    arrays = jax.tree.map(jnp.asarray, {"tokens": tokens, **arrays})
    arrays = layout.place(arrays, row_specs(layout, arrays))
    share = {**how, "config": share_of(how["config"], layout), "axes": layout.axes}
    return _run(params, arrays, function, layout, tuple(share.items()), returned)


def _check_cache(cache: KVCache | None, layout: Layout) -> None:
    """Raise a JropeError for a cache whose slots stand in another order."""
    if cache is None or not layout.axes.context:
        return
    wanted = layout.sharding(cache_specs(layout).keys)
    if not all(stands(x, wanted) for x in jax.tree.leaves((cache.keys, cache.values))):
        raise JropeError(
            "cache: got one of another mesh, or of none, whose slots stand in another "
            f"order than over {_sizes(layout, layout.axes.context)}; begin without a "
            "cache, and give capacity"
        )


@partial(jax.jit, static_argnames=("function", "layout", "how", "returned"))
def _run(
    params: Params,
    arrays: dict[str, Any],
    function: Callable[..., Any],
    layout: Layout,
    how: tuple[tuple[str, Any], ...],
    returned: Any,
) -> Any:
    def share(params: Params, arrays: dict[str, Any]) -> Any:
        return function(params, **arrays, **dict(how))

    given = layout.params(params), row_specs(layout, arrays)
    return layout.map(share, given, returned)(params, arrays)
