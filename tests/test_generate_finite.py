"""Logits that are not finite: which rows are told, and which keep their tokens."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generate_helpers import (
    HOT,
    KEY,
    LENGTHS,
    NEW,
    PROMPT,
    VOCABULARY,
    greedy,
    model,
    run,
)

from jrope.generation.loop import DecodeState, draw_token
from jrope.generation.request import prepare
from jrope.generation.run import generate, stream
from jrope.generation.sample import Sampler
from jrope.model.config import EMBEDDING
from jrope.tree import flatten, nest

DOWN = "model.layers.0.mlp.down_proj.weight"
OPTIONS: dict[str, Any] = {"max_new_tokens": NEW, "stop_ids": []}
SAMPLERS = {
    "greedy": Sampler(),
    "top-p": HOT,
    "top-k and top-p": Sampler(temperature=1.3, top_k=20, top_p=0.97),
    "min-p": Sampler(temperature=0.7, min_p=0.1, repetition_penalty=1.2),
}
CHUNKS = {"whole": None, "chunks": 5}


def damaged(name: str, *at: int, by: float = np.nan) -> Mapping[str, Any]:
    """The parameters with one element, or one row, replaced."""
    flat = flatten(model()[1])
    return nest({**flat, name: flat[name].at[at].set(by)})


def own_token(row: int, since: int) -> tuple[int, int]:
    """A greedy token of this row alone, in no prompt, and the column where it comes."""
    others = {*np.delete(greedy(), row, 0).ravel().tolist(), *PROMPT.ravel().tolist()}
    own = greedy()[row].tolist()
    return next(
        (token, own.index(token))
        for token in own
        if token not in others and since <= own.index(token) < NEW - 3
    )


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_damaged_weight_is_told_of_every_row(bad: float, chunk: int | None) -> None:
    assert run(prefill_chunk=chunk).finite.tolist() == [True] * 3
    params, config = damaged(DOWN, 0, 0, by=bad), model()[2]
    options = {**OPTIONS, "prefill_chunk": chunk, "config": config}
    assert generate(params, PROMPT, LENGTHS, **options).finite.tolist() == [False] * 3


@pytest.mark.parametrize("dtype, good", [("float16", False), ("bfloat16", True)])
def test_what_overflows_float16_only(dtype: str, good: bool) -> None:
    """The MLP's products pass 65504, which is float16's largest number."""
    flat = flatten(model()[1])
    for name in ("gate", "up"):
        full = DOWN.replace("down", name)
        flat[full] = flat[full] * 300
    params = nest({name: x.astype(dtype) for name, x in flat.items()})
    out = generate(params, PROMPT, LENGTHS, config=model()[2], **OPTIONS)
    assert out.finite.tolist() == [good] * 3


@pytest.mark.parametrize("chunk", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("kind", SAMPLERS)
def test_neighbours_stay_finite_and_keep_their_tokens(
    kind: str, chunk: int | None
) -> None:
    options = {**OPTIONS, "sampler": SAMPLERS[kind], "key": KEY, "config": model()[2]}
    options["prefill_chunk"] = chunk
    sound = generate(model()[1], PROMPT, LENGTHS, **options)
    rows = np.asarray(sound.tokens)[1:]
    theirs = {*rows.ravel().tolist(), *PROMPT[1:].ravel().tolist()}
    token = max({*range(VOCABULARY)} - theirs)
    prompt = PROMPT.copy()
    prompt[0, 1] = token  # in the first chunk; later ones see it through the cache
    out = generate(damaged(EMBEDDING, token), prompt, LENGTHS, **options)
    assert sound.finite.tolist() == [True, True, True]
    assert out.finite.tolist() == [False, True, True]
    np.testing.assert_array_equal(out.tokens[1:], rows)


def test_a_row_that_stopped_is_not_blamed() -> None:
    """It is fed the pad id, whose embedding is damaged, until its neighbours end."""
    stop, _ = own_token(0, 2)
    pad = next(
        t
        for t in range(1, VOCABULARY)
        if t not in {*greedy().ravel().tolist(), *PROMPT.ravel().tolist()}
    )
    params = damaged(EMBEDDING, pad)
    options = {**OPTIONS, "stop_ids": [stop], "pad_id": pad, "config": model()[2]}
    out = generate(params, PROMPT, LENGTHS, **options)
    assert int(out.lengths[0]) < NEW and int(out.tokens[0, -1]) == pad
    assert out.finite.tolist() == [True] * 3
    prompt = PROMPT.copy()
    prompt[0, 1] = pad
    assert not generate(params, prompt, LENGTHS, **options).finite[0]


def test_the_last_token_is_not_looked_behind() -> None:
    token, column = own_token(0, 2)
    params, config = damaged(EMBEDDING, token), model()[2]
    for new, good in ((column + 1, True), (column + 2, False)):
        options = {**OPTIONS, "max_new_tokens": new, "config": config}
        out = generate(params, PROMPT, LENGTHS, **options)
        assert out.finite.tolist() == [good, True, True]


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_stream_knows_it_block_by_block(chunk: int) -> None:
    """Of the blocks that were given, though the device is ahead of them."""
    token, column = own_token(0, 2)
    params, config = damaged(EMBEDDING, token), model()[2]
    got = stream(params, PROMPT, LENGTHS, config=config, chunk=chunk, **OPTIONS)
    assert got.finite.tolist() == [True] * 3
    seen = 0
    for block in got:
        seen += block.shape[1]
        assert got.finite.tolist() == [seen <= column + 1, True, True]
    assert seen == NEW and not got.finite[0]
    whole = generate(params, PROMPT, LENGTHS, config=config, **OPTIONS)
    np.testing.assert_array_equal(got.finite, whole.finite)


@pytest.mark.parametrize(
    "logits, good",
    [
        ([3e38] * 4, True),  # whose sum is infinite
        ([1.0, -np.inf, 0.0, 0.0], False),
        ([1.0, np.inf, 0.0, 0.0], False),
        ([1.0, np.inf, -np.inf, 0.0], False),
        ([1.0, 2.0, 3.0, np.nan], False),
    ],
)
def test_every_logit_counts(logits: list[float], good: bool) -> None:
    request = prepare(PROMPT[:1], LENGTHS[:1], model()[2])
    state = DecodeState(
        last=jnp.zeros(1, jnp.int32),
        tokens=jnp.zeros((1, 1), jnp.int32),
        logprobs=None,
        seen=jnp.zeros((1, 4), jnp.int32),
        done=jnp.zeros(1, bool),
        finite=jnp.ones(1, bool),
        lengths=jnp.zeros(1, jnp.int32),
        step=jnp.zeros((), jnp.int32),
    )
    drawn = jax.jit(draw_token)(jnp.float32([logits]), state, request.sampling)
    assert bool(drawn.finite[0]) is good
