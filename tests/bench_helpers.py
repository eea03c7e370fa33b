"""A tiny model, a ceiling, and the command at its smallest."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jrope.bench.device import Ceilings, measure_ceilings
from jrope.bench.model import SHAPES, named_shape
from jrope.bench.runs import Program
from jrope.cli import bench, main
from jrope.generation.loop import prefill

CEILINGS = Ceilings(read=1e9, matmul=1e12, transfer=None)


def tiny(layers=2, **fields):
    """V 50, D 8, F 12, N 2, K 1, H 4, two layers, not tied."""
    small = dict(
        vocab_size=50, hidden_size=8, intermediate_size=12, head_dim=4,
        num_attention_heads=2, num_key_value_heads=1, num_hidden_layers=layers,
    )  # fmt: skip
    config = named_shape("llama3-8b")
    rope = dataclasses.replace(config.rope, rotary_dim=4)
    return dataclasses.replace(config, **{**small, "rope": rope, **fields})


def zeros(make):
    """The arrays that `make` would give, all zero and none of them computed."""
    shapes = jax.eval_shape(make)
    return jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape, x.dtype)), shapes)


def prefill_temp(params, config, count):
    """Temporaries of the program of a prompt, which does not run."""
    row, length = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((1, count + 1), (1,)))
    given = (params, row, length, length, None, None)
    return Program(prefill, *given, config=config, capacity=count, scored=False).temp


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Ceilings of a moment, 4,096 words, environment as it was."""

    def ceilings(dtype):
        products = ((32, 32, 32),)
        return measure_ceilings(dtype, size=2**18, products=products, repeats=1)

    monkeypatch.setattr(bench, "measure_ceilings", ceilings)
    few = (4096, *SHAPES["smollm2-135m"][1:])
    monkeypatch.setitem(SHAPES, "smollm2-135m", few)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "true")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")


def run(*words):
    base = ["--shape", "smollm2-135m", "--layers", "1", "--context", "64"]
    return main(["bench", *base, "--new", "4", "--repeat", "1", *words])
