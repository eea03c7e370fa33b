"""A cache of 8-bit integers on a mesh: one device's integers, scales and logits."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from sharding_helpers import TOKENS, make_params, with_rope

import jrope
from jrope.sharding.meshes import layout_of


def run(params: Any, config: Any) -> tuple[list[Any], Any]:
    """Logits of a prompt and of passes over more tokens, and the cache."""
    call = partial(jrope.forward, config=config)
    if not layout_of(params):
        call = jax.jit(call, static_argnames=("capacity", "cache_dtype"))
    own: dict[str, Any] = {"capacity": 16, "cache_dtype": "int8"}
    logits, cache = call(params, TOKENS[:2, :6], **own)
    found = [logits]
    for start, end in pairwise((6, 11, 12)):
        logits, cache = call(params, TOKENS[:2, start:end], cache=cache)
        found.append(logits)
    return found, cache


def test_a_mesh_gives_one_devices_logits() -> None:
    """Rows, slots and heads in halves; a prompt, a chunk and one token."""
    config, params = with_rope("dynamic-growing"), make_params()
    placed = jrope.shard(params, jrope.mesh("data=2,context=2,model=2"), config)
    want, _ = run(params, config)
    got, cache = run(placed, config)
    for x, y in zip(got, want, strict=True):
        # A number may be rounded otherwise where sums are taken in another order.
        assert np.abs(np.asarray(x) - y).max() < 2e-3 * np.abs(y).max()
    split = cache.keys[0].numbers.sharding.shard_shape((2, 16, 8, 8))
    assert cache.keys[0].scales.sharding.shard_shape((2, 16, 8, 1)) == (*split[:3], 1)
