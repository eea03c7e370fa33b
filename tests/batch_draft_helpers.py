"""A model, and a draft that is always right.

The model's second layer adds nothing, so that its first one alone says the same.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from generate_helpers import model

from jrope.generation.guesser import Draft
from jrope.model.config import LlamaConfig

GUESSED, SLOTS = 4, 4
SHAPE: dict[str, Any] = {"slots": SLOTS, "capacity": 60, "piece": 16}
SHAPE |= {"logprobs": False}


@cache
def large(rope: str | None = None) -> tuple[Any, LlamaConfig]:
    """The model: its second layer's projections out are zeros."""
    _, params, config = model(rope)
    layer = dict(params["model"]["layers"]["1"])
    for part, name in (("self_attn", "o_proj"), ("mlp", "down_proj")):
        zeros = jax.tree.map(jnp.zeros_like, layer[part][name])
        layer[part] = {**layer[part], name: zeros}
    layers = {**params["model"]["layers"], "1": layer}
    return {**params, "model": {**params["model"], "layers": layers}}, config


def right(rope: str | None = None) -> Draft:
    """Its first layer."""
    params, config = large(rope)
    first = {**params["model"], "layers": {"0": params["model"]["layers"]["0"]}}
    own = replace(config, num_hidden_layers=1)
    return Draft({**params, "model": first}, own, GUESSED)
