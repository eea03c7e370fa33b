"""Inside of a caller's `jax.shard_map`, which checks what varies over a mesh."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_helpers import small_blocks
from model_helpers import PLAIN

from jrope.model.attention import attend
from jrope.model.growing import slot_table
from jrope.rope import DynamicNTK

GROWING = dataclasses.replace(
    PLAIN(scaling=DynamicNTK(factor=2, original_length=8)), lengths="growing"
)
LONG = 40
RANDOM = np.random.default_rng(0)


def random(*shape: int) -> jax.Array:
    return jnp.asarray(RANDOM.standard_normal(shape, np.float32))


def prompt(q: jax.Array, k: jax.Array) -> jax.Array:
    return attend(q, k, k)  # in blocks


def tables(lengths: jax.Array, rows: jax.Array) -> jax.Array:
    return slot_table(GROWING, 16, lengths)[0] + rows


KINDS: dict[str, tuple[Any, tuple[jax.Array, jax.Array], tuple[bool, bool]]] = {
    "prompt": (prompt, (random(1, LONG, 2, 8), random(1, LONG, 1, 8)), (True, True)),
    "tables": (tables, (jnp.array([5, 9]), jnp.zeros((2, 16, 8))), (True, False)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_loops_and_branches_agree_in_what_varies(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_blocks(monkeypatch)
    function, given, split = KINDS[kind]
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
    specs = tuple(jax.P("data") if own else jax.P() for own in split)
    how = {"mesh": mesh, "in_specs": specs, "out_specs": jax.P("data")}
    shared = jax.shard_map(function, **how)
    np.testing.assert_array_equal(jax.jit(shared)(*given), jax.jit(function)(*given))
