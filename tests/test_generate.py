"""Generation against transformers: tokens, stops, scores, long prompts."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from generate_helpers import (
    HOT,
    KEY,
    LENGTHS,
    LONG,
    NEW,
    PROMPT,
    WIDTH,
    greedy,
    model,
    prompts,
    run,
    stopped,
    stops,
    torch_logprobs,
    transformers_greedy,
)
from generate_helpers import steps as steps

from jrope.generation.request import prepare
from jrope.generation.run import generate
from jrope.generation.sample import Sampler
from jrope.model.scores import score

# --- tokens


def test_greedy_is_transformers() -> None:
    got = greedy()
    assert got.dtype == np.int32
    for row, ids in zip(got, prompts(), strict=True):
        assert row.tolist() == transformers_greedy(ids)
    assert len({*got.ravel().tolist()}) > 10, "too dull to tell much"


def test_lengths_default_to_the_width() -> None:
    prompt = np.tile(PROMPT[:1], (3, 1))
    got = run(prompt, None).tokens
    np.testing.assert_array_equal(got, np.tile(greedy()[:1], (3, 1)))


@pytest.mark.parametrize("penalty", [1.6, 0.8])
def test_repetition_penalty_sees_prompt_and_new_tokens(penalty: float) -> None:
    got = run(sampler=Sampler(repetition_penalty=penalty), logprobs=True).tokens
    want = [transformers_greedy(ids, repetition_penalty=penalty) for ids in prompts()]
    assert got.tolist() == want
    assert (np.asarray(got) != greedy()).any(axis=1).sum() >= 2


@pytest.mark.parametrize("new", [0, 1])
def test_none_or_one_new_token(new: int) -> None:
    out = run(max_new_tokens=new, logprobs=True)
    np.testing.assert_array_equal(out.tokens, greedy()[:, :new])
    assert out.lengths.tolist() == [new] * 3
    assert out.logprobs is not None and out.logprobs.shape == (3, new)
    assert out.prompt_logprobs is not None
    assert out.prompt_logprobs.shape == (3, WIDTH - 1)


def test_logprobs_are_not_made_unasked() -> None:
    out = run()
    assert out.logprobs is None and out.prompt_logprobs is None
    np.testing.assert_array_equal(out.tokens, greedy())


# --- stops


@pytest.mark.parametrize("pad", [None, 3, -1])
def test_rows_stop_each_on_its_own(pad: int | None) -> None:
    out = run(stop_ids=stops(), pad_id=pad, logprobs=True)
    tokens, lengths = stopped(stops(), pad or 0)
    assert len({*lengths}) > 1 and min(lengths) < NEW
    np.testing.assert_array_equal(out.tokens, tokens)
    assert out.lengths.tolist() == lengths
    unstopped = np.asarray(run(logprobs=True).logprobs)
    want = np.where(np.arange(NEW) < np.array(lengths)[:, None], unstopped, 0)
    np.testing.assert_array_equal(out.logprobs, want)
    for row, n, ids in zip(tokens, lengths, prompts(), strict=True):
        assert row[:n].tolist() == transformers_greedy(ids, eos_token_id=stops())


def test_stops_and_pad_default_to_the_configuration() -> None:
    config = dataclasses.replace(model()[2], eos_token_id=(4, 9), pad_token_id=5)
    rules = prepare(PROMPT, LENGTHS, config).sampling
    assert rules.stop_ids.tolist() == [4, 9, *[-1] * 6] and int(rules.pad_id) == 5
    rules = prepare(PROMPT, LENGTHS, config, stop_ids=[], pad_id=0).sampling
    assert rules.stop_ids.tolist() == [-1] * 8 and int(rules.pad_id) == 0
    config = dataclasses.replace(config, pad_token_id=None)
    assert int(prepare(PROMPT, LENGTHS, config).sampling.pad_id) == 0


@pytest.mark.parametrize("count, room", [(0, 8), (1, 8), (8, 8), (9, 16), (16, 16)])
def test_stop_ids_come_in_blocks(count: int, room: int) -> None:
    ids = np.arange(count)
    got = prepare(PROMPT, LENGTHS, model()[2], stop_ids=ids).sampling.stop_ids
    assert got.tolist() == [*range(count), *[-1] * (room - count)]


def test_the_loop_ends_with_the_last_row(steps: list[int]) -> None:
    ends = [int(t) for t in greedy()[:, 3]]
    longest = max(stopped(ends, 0)[1])
    assert longest < NEW / 2
    steps.clear()  # of the greedy run, if it was not made before
    out = run(stop_ids=ends, logprobs=True)
    assert steps == [longest] and max(out.lengths.tolist()) == longest


# --- log-probabilities


@pytest.mark.parametrize("sampler", [Sampler(), HOT], ids=["greedy", "sampled"])
def test_logprobs_are_those_of_the_raw_logits(sampler: Sampler) -> None:
    out = run(sampler=sampler, key=KEY, logprobs=True)
    assert out.logprobs is not None and out.prompt_logprobs is not None
    assert out.logprobs.dtype == out.prompt_logprobs.dtype == np.float32
    for b, ids in enumerate(prompts()):
        n, whole = len(ids), [*ids, *out.tokens[b].tolist()]
        every = torch_logprobs(model()[0], whole)[:-1]
        want = np.take_along_axis(every, np.array(whole[1:])[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(out.logprobs[b], want[n - 1 :], atol=1e-5)
        np.testing.assert_allclose(
            out.prompt_logprobs[b, : n - 1], want[: n - 1], atol=1e-5
        )
        assert not np.any(out.prompt_logprobs[b, n - 1 :])


def test_prompt_logprobs_are_the_score() -> None:
    _, params, config = model()
    prompt = jnp.asarray(np.maximum(PROMPT, 0), jnp.int32)
    want = score(params, prompt, jnp.asarray(LENGTHS), config=config)
    got = run(logprobs=True).prompt_logprobs
    # another program: sums in another order, of logits of about 10
    np.testing.assert_allclose(got, want, rtol=5e-7, atol=2e-6)


# --- long prompts


@pytest.mark.parametrize("chunk", [1, 3, 5, 100])
def test_prefill_in_pieces(chunk: int) -> None:
    whole, pieces = run(logprobs=True), run(logprobs=True, prefill_chunk=chunk)
    assert whole.logprobs is not None and whole.prompt_logprobs is not None
    np.testing.assert_array_equal(pieces.tokens, whole.tokens)
    np.testing.assert_allclose(pieces.logprobs, whole.logprobs, atol=1e-5)
    np.testing.assert_allclose(pieces.prompt_logprobs, whole.prompt_logprobs, atol=1e-5)


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("kind", LONG)
def test_past_the_trained_length(kind: str, chunk: int | None) -> None:
    """Every row is rotated for its own planned total: two of them past 16 tokens."""
    longest = 16 if kind == "dynamic" else 64
    tiny, params, config = model(kind, max_position_embeddings=longest)
    new = 10
    out = generate(
        params,
        PROMPT,
        LENGTHS,
        config=config,
        max_new_tokens=new,
        stop_ids=[],
        logprobs=True,
        prefill_chunk=chunk,
    )
    assert (LENGTHS + new).tolist() == [28, 11, 17]
    for b, ids in enumerate(prompts()):
        want = list(ids)
        while len(want) < len(ids) + new:
            planned = [*want, *[0] * (len(ids) + new - len(want))]
            want.append(int(torch_logprobs(tiny, planned)[len(want) - 1].argmax()))
        assert out.tokens[b].tolist() == want[len(ids) :]
        every = torch_logprobs(tiny, want)
        given_ = np.take_along_axis(every[:-1], np.array(want[1:])[:, None], axis=1)
        assert out.logprobs is not None
        np.testing.assert_allclose(
            out.logprobs[b], given_[len(ids) - 1 :, 0], atol=2e-5
        )
