"""A tensor from its file onto a mesh, part by part."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jrope.hf.tensors import Tensors
from jrope.sharding.meshes import Layout

Part = tuple[slice, ...]


def to_mesh(
    layout: Layout, tensors: Tensors, name: str, dtype: np.dtype[Any] | None
) -> jax.Array:
    """One tensor on the devices of a mesh, as `spec_of` splits it.

    Every distinct part is read once in this process, however many of its devices hold
    it, and no other process reads it for this one.

    Args:
      layout: the mesh and what it splits.
      tensors: the folder's.
      name: one of theirs.
      dtype: as in `Tensors.read`.
    """
    slot = tensors.slots[name]
    shape, sharding = slot.shape, layout.sharding(layout.specs({name: slot})[name])
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, part in sharding.addressable_devices_indices_map(shape).items():
        ends = zip(part or (), shape, strict=True)
        holders.setdefault(tuple(x.indices(n)[:2] for x, n in ends), []).append(device)

    def copies() -> Iterator[jax.Array]:
        for ends, devices in holders.items():
            values = tensors.read(name, dtype, tuple(slice(*x) for x in ends))
            for device in devices:
                # Before the next part is read, so that no more than one waits here.
                yield jax.device_put(values, device).block_until_ready()
            del values

    return jax.make_array_from_single_device_arrays(shape, sharding, [*copies()])
