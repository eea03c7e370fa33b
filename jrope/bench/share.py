"""What one device has of a model and of its work: of a mesh a part, else all of it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import final

import jax
import numpy as np

from jrope.bench.model import (
    Order,
    Weights,
    cache_bytes,
    filled_bytes,
    prefill_flops,
    tree_bytes,
)
from jrope.bench.runs import Decode, Prefill, check_fits, told
from jrope.model.config import LlamaConfig
from jrope.model.placed import share_of
from jrope.sharding.meshes import Layout, layout_of
from jrope.tree import Params, Tree, flatten, nest

ALONE = "jrope, one device"  # beside a mesh


@final
@dataclass(frozen=True, kw_only=True)
class Share:
    """One device's part.

    Args:
      model: all of it.
      config: the narrower model that the device computes.
      itemsize: bytes of an element of the cache.
      held: bytes of the weights that stand there.
      read: bytes of the weights that a step reads, gathered ones whole.
      devices: of the mesh.
      rows, slots: parts of a batch, and of each row's cache.
    """

    model: LlamaConfig
    config: LlamaConfig
    itemsize: int
    held: int
    read: int
    devices: int = 1
    rows: int = 1
    slots: int = 1

    def prompt_flops(self, batch: int, context: int) -> int:
        """FLOPs of its part of a batch of prompts."""
        return prefill_flops(self.model, batch, context) // self.devices

    def step_bytes(self, batch: int, context: int, new: int) -> int:
        """Bytes that it reads in the mean step of `new`, of rows of `context` slots."""
        rows, filled = batch // self.rows, batch * context + batch * new // 2
        filled //= self.rows * self.slots
        return self.read + filled_bytes(self.config, filled, self.itemsize, rows)

    def cache_bytes(self, batch: int, capacity: int) -> int:
        """Bytes of its part of a cache."""
        whole = cache_bytes(self.config, capacity, self.itemsize, batch)
        return whole // (self.rows * self.slots)


@final
class Side:
    """Weights of a model, where they stand, and what a device has of it."""

    def __init__(self, weights: Weights, config: LlamaConfig) -> None:
        tree = weights.arranged("none")
        self.weights, self.config, self.layout = weights, config, layout_of(tree)
        self.share = _share(tree, config, self.layout)

    def prefill(self, order: Order, batch: int, context: int, capacity: int) -> Prefill:
        """The program of a batch of prompts."""
        params = self.weights.arranged(order)
        return Prefill(params, self.config, batch, context, capacity, self.layout)

    def decode(
        self, order: Order, lengths: np.ndarray, new: int, capacity: int
    ) -> Decode:
        """The decode loop of rows with so many slots filled."""
        params = self.weights.arranged(order)
        return Decode(params, self.config, lengths, new, capacity, self.layout)


def _share(params: Params, config: LlamaConfig, layout: Layout | None) -> Share:
    itemsize: int = params["model"]["norm"]["weight"].dtype.itemsize
    held, read = tree_bytes(params)
    whole = Share(model=config, config=config, itemsize=itemsize, held=held, read=read)
    if layout is None:
        return whole
    axes = layout.axes
    gathered = replace(layout, axes=replace(axes, fsdp=()))
    return replace(
        whole,
        config=share_of(config, layout),
        held=tree_bytes(_part(params, layout))[0],
        read=tree_bytes(_part(params, gathered))[1],
        devices=layout.mesh.size,
        rows=layout.size(axes.batch),
        slots=layout.size(axes.context),
    )


def _part(params: Params, layout: Layout) -> Tree:
    """The shapes of a device's part of each parameter."""
    flat = flatten(params)
    places = {name: layout.sharding(s) for name, s in layout.specs(flat).items()}
    shapes = {name: places[name].shard_shape(x.shape) for name, x in flat.items()}
    return nest({n: jax.ShapeDtypeStruct(shapes[n], x.dtype) for n, x in flat.items()})


def one_device(side: Side) -> Side | str | None:
    """The whole model on the first device of a mesh, beside what stands there.

    Returns:
      The other side, or one line that says why there is none; None: of no mesh.
    """
    if side.layout is None:
        return None
    tree = side.weights.arranged("none")
    try:
        both = side.share.held + tree_bytes(tree)[0]
        check_fits(both, "whole weights beside a share of them are")
        whole = jax.device_put(tree, side.layout.mesh.devices.flat[0])
        return Side(Weights(whole, side.config), side.config)
    except Exception as error:  # whatever a device says
        return told(error)


def check_sizes(
    shares: Iterable[Share], batch: int, capacity: int, copies: int = 1
) -> None:
    """Raise a JropeError if a device cannot hold weights and caches of all of these."""
    shares = list(shares)
    weights = copies * sum(share.held for share in shares)
    cache = sum(share.cache_bytes(batch, capacity) for share in shares)
    text = f"weights {weights / 1e9:.2f} + cache {cache / 1e9:.2f} GB are"
    check_fits(weights + cache, text)
