"""Families whose files hold q, k, v and gate, up as one matrix each: split and joined.

Rows of a matrix stand in one piece in a file, so that a part of it is a slot like any
other, and is read by itself.
"""

import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from jrope.hf.families import FAMILIES
from jrope.hf.tensors import Slot, Tensors
from jrope.model.config import LlamaConfig
from jrope.model.layers import FUSED

Shape = tuple[int, ...]


def split(tensors: Tensors, config: LlamaConfig) -> Tensors:
    """The folder's tensors under our names: parts of what its family joins."""
    if not FAMILIES[config.model_type].joined:
        return tensors
    slots: dict[str, Slot] = {}
    for name, slot in tensors.slots.items():
        parts = _parts(name, slot.shape, config)
        at = slot.start
        for part, shape in parts.items():
            size = math.prod(shape) * (slot.stop - slot.start) // math.prod(slot.shape)
            slots[part] = Slot(slot.dtype, shape, slot.path, at, at + size)
            at += size
        if not parts:
            slots[name] = slot
    return Tensors(slots)


def split_shapes(shapes: Mapping[str, Shape], config: LlamaConfig) -> dict[str, Shape]:
    """Name -> shape under our names."""
    found: dict[str, Shape] = {}
    for name, shape in shapes.items():
        found |= _parts(name, shape, config) or {name: shape}
    return found


def join(
    tensors: Iterable[tuple[str, np.ndarray]], config: LlamaConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors under our names as the family's files hold them, as soon as may be."""
    if not FAMILIES[config.model_type].joined:
        yield from tensors
        return
    waiting: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors:
        prefix, block, projection, leaf = _place(name)
        joined, names = FUSED.get(block, ("", ()))
        if projection not in names:
            yield name, array
            continue
        whole = f"{prefix}.{block}.{joined}.{leaf}"
        parts = waiting.setdefault(whole, {})
        parts[projection] = array
        if len(parts) == len(names):
            yield whole, np.concatenate([waiting[whole][part] for part in names])
            del waiting[whole]


def _parts(name: str, shape: Shape, config: LlamaConfig) -> dict[str, Shape]:
    """What a joined matrix of the family consists of; {} of any other tensor."""
    if not FAMILIES[config.model_type].joined:
        return {}
    prefix, block, projection, leaf = _place(name)
    joined, names = FUSED.get(block, ("", ()))
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rows = {
        "self_attn": [n * config.head_dim for n in (heads, kv_heads, kv_heads)],
        "mlp": [config.intermediate_size] * 2,
    }.get(block, [])
    if projection != joined or shape[:1] != (sum(rows),):
        return {}  # of another size, it is told as left over
    return {
        f"{prefix}.{block}.{part}.{leaf}": (count, *shape[1:])
        for part, count in zip(names, rows, strict=True)
    }


def _place(name: str) -> list[str]:
    """The layer, the block in it, the projection, and which of its arrays."""
    return ["", "", "", *name.rsplit(".", 3)][-4:]
