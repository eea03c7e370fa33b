"""Models, the definition in float64 and measures, for the tests of 8-bit weights."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from bench_helpers import zeros
from conftest import make_tiny_hf
from model_helpers import params_of

from jrope.bench.model import named_shape, random_params, with_layers
from jrope.model.config import LlamaConfig
from jrope.model.llama import forward
from jrope.weights.fuse import fuse

MODELS: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tied": True, "kv_heads": 1},
    "biases": {"kv_heads": 4, "bias": True, "head_dim": 24, "layers": 1},
}
each_model = pytest.mark.parametrize("case", MODELS)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 9)).astype(np.int32)
EMBEDDED = Path(__file__).parents[1] / "examples" / "models" / "jrope-tiny"
EPS = 2.0**-24  # half a last bit of float32

run = jax.jit(forward, static_argnames="config")


@cache
def model(case: str, dtype: str = "float32") -> tuple[dict[str, Any], LlamaConfig]:
    return params_of(make_tiny_hf(**MODELS[case]), dtype)


def definition(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales in float64, rounded to float32 where the formula is.

    (A product or quotient of float32 numbers in float64, rounded, is float32's own.)
    """
    wide = w.astype(np.float64)
    most = np.abs(wide).max(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = (127 / most).astype(np.float32).astype(np.float64)
        whole = np.rint((wide * steps[:, None]).astype(np.float32))
    whole = np.where(most[:, None] == 0, 0, np.clip(whole, -127, 127))
    return whole.astype(np.int8), (most / 127).astype(np.float32)


def matrix(dtype: Any) -> np.ndarray:
    """Rows of every size, ties, a row of zeros, a lonely large number."""
    random = np.random.default_rng(1)
    w = random.standard_normal((40, 96)) * 10.0 ** random.integers(-4, 4, (40, 1))
    w[3] = 0
    w[4] = np.arange(96) / 2 + 0.5
    w[4, 0] = -127  # scale 1: halves go to even
    w[5, 1:] = 1e-3
    w[5, 0] = 3e4
    return w.astype(dtype)


def unpacked(words: Any, groups: int) -> np.ndarray:
    """4-bit levels [out, in], a word at a time: k + j m of a group is nibble j of k."""
    out, m = len(words), words.shape[1] // groups
    levels = np.empty((out, groups, 8 * m), np.int8)
    for k in range(m):
        for j in range(8):
            nibble = np.asarray(words)[:, k::m] >> np.uint32(4 * j) & np.uint32(15)
            levels[:, :, k + j * m] = nibble.astype(np.int8) - 8
    return levels.reshape(out, -1)


def wide(got: Any) -> np.ndarray:
    return np.asarray(got, np.float64)


def largest_gap(got: Any, want: Any) -> float:
    """As a part of the largest."""
    return float(np.abs(wide(got) - wide(want)).max() / np.abs(wide(want)).max())


def rms_gap(got: Any, want: Any) -> float:
    gap = np.mean((wide(got) - wide(want)) ** 2) / np.mean(wide(want) ** 2)
    return float(np.sqrt(gap))


def middling(layers: int, dtype: str, tied: bool = True) -> Any:
    """Integers of 3.5 MB a layer, all zero, beside activations of kilobytes."""
    shape = with_layers(named_shape("smollm2-135m"), layers)
    config = dataclasses.replace(shape, vocab_size=8192, tie_word_embeddings=tied)
    return config, zeros(lambda: fuse(random_params(config, dtype, "int8")))
