"""Sampling: the filters against transformers', the draws against their distribution."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from jrope.errors import JropeError
from jrope.generation.sample import Sampler, log_probs

OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
WARPERS = {
    "temperature": TemperatureLogitsWarper,
    "top_k": TopKLogitsWarper,
    "top_p": TopPLogitsWarper,
    "min_p": MinPLogitsWarper,
}
CASES = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 30.0},
    "top_k=1": {"top_k": 1},
    "top_k": {"top_k": 40},
    "top_k=V": {"top_k": 1000},
    "top_k>V": {"top_k": 123456},
    "top_p": {"top_p": 0.9},
    "top_p tiny": {"top_p": 1e-6},
    "top_p=0": {"top_p": 0.0},
    "top_p nearly 1": {"top_p": 0.99},
    "min_p": {"min_p": 0.05},
    "min_p=1": {"min_p": 1.0},
    "penalty": {"repetition_penalty": 1.3},
    "reward": {"repetition_penalty": 0.5},
    "all": {
        "temperature": 1.4,
        "top_k": 60,
        "top_p": 0.8,
        "min_p": 0.02,
        "repetition_penalty": 1.2,
    },
}


def sampler(**changes):
    return Sampler(**{"temperature": 1.0, **changes})


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def random_logits(batch=3, vocab=1000, seed=0):
    return np.random.default_rng(seed).normal(0, 3, (batch, vocab)).astype(np.float32)


def seen_tokens(logits, count=50, seed=1):
    """Token ids [B, count] and the same as a mask [B, V]."""
    ids = np.random.default_rng(seed).integers(0, logits.shape[1], (len(logits), count))
    mask = np.zeros(logits.shape, bool)
    np.put_along_axis(mask, ids, True, axis=1)
    return ids, mask


def random_counts(logits, seed=2):
    """int32 [B, V]: 2 for each time that a token was drawn, 1 more from the prompt."""
    random = np.random.default_rng(seed)
    kinds, drawn = (
        random.integers(0, 2, logits.shape),
        random.integers(0, 6, logits.shape),
    )
    return (kinds + 2 * np.maximum(drawn - 2, 0)).astype(np.int32)


def transformers_warp(logits, ids, **settings):
    scores = torch.from_numpy(logits.copy())
    penalty = settings.pop("repetition_penalty", 1.0)
    if penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(penalty)(
            torch.from_numpy(ids), scores
        )
    for name, warper in WARPERS.items():
        if name in settings:
            scores = warper(settings[name])(None, scores)
    return scores.numpy()


@pytest.mark.parametrize("case", CASES)
def test_same_tokens_survive_as_in_transformers(case):
    logits = random_logits()
    ids, seen = seen_tokens(logits)
    wanted = transformers_warp(logits, ids, **CASES[case])
    got = sampler(**CASES[case]).warp(jnp.asarray(logits), jnp.asarray(seen))
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(wanted))
    np.testing.assert_allclose(
        jax.nn.softmax(got), torch.from_numpy(wanted).softmax(-1), rtol=2e-6, atol=1e-9
    )


@pytest.mark.parametrize("name, value", [("top_k", 2), ("top_p", 0.6), ("min_p", 0.3)])
def test_removed_tokens_stay_removed(name, value):
    logits = random_logits(vocab=20)
    logits[:, ::2] = -np.inf
    got = np.asarray(sampler(**{name: value}).warp(jnp.asarray(logits)))
    assert np.isneginf(got[:, ::2]).all()
    wanted = transformers_warp(logits, None, **{name: value})
    np.testing.assert_array_equal(got, wanted)


def test_top_k_keeps_removed_tokens_removed_when_k_exceeds_the_rest():
    logits = jnp.asarray([[1.0, -jnp.inf, 0.0, -jnp.inf]])
    got = sampler(top_k=3).warp(logits)
    np.testing.assert_array_equal(got, logits)


def test_ties_at_the_cut_off_are_kept_whatever_their_place():
    tied = jnp.asarray([[0.0, 2.0, 1.0, 1.0, -0.0, 1.0]])
    kept = [[False, True, True, True, False, True]]
    for settings_ in ({"top_k": 2}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}):
        got = np.isfinite(sampler(**settings_).warp(tied))
        np.testing.assert_array_equal(got, kept, err_msg=str(settings_))


def test_negative_zero_ties_with_zero():
    got = sampler(top_k=1).warp(jnp.asarray([[0.0, -0.0, -1.0]]))
    np.testing.assert_array_equal(np.isfinite(got), [[True, True, False]])


def test_equal_logits_all_survive():
    got = sampler(top_k=1, top_p=0.1, min_p=1.0).warp(jnp.full((1, 7), -3.5))
    np.testing.assert_array_equal(got, np.full((1, 7), -3.5, np.float32))


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False),
        min_size=8,
        max_size=8,
    ),
    k=st.integers(1, 9),
)
def test_top_k_is_exact_for_any_floats(values, k):
    logits = np.asarray([values], np.float32)
    cut = np.sort(logits[0])[-min(k, 8)]
    got = sampler(top_k=k).warp(jnp.asarray(logits))
    subnormal = np.abs(logits) < np.finfo(np.float32).tiny  # may count as zero
    cut = 0.0 if abs(cut) < np.finfo(np.float32).tiny else cut
    wanted = np.where(subnormal, 0.0, logits) >= cut
    np.testing.assert_array_equal(np.isfinite(got), wanted)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), p=st.floats(0.0, 0.9999))
def test_top_p_keeps_the_fewest_tokens_that_reach_p(seed, p):
    logits = random_logits(1, 200, seed)
    kept = np.isfinite(sampler(top_p=p).warp(jnp.asarray(logits)))[0]
    odds = np.exp(logits[0].astype(np.float64))
    odds /= odds.sum()
    assert kept[odds.argmax()]
    assert odds[kept].min() >= odds[~kept].max(initial=0.0)
    assert odds[kept].sum() >= p - 1e-6
    assert kept.sum() == 1 or odds[kept].sum() - odds[kept].min() < p + 1e-6


def test_rows_have_their_own_settings():
    logits, rows = random_logits(6), range(6)
    fields = {
        "temperature": [0.0, 0.5, 1.0, 2.0, 1.0, 0.8],
        "top_k": [0, 3, 0, 0, 7, 2000],
        "top_p": [1.0, 1.0, 0.7, 1.0, 0.5, 0.99],
        "min_p": [0.0, 0.0, 0.0, 0.2, 0.0, 0.01],
        "repetition_penalty": [1.0, 1.5, 1.0, 0.9, 1.0, 1.0],
        "frequency_penalty": [0.4, 0.0, 0.0, 1.1, -0.2, 0.0],
        "presence_penalty": [0.0, 0.3, 0.0, -0.9, 0.5, 0.0],
    }
    seen = jnp.asarray(random_counts(logits))
    together = Sampler(**{name: np.asarray(v) for name, v in fields.items()})
    got = together.warp(jnp.asarray(logits), seen)
    drawn = together(jnp.asarray(logits), keys(6), seen)
    for i in rows:
        alone, one = Sampler(**{k: v[i] for k, v in fields.items()}), slice(i, i + 1)
        row = jnp.asarray(logits[one])
        np.testing.assert_array_equal(got[one], alone.warp(row, seen[one]))
        np.testing.assert_array_equal(drawn[one], alone(row, keys(6)[one], seen[one]))


def test_a_row_does_not_depend_on_its_neighbours():
    logits, full = jnp.asarray(random_logits(5)), sampler(top_k=50, top_p=0.95)
    drawn = full(logits, keys(5))
    changed = full(logits.at[1:].add(1.5)[:, ::1], keys(5).at[1:].set(keys(4, seed=9)))
    assert drawn[0] == changed[0]
    turned = full(logits[::-1], keys(5)[::-1])
    np.testing.assert_array_equal(turned, drawn[::-1])
    assert (drawn[1:] != changed[1:]).any()


def test_equal_keys_and_logits_give_equal_tokens():
    logits = jnp.broadcast_to(jnp.asarray(random_logits(1)), (4, 1000))
    same = jnp.broadcast_to(keys(1), (4,))
    assert len(set(np.asarray(sampler()(logits, same)).tolist())) == 1


@pytest.mark.parametrize("case", ["temperature", "top_k", "top_p", "min_p", "all"])
def test_draws_follow_the_distribution(case):
    draws, vocab = 20_000, 12
    row = random_logits(1, vocab, seed=3) / 2
    _, seen = seen_tokens(row, 3)
    given_ = sampler(**{**CASES[case], **({"top_k": 5} if "top_k" in case else {})})
    odds = np.asarray(jax.nn.softmax(given_.warp(jnp.asarray(row), jnp.asarray(seen))))
    many = np.broadcast_to(row, (draws, vocab)), np.broadcast_to(seen, (draws, vocab))
    drawn = jax.jit(given_)(jnp.asarray(many[0]), keys(draws), jnp.asarray(many[1]))
    counts = np.bincount(drawn, minlength=vocab)
    expected = odds[0].astype(np.float64) * draws
    assert counts[expected == 0].sum() == 0
    alive = expected > 0
    chi2 = ((counts - expected)[alive] ** 2 / expected[alive]).sum()
    assert chi2 < 45  # p < 1e-5 for the 11 degrees of freedom at most


@pytest.mark.parametrize("settings_", [OFF, {"top_k": 3, "top_p": 0.5, "min_p": 0.5}])
def test_temperature_zero_takes_the_best(settings_):
    logits = jnp.asarray(random_logits(8))
    got = Sampler(**{**OFF, **settings_})(logits, keys(8))
    np.testing.assert_array_equal(got, jnp.argmax(logits, axis=-1))
    assert got.dtype == jnp.int32


def test_greedy_rows_feel_the_repetition_penalty():
    logits = jnp.asarray([[3.0, 2.5, -1.0], [-0.5, -0.6, -9.0]])
    seen = jnp.asarray([[True, False, False], [True, False, False]])
    got = Sampler(repetition_penalty=1.5)(logits, keys(2), seen)
    np.testing.assert_array_equal(got, [1, 1])


def test_a_cold_row_takes_the_best_like_a_greedy_one():
    logits = jnp.asarray(random_logits(8))
    got = sampler(temperature=1e-6)(logits, keys(8))
    np.testing.assert_array_equal(got, jnp.argmax(logits, axis=-1))


def test_a_large_vocabulary():
    logits = random_logits(2, 128_256)
    settings_ = {"top_k": 1000, "top_p": 0.9}
    wanted = np.isfinite(transformers_warp(logits, None, **settings_))
    got = np.isfinite(jax.jit(sampler(**settings_).warp)(jnp.asarray(logits)))
    # the last token in may differ: the two add 128,256 probabilities in other orders
    assert np.abs(wanted.sum(-1) - got.sum(-1)).max() <= 1
    assert (wanted != got).sum(-1).max() <= 1
    count = np.isfinite(sampler(top_k=1000).warp(jnp.asarray(logits))).sum(-1)
    np.testing.assert_array_equal(count, 1000)


def test_bfloat16_logits_are_warped_in_float32():
    logits = jnp.asarray(random_logits()).astype(jnp.bfloat16)
    got = sampler(temperature=0.7).warp(logits)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(
        got, sampler(temperature=0.7).warp(logits.astype(jnp.float32))
    )


def test_changing_any_number_never_traces_again():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def draw(given_, logits, keys_, seen):
        return given_(logits, keys_, seen)

    logits = jnp.asarray(random_logits())
    _, seen = seen_tokens(logits)
    given_ = Sampler()
    others = {
        "temperature": [1, 0.8, np.float64(2), np.float32(0.1)],
        "top_k": [5, np.int64(7), np.uint8(9)],
        "top_p": [0.9, 0, np.float32(0.4)],
        "min_p": [0.1, 1],
        "repetition_penalty": [1.3, 2],
        "frequency_penalty": [0.5, -1],
        "presence_penalty": [2, np.float32(0.1)],
    }
    for name, values in others.items():
        for value in values:
            given_ = dataclasses.replace(given_, **{name: value})
            draw(given_, logits, keys(3, seed=len(name)), jnp.asarray(seen))


def test_is_a_pytree_of_its_numbers():
    given_ = Sampler(temperature=0.8, top_p=0.9)
    assert jax.tree.leaves(given_) == [0.8, 0, 0.9, 0.0, 1.0, 0.0, 0.0]
    assert jax.tree.map(lambda x: x, given_) == given_
    shapes = jax.eval_shape(lambda s: s, given_)
    assert isinstance(shapes.top_p, jax.ShapeDtypeStruct)
    doubled = jax.vmap(lambda s: s.temperature * 2)(
        jax.tree.map(lambda x: jnp.full((2,), x), given_)
    )
    np.testing.assert_allclose(doubled, [1.6, 1.6])
    paths, _ = zip(*jax.tree_util.tree_leaves_with_path(given_), strict=True)
    assert [jax.tree_util.keystr(path) for path in paths[:2]] == [
        ".temperature",
        ".top_k",
    ]


def test_what_a_program_gives_back_is_not_looked_at():
    # A check would wait for the device to compute it.
    wrong = jax.jit(lambda s: jax.tree.map(lambda x: x - 9, s))(Sampler())
    assert isinstance(wrong, Sampler)
    assert float(wrong.temperature) == -9
    with pytest.raises(JropeError, match="temperature: got -9"):
        Sampler(temperature=wrong.temperature)


@pytest.mark.parametrize(
    "name, value",
    [
        ("temperature", -0.1),
        ("temperature", 1e-9),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", np.asarray([0.5, -1.0])),
        ("temperature", jnp.asarray([0.5, jnp.nan])),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_k", 2**31),
        ("top_k", np.asarray([1.0])),
        ("top_p", 1.01),
        ("top_p", -0.1),
        ("min_p", 2),
        ("min_p", float("nan")),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("frequency_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("presence_penalty", float("nan")),
    ],
)
def test_says_which_value_is_wrong(name, value):
    with pytest.raises(JropeError, match=f"{name}: got .*, want .*(from|whole)"):
        Sampler(**{name: value})


def test_names_every_wrong_value_at_once():
    with pytest.raises(JropeError, match=r"temperature: got -1.*top_p: got 3, want"):
        Sampler(temperature=-1, top_p=3)


def test_says_which_shape_is_wrong():
    logits = jnp.zeros((2, 5))
    with pytest.raises(JropeError, match=r"logits and seen: got \[2, 5\] and \[2, 4\]"):
        Sampler().warp(logits, jnp.zeros((2, 4), bool))
    with pytest.raises(JropeError, match=r"got \[5\] and None, want \[B, V\] each"):
        Sampler().warp(logits[0])
    with pytest.raises(
        JropeError, match=r"keys: got shape \[3\] for logits \[2, 5\].*split\(key, 2\)"
    ):
        Sampler()(logits, keys(3))
    with pytest.raises(JropeError, match=r"top_k: got \[3\], want .* each of 2 rows"):
        Sampler(top_k=np.asarray([1, 2, 3])).warp(logits)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_log_probs(dtype):
    logits = jnp.asarray(random_logits(4)).astype(dtype)
    tokens = jnp.asarray([0, 5, 999, 17])
    truth = np.asarray(logits).astype(np.float64)
    truth = truth - np.log(np.exp(truth).sum(-1, keepdims=True))
    got = log_probs(logits, tokens)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, truth[np.arange(4), tokens], atol=1e-5)


def test_log_probs_takes_any_leading_shape():
    logits = jnp.asarray(random_logits(6)).reshape(2, 3, 1000)
    tokens = jnp.arange(6).reshape(2, 3)
    got = log_probs(logits, tokens)
    flat = log_probs(logits.reshape(6, 1000), tokens.reshape(6))
    np.testing.assert_array_equal(got, flat.reshape(2, 3))
