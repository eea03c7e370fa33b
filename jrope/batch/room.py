"""How many slots fit into a device's memory."""

import math
import os
from functools import partial
from typing import Any

import jax

from jrope.batch.packing import WIDEST
from jrope.batch.slots import empty
from jrope.model.config import LlamaConfig
from jrope.model.int8_cache import CacheDtype
from jrope.tree import Params

MOST = {"cpu": 16}  # slots, where more rows at once gain nothing
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
) -> int:
    """Slots for which there is memory, 1 at least and 128 at most (16 on a CPU).

        slots = (0.9 memory - fixed) / (slot + 16 V), with structures 24 V

    slot counts what a row keeps: keys and values, and which ids it has seen.  fixed is
    what prompts take while they are computed, C tokens at once, and one row's keys and
    values twice: C (3 D + 3 F) itemsize + 2 slot.

    Args:
      params, config: the model.
      capacity: tokens of a row.
      memory_bytes: what is free beside the weights.
      structures: whether rows may have them.
      cache_dtype: "int8" or None.
    """
    dtype: Any = params["model"]["norm"]["weight"].dtype
    one = partial(empty.eval_shape, config=config, count=1, capacity=capacity)
    state = one(dtype=dtype, cache_dtype=cache_dtype)
    slot = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(state))
    wide = 3 * (config.hidden_size + config.intermediate_size)
    fixed = WIDEST * wide * dtype.itemsize + 2 * slot
    slot += (DRAWING + RULED * structures) * config.vocab_size
    fit = int(SPARE * memory_bytes - fixed) // slot
    return min(max(fit, 1), MOST.get(jax.default_backend(), MOST_ELSEWHERE))


def free_memory() -> int:
    """Bytes that the device has left, or half of the host's where it does not tell."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
