"""Ragged rows, chunks and steps give what the whole sequence gives."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_helpers import ROPES, close, each_rope, logits_of, some_ropes, tokens_of
from model_helpers import make as make

from jrope.model.cache import KVCache
from jrope.model.llama import forward
from jrope.rope import Rope


@some_ropes("default", "condense", "dynamic", "longrope")
def test_ragged_rows_equal_single_runs(make: Any, rope: Rope) -> None:
    model = make(rope=rope, layers=1)
    tokens, lengths = tokens_of(model.config, 3, 40), [40, 23, 1]
    rows = logits_of(model, tokens, lengths=jnp.array(lengths))
    for row, ids, length in zip(rows, tokens, lengths, strict=True):
        close(row[:length], logits_of(model, ids[None, :length])[0], 2e-6)


def test_last_logits(make: Any) -> None:
    model = make()
    tokens, lengths = tokens_of(model.config, 3, 9), jnp.array([9, 4, 1])
    every = logits_of(model, tokens, lengths=lengths)
    last = logits_of(model, tokens, lengths=lengths, logits="last")
    close(last, np.stack([every[0, 8], every[1, 3], every[2, 0]]), 2e-6)
    assert last.dtype == np.float32 and last.shape == (3, model.config.vocab_size)
    whole = logits_of(model, tokens)[:, -1]
    close(logits_of(model, tokens, logits="last"), whole, 2e-6)


@each_rope
def test_steps_equal_the_full_pass(make: Any, rope: Rope) -> None:
    """Prefill of ragged prompts, then token by token past the trained length."""
    model = make(rope=rope, layers=1)
    planned, starts = np.array([30, 24, 14]), np.array([20, 14, 4])
    tokens = tokens_of(model.config, 3, 30)
    want = logits_of(model, tokens, lengths=planned, rope_lengths=planned)
    prompt = jnp.where(jnp.arange(20)[None] < starts[:, None], tokens[:, :20], 0)
    run = partial(forward, model.params, config=model.config)
    got, cache = run(prompt, lengths=starts, rope_lengths=planned, capacity=30)
    for row, right, start in zip(got, want, starts, strict=True):
        close(row[:start], right[:start], 2e-6)
    for step in range(10):
        at = starts + step
        new = jnp.take_along_axis(tokens, jnp.asarray(at)[:, None], axis=1)
        got, cache = run(new, cache=cache)
        close(got[:, 0], want[np.arange(3), at], 3e-6)
    assert cache.lengths.tolist() == planned.tolist()
    assert cache.rope_lengths.tolist() == planned.tolist()


@pytest.mark.parametrize("size", [1, 7, 16])
@pytest.mark.parametrize("name", ["default", "dynamic"])
def test_chunks_equal_the_whole(make: Any, name: str, size: int) -> None:
    model = make(rope=ROPES[name], layers=1)
    lengths = np.array([32, 21, 3])
    tokens = tokens_of(model.config, 3, 32)
    want = logits_of(model, tokens, lengths=lengths, rope_lengths=lengths)
    cache = KVCache.empty(model.config, 3, 32, "float32", lengths)
    parts = []
    for at in range(0, 32, size):
        part = tokens[:, at : at + size]
        valid = np.clip(lengths - at, 0, part.shape[1])
        logits, cache = forward(
            model.params, part, cache=cache, config=model.config, lengths=valid
        )
        parts.append(np.asarray(logits))
    for row, right, length in zip(
        np.concatenate(parts, axis=1), want, lengths, strict=True
    ):
        close(row[:length], right[:length], 2e-6)


def test_long_chunks_equal_the_whole(make: Any) -> None:
    """Blockwise prefill, and its continuation with a past in blocks."""
    model = make(layers=1, heads=2, kv_heads=1, hidden_size=16, intermediate_size=16)
    tokens = tokens_of(model.config, 2, 1300)
    run = jax.jit(forward, static_argnames=("config", "capacity"))
    want, _ = run(model.params, tokens, config=model.config)
    first, cache = run(
        model.params, tokens[:, :640], config=model.config, capacity=1300
    )
    second, _ = run(model.params, tokens[:, 640:], cache=cache, config=model.config)
    close(jnp.concatenate([first, second], axis=1), want, 2e-6)


def test_positions_turn_and_do_not_order(make: Any) -> None:
    model = make()
    tokens = tokens_of(model.config, 2, 8)
    steps = jnp.tile(jnp.arange(8, dtype=jnp.int32), (2, 1))
    plain = logits_of(model, tokens)
    close(logits_of(model, tokens, positions=steps), plain, 0)
    close(logits_of(model, tokens, positions=steps + 100), plain, 1e-5)  # relative
    assert np.abs(logits_of(model, tokens, positions=steps * 2) - plain).max() > 0.01
    back = logits_of(model, tokens, positions=steps[:, ::-1])
    close(back[:, 0], plain[:, 0], 2e-6)  # the first token sees itself alone


def test_length_that_the_frequencies_are_for(make: Any) -> None:
    """What is given, else the cache's, else capacity, else the row's own length."""
    model = make(rope=ROPES["dynamic"], layers=1)
    tokens = tokens_of(model.config, 2, 20)
    run = partial(forward, model.params, tokens, config=model.config)
    steps = jnp.tile(jnp.arange(20, dtype=jnp.int32), (2, 1))
    lengths = jnp.array([20, 18])
    told = {
        40: {"rope_lengths": 40, "capacity": 24},
        24: {"capacity": 24},
        20: {},
        520: {"positions": steps + 500},
    }
    outputs = []
    for length, given in told.items():
        logits, cache = run(**given)
        assert cache.rope_lengths.tolist() == [length, length]
        outputs.append(np.asarray(logits))
    assert all(np.abs(outputs[2] - y).max() > 1e-3 for y in outputs[:2])
    _, cache = run(lengths=lengths)
    assert cache.rope_lengths.tolist() == [20, 18] == cache.lengths.tolist()
