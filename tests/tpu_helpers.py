"""Models of shapes alone on TPUs that are not here, and what their programs hold."""

import dataclasses
import re
from typing import Any

import jax
import pytest

import jrope
from jrope.bench.model import named_shape, random_params
from jrope.model.config import LlamaConfig
from jrope.rope import Rope
from jrope.sharding.topologies import can_describe

if not can_describe():
    pytest.skip("needs libtpu: `make test-tpu`", allow_module_level=True)

MOVES = "copy|transpose"  # copy-start, to the nearer memory, is how a TPU reads


def tiny(rope: Rope | None = None, **fields: Any) -> LlamaConfig:
    """V 512, D 256, F 512, N 4, K 2, H 128, one layer."""
    config = named_shape("llama3-8b")
    small = dict(
        vocab_size=512, hidden_size=256, intermediate_size=512, head_dim=128,
        num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1,
    )  # fmt: skip
    rope = config.rope if rope is None else rope
    return dataclasses.replace(config, **{**small, "rope": rope, **fields})


def shapes_on(mesh: Any, config: LlamaConfig, form: str = "bfloat16") -> Any:
    """Parameters in `form`, a dtype or int8, placed as shapes."""
    quantize = "int8" if form == "int8" else None
    dtype = "bfloat16" if quantize else form
    shapes = jax.eval_shape(lambda: random_params(config, dtype, quantize))
    return jrope.shard(shapes, mesh, config)


def results(program: str, kinds: str) -> list[tuple[str, int]]:
    """(dtype, elements) of what operations of these kinds give, wherever they stand."""
    found = re.findall(rf"= \(?(\w+)\[([\d,]*)\]\S* (?:{kinds})\(", program)
    return [(dtype, _product(sizes)) for dtype, sizes in found]


def _product(sizes: str) -> int:
    product = 1
    for size in filter(None, sizes.split(",")):
        product *= int(size)
    return product


def loop_bodies(program: str) -> str:
    """The text of the computations that loops repeat, without what these call."""
    names = re.findall(r"body=%([\w.\-]+)", program)
    parts = re.split(r"\n(?=(?:ENTRY )?%[\w.\-]+ \()", program)
    return "\n".join(part for part in parts if part[1:].split(" ")[0] in names)
