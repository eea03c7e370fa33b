"""Methods whose frequencies depend on the length, row by row; and what is refused."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from batch_helpers import by_key, draw_best, engine, engine_of, ragged, work
from generate_helpers import model

from jrope.errors import JropeError
from jrope.generation.sample import Sampler
from jrope.model.llama import forward


@pytest.mark.parametrize("lengths", ["planned", "growing"])
def test_every_row_has_its_own_length(
    lengths: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jrope.batch.slots.draw", draw_best)
    _, params, config = model("dynamic", layers=1, max_position_embeddings=16)
    rope = dataclasses.replace(config.rope, lengths=lengths)
    config = dataclasses.replace(config, rope=rope)
    own = engine_of(params, config, logprobs=False, slots=3, piece=16)
    rows = [dataclasses.replace(r, sampler=Sampler(), stop_ids=()) for r in ragged(8)]
    got = by_key(own.run(rows))
    tokens, planned = np.zeros((8, 112), np.int32), []
    for line, row in zip(tokens, rows, strict=True):
        whole = [*row.prompt, *got[row.key].tokens]
        line[: len(whole)] = whole
        planned.append(len(whole))
    assert min(planned) < 20 and max(planned) > 50
    full = {"rope_lengths": jnp.asarray(planned)} if lengths == "planned" else {}
    logits, _ = forward(params, tokens, config=config, **full)
    for row, best in zip(rows, np.asarray(logits.argmax(-1)), strict=True):
        begin, answer = len(row.prompt) - 1, got[row.key].tokens
        np.testing.assert_array_equal(best[begin : begin + len(answer)], answer)


def test_lengths_of_the_whole_batch_are_refused() -> None:
    _, params, config = model("dynamic", layers=1)
    rope = dataclasses.replace(config.rope, lengths="hf")
    with pytest.raises(JropeError, match=r'lengths "hf".*takes "planned" or "growing"'):
        engine_of(params, dataclasses.replace(config, rope=rope))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"prompt": np.zeros(0, np.int32)}, r"row 'x': prompt: got 'int32 \[0\]'"),
        ({"prompt": np.zeros((1, 3), np.int32)}, r"prompt: got 'int32 \[1, 3\]'"),
        ({"prompt": np.array([1, 61])}, r"prompt: got \[61\], want ids of a voc.* 61"),
        ({"stop_ids": (-1,)}, r"stop_ids: got \[-1\]"),
        ({"stop_ids": tuple(range(17))}, "stop_ids: got 17, want at most 16"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
        ({"max_new_tokens": 110}, "got 110 after a prompt of 3, want 112 in all"),
        ({"shared": 3}, "shared: got 3, want tokens of a prompt of 3, not all"),
        ({"logprobs": 21}, "logprobs: got 21, want None, or an integer from 0 to 20"),
        ({"sampler": Sampler(top_k=np.array([1, 2]))}, "sampler: top_k: got"),
    ],
)
def test_a_row_that_cannot_be_run_is_told_by_name(fields: Any, message: str) -> None:
    row = dataclasses.replace(work("x", 3, 4), **fields)
    with pytest.raises(JropeError, match=message):
        engine().check(row)


def test_engines_are_checked() -> None:
    _, params, config = model()
    for name in ("slots", "chunk", "piece"):
        with pytest.raises(JropeError, match=f"{name}: got 0"):
            engine_of(params, config, **{name: 0})
    with pytest.raises(JropeError, match="capacity: got 1"):
        engine_of(params, config, capacity=1)
    with pytest.raises(JropeError, match="params: got"):
        engine_of({"x": jnp.zeros(1)}, config)
    own = engine_of(params, config, logprobs=False)
    with pytest.raises(JropeError, match="made with logprobs=False"):
        own.check(work("x", 3, 4, logprobs=0))
