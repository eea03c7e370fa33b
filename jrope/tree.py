"""Parameter trees: nested dictionaries of arrays under Hugging Face's tensor names."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax

Params: TypeAlias = Mapping[str, Any]
"""A parameter tree, {"model": {"layers": {"0": ...}}, "lm_head": ...}, or a subtree."""
LayerParams: TypeAlias = Mapping[str, Any]
"""One decoder layer's subtree, {"self_attn": {"q_proj": {"weight": ...}}, ...}."""
LinearParams: TypeAlias = Mapping[str, jax.Array]
"""A projection: `weight` [out, in] or `kernel` [in, out]; `bias`, `scale`, `zero`."""
Tree: TypeAlias = dict[str, Any]
"""A parameter tree that a function makes."""


def nest(flat: Mapping[str, Any]) -> Tree:
    """Dotted names to nested dictionaries.

    >>> nest({"a.b": 1, "a.c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    tree: Tree = {}
    for name, value in flat.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dictionaries to dotted names, the inverse of `nest`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": leaf for name, leaf in flatten(value).items()}
        else:
            flat[key] = value
    return flat
