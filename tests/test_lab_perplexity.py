"""Windows, and their scores against `score`, which is tested against PyTorch."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_hf
from hypothesis import given
from hypothesis import strategies as st

from jrope.errors import JropeError
from jrope.hf import config_from_hf
from jrope.lab import memory, perplexity
from jrope.model.config import LlamaConfig, parameter_shapes
from jrope.model.scores import score
from jrope.model.with_rope import with_rope
from jrope.tree import nest

METHODS = {
    "default": {},
    "condense": {"factor": 3},
    "linear": {"factor": 2},
    "dynamic": {"factor": 2, "original": 16},
    "yarn": {"factor": 4, "original": 16},
}


def tiny(**fields: Any) -> tuple[Any, LlamaConfig]:
    model = make_tiny_hf(**fields)
    return nest(jax.tree.map(jnp.asarray, model.weights)), config_from_hf(model.config)


def random_text(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 61, count)


@given(st.integers(2, 300), st.integers(2, 40), st.integers(1, 40))
def test_every_token_is_scored_once(count: int, context: int, stride: int) -> None:
    if count < context or stride >= context:
        return
    scored: list[int] = []
    for start, first in perplexity.windows(count, context, stride):
        assert 0 <= start <= count - context
        scored += range(start + first, start + context)
    assert scored == [*range(1, count)]


def test_windows_that_do_not_overlap_miss_their_first_tokens() -> None:
    found = perplexity.windows(12, 4, 4)
    assert [tuple(w) for w in found] == [(0, 1), (4, 1), (8, 1)]
    assert [tuple(w) for w in perplexity.windows(12, 4)] == [(0, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 4), "text: got 3 tokens, want at least 4"),
        ((9, 4, 5), "stride: got 5, want 1 to the context, 4"),
        ((9, 4, 0), "stride: got 0, want 1 to the context, 4"),
        ((9, 1), "context: got 1, want at least 2 tokens"),
    ],
)
def test_windows_that_make_no_sense(arguments: Any, message: str) -> None:
    with pytest.raises(JropeError, match=message):
        perplexity.windows(*arguments)


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_score(method: str) -> None:
    """Two texts in batches of three windows, the last one short."""
    params, config = tiny()
    config = with_rope(config, method, **METHODS[method])
    texts, context, stride = [random_text(90), random_text(47, 1)], 24, 10
    found = perplexity.perplexity(
        params, config, texts, context, stride=stride, tokens_at_once=80
    )
    at = 0
    for i, text in enumerate(texts):
        for start, first in perplexity.windows(len(text), context, stride):
            tokens = jnp.asarray(text[None, start : start + context])
            want = -score(params, tokens, config=config, rope_lengths=context)
            part = slice(at, at + context - first)
            np.testing.assert_allclose(found.nll[part], want[0, first - 1 :], atol=2e-5)
            assert {*found.text[part].tolist()} == {i}
            positions = np.arange(first, context)
            np.testing.assert_array_equal(found.position[part], positions)
            np.testing.assert_array_equal(found.index[part], start + positions)
            at += context - first
    assert at == found.nll.size


def test_the_window_s_length_decides_dynamic_ntk() -> None:
    """Past the trained length the text's beginning is read otherwise in longer ones."""
    params, config = tiny()
    config = with_rope(config, "dynamic", factor=2, original=16)
    text = [random_text(64)]
    nll = {
        n: perplexity.perplexity(params, config, text, n).nll[:11]
        for n in (12, 16, 32, 64)
    }
    np.testing.assert_allclose(nll[12], nll[16], atol=1e-5)
    assert np.abs(nll[16] - nll[32]).max() > 1e-3
    assert np.abs(nll[32] - nll[64]).max() > 1e-3


def test_a_context_is_traced_once_for_all_methods(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced: list[int] = []
    real = perplexity.embed

    def counting(weight: Any, tokens: jax.Array, **how: Any) -> jax.Array:
        traced.append(tokens.shape[1])
        return real(weight, tokens, **how)

    monkeypatch.setattr(perplexity, "embed", counting)
    params, config = tiny(seed=3, intermediate_size=40)
    for context in (20, 28):
        for method, fields in METHODS.items():
            stretched = with_rope(config, method, **fields)
            perplexity.perplexity(params, stretched, [random_text(64)], context)
    assert traced == [20, 28]


def test_progress_counts_every_window() -> None:
    params, config = tiny()
    told: list[int] = []
    perplexity.perplexity(
        params, config, [random_text(50)], 10, stride=5, progress=told.append
    )
    assert sum(told) == len(perplexity.windows(50, 10, 5)) * 10


def temporaries(count: int, vocabulary: int) -> int:
    """Bytes that a pass over `count` tokens takes beside weights; compiled only."""
    model = make_tiny_hf(layers=1, vocab_size=vocabulary, hidden_size=16, heads=2)
    config = perplexity._unstretched(config_from_hf(model.config))
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in parameter_shapes(config).items()
    }
    table = jax.ShapeDtypeStruct((1, count, 4), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, count), jnp.int32)
    run = perplexity._window_nll.lower(
        nest(shapes), tokens, table, table, config=config
    )
    return run.compile().memory_analysis().temp_size_in_bytes


def test_memory_is_flat_in_the_vocabulary_and_linear_in_the_context() -> None:
    small, wide, long = (
        temporaries(*s) for s in ((8192, 64), (8192, 2**15), (2**15, 64))
    )
    assert wide - small < 4 * 8192 * 2**15 / 8  # all logits at once: 1 GiB
    assert long < 5 * small


def test_buckets_partition_what_is_scored() -> None:
    params, config = tiny()
    scores = perplexity.perplexity(params, config, [random_text(700)], 600, stride=100)
    record = perplexity.describe(scores, 600)
    assert [(b["first"], b["last"]) for b in record["buckets"]] == [
        (0, 256),
        (256, 512),
        (512, 600),
    ]
    tokens = [b["tokens"] for b in record["buckets"]]
    assert tokens == [255, 256 + 12, 88 + 88]  # the second window scores 500 to 599
    total = sum(b["tokens"] * b["nll"] for b in record["buckets"])
    assert record["nll"] == pytest.approx(total / record["tokens"])
    assert record["nll"] == pytest.approx(scores.nll.mean(dtype=np.float64))
    assert record["low"] < record["nll"] < record["high"]
    assert record["peak_bytes"] > sum(x.nbytes for x in jax.tree.leaves(params))


def test_runs_end_where_the_text_does() -> None:
    """A bucket's tokens of two windows follow one another only if the text's do."""
    scores = perplexity.TokenScores(
        text=np.array([0, 0, 0, 1, 1]),
        index=np.array([4, 5, 9, 10, 11]),
        position=np.array([1, 2, 2, 1, 2]),
        nll=np.arange(5.0),
        seconds=0.0,
        program_bytes=0,
    )
    whole, second = scores.interval(), scores.interval(2)
    assert whole is not None and whole.count == 5 and whole.mean == 2.0
    assert (
        second is not None and second.count == 3 and second.mean == pytest.approx(7 / 3)
    )
    assert scores.interval(3, 9) is None


def test_scores_that_are_not_finite_are_an_error() -> None:
    params, config = tiny()
    scores = perplexity.perplexity(params, config, [random_text(20)], 20)
    broken = dataclasses.replace(scores, nll=scores.nll * np.float32(np.nan))
    with pytest.raises(JropeError, match="not finite"):
        perplexity.describe(broken, 20)


def test_a_context_past_the_memory_is_refused_with_the_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    params, config = tiny()
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    message = r"context 20 needs .* GB of weights .* only 1e-06 GB are free"
    with pytest.raises(JropeError, match=message):
        perplexity.perplexity(params, config, [random_text(20)], 20)


def test_memory_is_known_here() -> None:
    free = memory.free_bytes()
    assert free is None or free > 0
