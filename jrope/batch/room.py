"""How many slots fit into a device's memory."""

import math
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jrope.batch.drafting import beside
from jrope.batch.packing import WIDEST
from jrope.batch.slots import empty
from jrope.generation.guesser import Guesser
from jrope.model.config import LlamaConfig
from jrope.model.int8_cache import CacheDtype, head_bytes
from jrope.model.placed import share_of
from jrope.sharding.meshes import Layout
from jrope.tree import Params

MOST = {"cpu": 16}  # slots of a device, where more rows at once gain nothing
MOST_ELSEWHERE = 128
SPARE = 0.9  # of the free memory; the rest is the allocator's, and what nobody counts
DRAWING = 16  # bytes that live for every logit while a token is drawn
RULED = 8  # more of them where rows may have structures


def slots_for(
    params: Params,
    config: LlamaConfig,
    capacity: int,
    memory_bytes: int,
    structures: bool = False,
    cache_dtype: CacheDtype | None = None,
    layout: Layout | None = None,
    speculate: Guesser | None = None,
) -> int:
    """Slots for which there is memory, 1 at least and 128 at most (16 on a CPU).

    On a mesh so many for each part into which it splits rows.

        slots = (0.9 memory - fixed) / (slot + 16 V drawn), with structures 8 V more

    slot counts what a row keeps: keys and values, of a layer with a window at most
    those of that many tokens, those of a draft too, and which ids it has seen.  drawn
    are its tokens in one pass, which are several where some are guessed.  fixed is what
    prompts take while they are computed, C tokens at once, and one row's keys and
    values twice, and those of what is read ahead, twice, too:
    C (3 D + 3 F) itemsize + 2 slot + 2 line.

    Args:
      params, config: the model.
      capacity: tokens of a row.
      memory_bytes: what is free beside the weights, of one device.
      structures: whether rows may have them.
      cache_dtype: "int8" or None.
      layout: where the parameters stand, if on a mesh.
      speculate: what guesses, if anything.
    """
    groups = 1
    if layout is not None:
        groups, config = layout.size(layout.axes.batch), share_of(config, layout)
    dtype: Any = params["model"]["norm"]["weight"].dtype
    one = partial(empty.eval_shape, config=config, count=1, capacity=capacity)
    state = one(dtype=dtype, cache_dtype=cache_dtype, draft=beside(speculate))
    slot = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    wide = 3 * (config.hidden_size + config.intermediate_size)
    line = _line(config, min(WIDEST, capacity), dtype, cache_dtype)
    if (draft := beside(speculate)) is not None:
        line += _line(draft[0], min(WIDEST, capacity), draft[1], cache_dtype)
    fixed = WIDEST * wide * dtype.itemsize + 2 * slot + 2 * line
    drawn = 1 + (speculate.tokens if speculate is not None else 0)
    slot += (DRAWING * drawn + RULED * structures) * config.vocab_size
    fit = int(SPARE * memory_bytes - fixed) // slot
    most = MOST.get(jax.default_backend(), MOST_ELSEWHERE)
    return groups * min(max(fit, 1), most)


def _line(
    config: LlamaConfig, tokens: int, dtype: Any, cache_dtype: CacheDtype | None
) -> int:
    """Bytes of the keys and values of so many tokens, of all of which layers keep."""
    head = head_bytes(config.head_dim, jnp.dtype(dtype).itemsize, cache_dtype)
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head * tokens


def free_memory(layout: Layout | None = None) -> int:
    """Bytes that a device has left: on a mesh, the one that has least.

    Where they do not tell, they share half of the host's.
    """
    devices = jax.devices()[:1] if layout is None else [*layout.mesh.devices.flat]
    host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    every = [device.memory_stats() or {} for device in devices]
    limits = [s.get("bytes_limit", host // len(devices)) for s in every]
    used = [s.get("bytes_in_use", 0) if "bytes_limit" in s else 0 for s in every]
    return min(limit - use for limit, use in zip(limits, used, strict=True))
