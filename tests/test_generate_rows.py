"""Each row by itself: seeds and keys, and streams of blocks."""

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
    WIDTH,
    blocks,
    greedy,
    model,
    prompts,
    run,
    stopped,
    torch_logprobs,
)
from generate_helpers import steps as steps

from jrope.generation.run import generate
from jrope.generation.sample import Sampler
from jrope.tree import flatten, nest

# --- seeds and keys


def sampled(rows: list[int], seeds: Any, **options: Any) -> list[list[int]]:
    """Tokens of some rows of PROMPT, in some order, each with its seed."""
    hot = Sampler(temperature=np.full(len(rows), 1.3), top_p=np.full(len(rows), 0.97))
    options = {"sampler": hot, "key": KEY, "seeds": seeds, **options}
    return run(PROMPT[rows], LENGTHS[rows], **options).tokens.tolist()


def test_a_row_keeps_its_samples_in_any_company() -> None:
    a, b, c = sampled([0, 1, 2], [7, 8, 9])
    assert sampled([2, 0, 1], [9, 7, 8]) == [c, a, b]
    assert sampled([1, 1, 0], [8, 3, 7])[::2] == [b, a]
    assert [sampled([r], [s])[0] for r, s in ((0, 7), (1, 8), (2, 9))] == [a, b, c]
    own = Sampler(temperature=np.array([1.3, 0, 1.3]), top_p=np.array([0.97, 1, 0.5]))
    mixed = sampled([0, 1, 2], [7, 8, 9], sampler=own)
    assert mixed[0] == a and mixed[1] == greedy()[1].tolist() and mixed[2] != c


def test_seeds_and_key_decide() -> None:
    one, same, other = sampled([0, 0, 0], [4, 4, 5])
    assert one == same != other
    assert sampled([0, 0, 0], [4, 4, 5], key=jax.random.key(6))[0] != one
    assert sampled([0, 1, 2], None) == sampled([0, 1, 2], [0, 1, 2])


@pytest.mark.parametrize("dtype", ["int8", "int32", "uint32", "int64", "uint64"])
def test_seeds_of_any_integer_type(dtype: str) -> None:
    seeds = np.array([7, 8, 127], dtype)
    assert sampled([0, 1, 2], seeds) == sampled([0, 1, 2], [7, 8, 127])


def test_seeds_of_any_size() -> None:
    many = sampled([0, 0, 0], [-1, -(2**31), 2**32 - 5])
    assert len({tuple(row) for row in many}) == 3
    assert sampled([0, 0, 0], jnp.array([-1, 1, 2], jnp.int32))[0] == many[0]


def test_tokens_are_drawn_as_documented() -> None:
    """Token t of a row with fold_in(fold_in(key, seed), t)."""
    seeds, tokens = [7, 8, 9], sampled([0, 1, 2], [7, 8, 9])
    for b, ids in enumerate(prompts()):
        for t in (0, 1, NEW - 1):
            drawn_key = jax.random.fold_in(jax.random.fold_in(KEY, seeds[b]), t)
            before = [*ids, *tokens[b][:t]]
            logits = torch_logprobs(model()[0], before)[-1:]
            assert HOT(jnp.asarray(logits), drawn_key[None])[0] == tokens[b][t]


def test_legacy_keys_are_taken() -> None:
    typed = sampled([0, 1, 2], [7, 8, 9], key=jax.random.key(3))
    for legacy in (jax.random.PRNGKey(3), np.array([0, 3], np.uint32)):
        assert sampled([0, 1, 2], [7, 8, 9], key=legacy) == typed


def test_samples_follow_the_distribution() -> None:
    """Pairs of tokens: p(first) p(second | first) at a temperature of 1.5."""
    size, draws, t = 5, 8192, 1.5
    tiny, params, config = model(
        layers=1, heads=2, kv_heads=1, hidden_size=16, vocab_size=size
    )
    out = generate(
        params,
        np.full((draws, 1), 3),
        config=config,
        sampler=Sampler(temperature=t),
        key=KEY,
        max_new_tokens=2,
        stop_ids=[],
    )
    logits = [torch_logprobs(tiny, [3, a]) / t for a in range(size)]
    odds = np.exp(np.stack(logits))  # [a, position, b]
    odds /= odds.sum(-1, keepdims=True)
    want = draws * (odds[0, 0][:, None] * odds[:, 1]).ravel()
    pairs = np.asarray(out.tokens) @ np.array([size, 1])
    counts = np.bincount(pairs, minlength=size * size)
    likely = want >= 5
    chi2 = ((counts - want)[likely] ** 2 / want[likely]).sum()
    assert likely.sum() > 12 and chi2 < 60  # p < 1e-4 for 24 degrees of freedom


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_neighbours_do_not_change_a_bit(dtype: str) -> None:
    """In the same shapes; in others a 16-bit row may be rounded otherwise."""
    _, params, config = model()
    narrow = nest({name: x.astype(dtype) for name, x in flatten(params).items()})
    options: dict[str, Any] = {"max_new_tokens": NEW, "stop_ids": [], "logprobs": True}

    def rows(prompt: Any, lengths: Any, seeds: Any) -> Any:
        options.update(sampler=HOT, key=KEY, seeds=seeds)
        return generate(narrow, prompt, lengths, config=config, **options)

    others = np.random.default_rng(9).integers(0, VOCABULARY, PROMPT.shape)
    others[2] = PROMPT[0]
    one = rows(PROMPT, LENGTHS, [7, 8, 9])
    two = rows(others, [3, 11, WIDTH], [1, 2, 7])
    for name in ("tokens", "logprobs", "prompt_logprobs"):
        first, last = getattr(one, name)[0], getattr(two, name)[2]
        np.testing.assert_array_equal(first, last, err_msg=name)
    assert (np.asarray(one.tokens[1:]) != np.asarray(two.tokens[:2])).any(axis=1).all()


# --- streaming


@pytest.mark.parametrize("chunk", [1, 5, 8, 100])
def test_stream_is_generate_in_blocks(chunk: int) -> None:
    got = blocks(chunk=chunk)
    assert all(type(b) is np.ndarray and b.dtype == np.int32 for b in got)
    rest, last = divmod(NEW - 1, chunk)
    widths = [1, *[chunk] * rest, *([last] if last else [])]
    assert [b.shape for b in got] == [(3, n) for n in widths]
    np.testing.assert_array_equal(np.concatenate(got, axis=1), greedy())


def test_stream_samples_as_generate() -> None:
    got = blocks(chunk=7, sampler=HOT, key=KEY, seeds=[7, 8, 9], prefill_chunk=3)
    assert np.concatenate(got, axis=1).tolist() == sampled([0, 1, 2], [7, 8, 9])


@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_stream_ends_with_the_last_row(chunk: int) -> None:
    ends = [int(t) for t in greedy()[:, 3]]
    tokens, lengths = stopped(ends, 11)
    got = np.concatenate(blocks(stop_ids=ends, pad_id=11, chunk=chunk), axis=1)
    np.testing.assert_array_equal(got, tokens[:, : max(lengths)])


def test_stream_that_stops_at_once(steps: list[int]) -> None:
    """One block, and nothing asked of the device but what was already on its way."""
    firsts = greedy()[:, 0].tolist()
    steps.clear()  # of the greedy run, if it was not made before
    (only,) = blocks(stop_ids=firsts, chunk=1)
    assert steps == [1]
    np.testing.assert_array_equal(only, greedy()[:, :1])


@pytest.mark.parametrize("new", [0, 1, 2])
def test_stream_of_few(new: int) -> None:
    got = blocks(max_new_tokens=new)
    assert [b.shape[1] for b in got] == [1] * new
    assert [b.tolist() for b in got] == [greedy()[:, [i]].tolist() for i in range(new)]
