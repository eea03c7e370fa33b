"""Prompts split along their tokens: one device's numbers, less memory each."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sharding_helpers import (
    LENGTHS,
    TOKENS,
    assert_close,
    make_params,
    with_rope,
)

import jrope

MESHES = {  # a mesh, and a rope for it
    "context=8": "plain",
    "context=4,model=2": "dynamic",
    "data=2,context=2,model=2": "longrope",
    "fsdp=2,context=4": "dynamic-growing",
    "context=2,model=4": "longrope-growing",
    "data=2,context=4": "dynamic-hf",
}


def forward_thrice(params, config):
    """A prompt, more tokens onto its cache, and one more."""
    parts = [jnp.asarray(TOKENS[:, a:b]) for a, b in ((0, 8), (8, 11), (11, 12))]
    lengths = np.minimum(LENGTHS, 8)
    run = partial(jrope.forward, config=config)
    a, cache = run(params, parts[0], lengths=lengths, capacity=16)
    b, cache = run(params, parts[1], cache=cache)
    c, cache = run(params, parts[2], cache=cache)
    valid = np.arange(8)[None, :] < lengths[:, None]
    return np.where(valid[..., None], a, 0), b, c


@pytest.mark.parametrize(("text", "rope"), MESHES.items())
def test_forward_gives_one_devices_logits(text, rope):
    config, params = with_rope(rope), make_params()
    placed = jrope.shard(params, jrope.mesh(text), config)
    got = forward_thrice(placed, config)
    jax.tree.map(assert_close, got, forward_thrice(params, config))
