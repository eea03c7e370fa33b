"""LoRA adapters of PEFT, merged into the weights that they change.

    W' = W + s B A,   s = alpha / r, or alpha / sqrt(r) where rank-stabilised

Sources: Hu et al. 2021 (arXiv:2106.09685); Kalajdzievski 2023 (arXiv:2312.03732).
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jrope.errors import JropeError, is_integer, is_number
from jrope.hf.folders import PathLike, find_folder, read_json, some
from jrope.hf.tensors import Tensors, open_file
from jrope.model.config import LlamaConfig, parameter_shapes
from jrope.numerics import matmul_precision

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
# Ways to begin that leave the model's own weights as they were.
_BEGUN = (True, False, "gaussian", "eva", "orthogonal")
_READ = {
    *["peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"],
    "init_lora_weights",
}
# What says nothing about the result: the tensors show which modules there are.
_UNREAD = {
    *[
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
    ],
    *["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"],
    *["lora_dropout", "peft_version", "megatron_core", "eva_config"],
}
# Values of other fields that change nothing, as PEFT writes them.
_IDLE = (None, False, "none", [], {})
_IDLE_NUMBERS = {"qalora_group_size": 16}


@final
@dataclass(frozen=True)
class Adapter:
    """An adapter that fits a model.

    Args:
      tensors: of its file.
      scales: s of every weight that it changes, by the weight's name.
    """

    tensors: Tensors
    scales: Mapping[str, float]

    def merged(self, name: str, weight: jax.Array) -> jax.Array:
        """A weight as the adapter changes it, in its own dtype; the sum is float32."""
        if name not in self.scales:
            return weight
        a, b = (self.tensors.read(part, np.dtype("float32")) for part in _parts(name))
        return _merged(weight, a, b, np.float32(self.scales[name]))


def open_adapter(path_or_repo: PathLike, config: LlamaConfig) -> Adapter:
    """Read an adapter's adapter_config.json and the header of its safetensors.

    Args:
      path_or_repo: a folder as PEFT saves it, or a hub id.
      config: of the model that it was trained on.

    Raises:
      JropeError: another method, fields that change the result in a way that is not
        read, and tensors that the model has no place for, all by name.
    """
    folder = find_folder(path_or_repo)
    found = read_json(folder / CONFIG)
    if problems := [*_problems(found)]:
        raise JropeError(f"{folder / CONFIG}: {'; '.join(problems)}")
    tensors = open_file(folder, WEIGHTS)
    shapes, wanted = tensors.shapes, parameter_shapes(config)
    scales: dict[str, float] = {}
    wrong: list[str] = []
    for name in shapes:
        match = _NAME.fullmatch(name)
        weight = f"{match[1]}.weight" if match else ""
        if match is None or len(wanted.get(weight, ())) != 2:
            wrong.append(f"{name}: the model has no such matrix")
            continue
        rank = _of(found, "rank_pattern", match[1], found["r"])
        alpha = _of(found, "alpha_pattern", match[1], found["lora_alpha"])
        out, width = wanted[weight]
        pair = {"A": (rank, width), "B": (out, rank)}
        if shapes[name] != pair[match[2]]:
            got, want = ([*x] for x in (shapes[name], pair[match[2]]))
            wrong.append(f"{name}: got {got}, want {want}")
        elif missing := [part for part in _parts(weight) if part not in shapes]:
            wrong.append(f"{missing[0]}: missing")
        root = math.sqrt(rank) if found.get("use_rslora") else rank
        scales[weight] = alpha / root
    if wrong or not scales:
        told = some(wrong) or "no tensors"
        raise JropeError(f"{folder}: the adapter does not fit this model: {told}")
    return Adapter(tensors, scales)


def _parts(weight: str) -> tuple[str, str]:
    """The names of a weight's A and B."""
    stem = f"base_model.model.{weight.removesuffix('.weight')}"
    return f"{stem}.lora_A.weight", f"{stem}.lora_B.weight"


def _problems(found: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with an adapter_config.json, or not read."""
    if (kind := found.get("peft_type")) != "LORA":
        yield f"peft_type is {kind!r}, want LORA"
    if not is_integer(rank := found.get("r"), at_least=1):
        yield f"r is {rank!r}, want a positive integer"
    if not is_number(alpha := found.get("lora_alpha")):
        yield f"lora_alpha is {alpha!r}, want a number"
    if not isinstance(stable := found.get("use_rslora", False), bool):
        yield f"use_rslora is {stable!r}, want true or false"
    whole = partial(is_integer, at_least=1)
    for name, good in (("rank_pattern", whole), ("alpha_pattern", is_number)):
        pattern: Any = found.get(name) or {}
        if not isinstance(pattern, dict) or not all(map(good, pattern.values())):
            yield f"{name} is {pattern!r}, want numbers by module"
    if (begun := found.get("init_lora_weights", True)) not in _BEGUN:
        yield (
            f"init_lora_weights is {begun!r}, which may have changed the model's own "
            "weights; save the adapter with path_initial_model_for_weight_conversion"
        )
    others = [
        name
        for name, value in found.items()
        if name not in _READ | _UNREAD
        and value not in _IDLE
        and _IDLE_NUMBERS.get(name) != value
    ]
    if others:
        hint = "merge it with PEFT (merge_and_unload) and load the result"
        yield f"not read: {', '.join(others)}; {hint}"


def _of(found: Mapping[str, Any], pattern: str, module: str, usual: Any) -> Any:
    """A module's own number: of the first name that is its end, or a regex of it."""
    for name, value in (found.get(pattern) or {}).items():
        if re.fullmatch(rf"(.*\.)?({name})", module):
            return value
    return usual


@jax.jit
def _merged(
    weight: jax.Array, a: ArrayLike, b: ArrayLike, scale: ArrayLike
) -> jax.Array:
    change = jnp.matmul(b, a, precision=matmul_precision(jnp.float32))
    return (weight.astype(jnp.float32) + scale * change).astype(weight.dtype)
