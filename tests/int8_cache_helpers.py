"""A tiny model past its trained length, and what cached integers stand for."""

from functools import partial
from typing import Any

import jax
import numpy as np
from int8_helpers import wide
from model_helpers import changed, tokens_of

from jrope.bench.model import named_shape
from jrope.model.llama import forward
from jrope.rope import DynamicNTK, Rope, Yarn

TRAINED, LENGTH, ROWS = 8, 20, 2
ROPE = partial(Rope, theta=1e4, rotary_dim=16)
PLANNED = ROPE(scaling=Yarn(factor=4, original_length=TRAINED))
GROWING = ROPE(scaling=DynamicNTK(factor=4, original_length=TRAINED), lengths="growing")
CONFIG = changed(
    named_shape("smollm2-135m"),
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=TRAINED,
    initializer_range=0.3,
    rope=PLANNED,
    bos_token_id=None,
)
TOKENS = np.asarray(tokens_of(CONFIG, ROWS, LENGTH))
run = jax.jit(forward, static_argnames=("config", "capacity", "cache_dtype"))


def meant(x: Any) -> np.ndarray:
    """What cached keys or values stand for."""
    return wide(x.numbers) * wide(x.scales)


def assert_near(found: Any, want: Any) -> None:
    """Cached numbers are within half a scale, and float32's rounding, of floats."""
    for x, y in zip(found, want, strict=True):
        assert x.shape == y.shape
        gap = np.abs(meant(x) - wide(y)) - 0.505 * wide(x.scales)
        assert gap.max() <= 0, np.unravel_index(gap.argmax(), gap.shape)
