"""The cache as 8-bit integers: beside float64 over the same integers, and its bytes."""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from attention_helpers import small_blocks
from int8_cache_helpers import (
    CONFIG,
    GROWING,
    LENGTH,
    PLANNED,
    ROWS,
    TOKENS,
    TRAINED,
    assert_near,
    meant,
    run,
)
from int8_helpers import matrix, wide
from model_helpers import changed

from jrope.bench.model import cache_bytes
from jrope.errors import JropeError
from jrope.model import attention
from jrope.model.cache import KVCache
from jrope.model.int8_cache import Scaled, to_int8
from jrope.model.llama import forward, init_params
from jrope.model.queries import Queries
from jrope.rope import Rope
from jrope.tree import Params, flatten


@pytest.fixture(scope="module")
def params() -> Params:
    return init_params(jax.random.key(0), CONFIG)


# --- the integers


def definition(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers and scales in float64, rounded where the formula is."""
    most = np.abs(x.astype(np.float64)).max(-1, keepdims=True)
    inverse = np.float64(np.float32(1 / 127))
    short = jnp.asarray((most * inverse).astype(np.float32)).astype(jnp.bfloat16)
    scales = wide(short)
    with np.errstate(divide="ignore"):
        steps = wide((1 / scales).astype(np.float32))
    steps = np.where(scales == 0, 0, steps)
    return np.rint((x.astype(np.float64) * steps).astype(np.float32)), scales


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_integers_are_the_definition(dtype: str) -> None:
    x = jnp.asarray(matrix(np.float32), dtype)
    got = jax.jit(to_int8)(x)
    numbers, scales = definition(np.asarray(x))
    np.testing.assert_array_equal(wide(got.scales), scales)
    np.testing.assert_array_equal(got.numbers, numbers)
    assert got.numbers.dtype == jnp.int8 and got.scales.dtype == jnp.bfloat16
    assert np.abs(numbers).max(1).tolist() == [127] * 3 + [0] + [127] * 36
    gap, half = np.abs(meant(got) - wide(x)), scales / 2
    assert (gap <= half * (1 + 127 * 2.0**-22)).all(), "two roundings, 127 steps away"


def test_what_is_not_finite_stays_so() -> None:
    x = np.ones((4, 8), np.float32)
    x[1, 3], x[2, 5], x[3, 0] = np.nan, np.inf, -np.inf
    got = jax.jit(to_int8)(x)
    assert np.isnan(wide(got.scales)[:, 0]).tolist() == [False, True, True, True]


# --- attention


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


HEADS, KV_HEADS, WIDTH, SLOTS = 4, 2, 16, 24
STARTS = np.array([3, 17], np.int32)
WAYS: dict[str, tuple[int, dict[str, Any]]] = {  # new tokens, and how they see
    "one": (1, {"scale": 0.3}),
    "one, window": (1, {"window": 4}),
    "one, cap": (1, {"cap": 2.0}),
    "whole": (5, {"window": 7}),
    "blocks": (5, {"cap": 2.0}),
    "tpu": (1, {}),
}


def oracle(
    q: np.ndarray, k: Any, v: Any, how: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """Attention in float64, and scores: [B, T, N, H] and [B, T, N, S]."""
    k, v = (np.repeat(wide(x), HEADS // KV_HEADS, axis=2) for x in (k, v))
    scale = how.get("scale", 1 / math.sqrt(WIDTH))
    scores = np.einsum("btnh,bsnh->btns", wide(q), k) * scale
    if "cap" in how:
        scores = np.tanh(scores / how["cap"]) * how["cap"]
    slot = np.arange(SLOTS)[None, None, None, :]
    at = (STARTS[:, None] + np.arange(q.shape[1]))[:, :, None, None]
    hidden = (slot > at) | (slot <= at - how.get("window", SLOTS))
    scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("btns,bsnh->btnh", weights, v), scores


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("way", WAYS)
def test_attention_is_float64s_over_the_same_integers(
    way: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, how = WAYS[way]
    if way == "blocks":
        small_blocks(monkeypatch)
    q = jnp.asarray(random(0, ROWS, count, HEADS, WIDTH), dtype)
    k, v = (random(i, ROWS, SLOTS, KV_HEADS, WIDTH) for i in (1, 2))
    k *= 10.0 ** random(3, ROWS, SLOTS, KV_HEADS, 1) ** 2  # every scale another
    slots = to_int8(jnp.asarray(k)), to_int8(jnp.asarray(v))
    if way == "tpu":
        queries = Queries(slots=STARTS[:, None], segments=None, window=None)
        got = attention._one_query_on_tpu(q, *slots, queries, None)
    else:
        got = attention.attend(q, *slots, jnp.asarray(STARTS), **how)
    want, scores = oracle(np.asarray(q), *map(meant, slots), how)
    # Weights and result are rounded to the dtype, scores to float32.
    most, step = (
        np.abs(meant(slots[1])).max(),
        2.0 ** (-8 if dtype != "float32" else -23),
    )
    largest = np.abs(scores[np.isfinite(scores)]).max()
    np.testing.assert_allclose(
        wide(got), want, atol=most * (2 * step + 8 * largest * 2.0**-23), rtol=0
    )


@pytest.mark.parametrize("way", ["one", "whole"])
def test_attention_loses_no_more_than_half_a_scale_of_each_number(way: str) -> None:
    """Scores are off by e = |q|_1 s / 2, weights hence by a factor up to exp(2 e)."""
    count, how = WAYS[way]
    q = random(0, ROWS, count, HEADS, WIDTH)
    k, v = (random(i, ROWS, SLOTS, KV_HEADS, WIDTH) for i in (1, 2))
    keys, values = to_int8(jnp.asarray(k)), to_int8(jnp.asarray(v))
    got = attention.attend(jnp.asarray(q), keys, values, jnp.asarray(STARTS), **how)
    want, _ = oracle(q, k, v, how)
    scale = how.get("scale", 1 / math.sqrt(WIDTH))
    wrong = scale * np.abs(q).sum(-1).max() * wide(keys.scales).max() / 2
    bound = np.expm1(2 * wrong) * np.abs(v).max() + wide(values.scales).max() / 2
    gap = np.abs(wide(got) - want).max()
    assert bound / 200 < gap < bound


# --- the model


def over_cached(monkeypatch: pytest.MonkeyPatch, name: str, cache: KVCache) -> None:
    """Let the reference see a cache's keys and values; check these as they come."""
    layers = zip(cache.keys, cache.values, strict=True)

    def held(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def attend(q: Any, k: Any, v: Any, *rest: Any) -> np.ndarray:
            slots: Any = next(layers)
            assert_near(slots, (k, v))
            return function(q, *map(meant, slots), *rest)

        return attend

    monkeypatch.setattr(reference, name, held(getattr(reference, name)))


@pytest.mark.parametrize("rope", [PLANNED, GROWING], ids=["planned", "growing"])
def test_logits_are_float64s_over_the_same_integers(
    params: Params, rope: Rope, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk and then tokens one by one, to far past the trained length."""
    config, first = changed(CONFIG, rope=rope), TRAINED + 4
    cache = KVCache.empty(config, ROWS, LENGTH, "int8")
    logits, cache = run(params, TOKENS[:, :first], cache=cache, config=config)
    found = [logits]
    for t in range(first, LENGTH):
        logits, cache = run(params, TOKENS[:, t : t + 1], cache=cache, config=config)
        found.append(logits)
    assert all(isinstance(x, Scaled) for x in (*cache.keys, *cache.values))

    def growing(n: int) -> Any:
        return [np.asarray(x) for x in rope.frequencies(n, np.float64)]

    frequencies, scaling = rope.frequencies(LENGTH, np.float64)
    name = "attend_growing" if rope == GROWING else "attend"
    over_cached(monkeypatch, name, cache)
    want = reference.forward(
        {name: np.asarray(x) for name, x in flatten(params).items()},
        TOKENS,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        frequencies=growing if rope == GROWING else np.asarray(frequencies),
        scaling=float(scaling),
        eps=config.rms_norm_eps,
    ).logits
    np.testing.assert_allclose(np.concatenate(found, axis=1), want, atol=1e-4)


def test_a_prompt_without_a_cache_sees_itself_as_computed(params: Params) -> None:
    plain, kept = run(params, TOKENS, config=CONFIG, capacity=LENGTH + 3)
    got, cache = run(
        params, TOKENS, config=CONFIG, capacity=LENGTH + 3, cache_dtype="int8"
    )
    np.testing.assert_allclose(got, plain, atol=1e-5)
    assert_near(cache.keys + cache.values, kept.keys + kept.values)


def test_windows_keep_their_integers_and_scales_together(params: Params) -> None:
    """Slots that go round; the first layer's keys do not depend on its cache."""
    config, window = changed(CONFIG, windows=(5, None)), 5
    own: dict[str, Any] = {"capacity": LENGTH, "cache_dtype": "int8"}
    _, cache = run(params, TOKENS[:, :7], config=config, **own)
    for start, end in pairwise((7, 8, 12, 13)):  # one token, several, one
        chunk = TOKENS[:, start:end]
        _, cache = run(params, chunk, cache=cache, config=config)
    assert [x.shape[1] for x in cache.keys] == [window, LENGTH]
    _, plain = run(params, TOKENS, config=CONFIG, capacity=LENGTH + 3)
    held = [10, 11, 12, 8, 9]  # the position in each slot
    want = [x[0][:, held] for x in (plain.keys, plain.values)]
    assert_near([cache.keys[0], cache.values[0]], want)


# --- leaves, bytes, programs


def test_a_float_cache_has_the_leaves_it_had(params: Params) -> None:
    layers = CONFIG.num_hidden_layers
    shape = (ROWS, LENGTH, 2, 16)
    _, made = run(params, TOKENS, config=CONFIG)
    for cache in (KVCache.empty(CONFIG, ROWS, LENGTH, "float32"), made):
        leaves = jax.tree.leaves(cache)
        assert [x.shape for x in leaves] == [shape] * 2 * layers + [(ROWS,)] * 2
        assert {x.dtype.name for x in leaves} == {"float32", "int32"}


def test_bytes_are_a_half_and_a_scale() -> None:
    config = changed(CONFIG, head_dim=128, windows=(4, None))
    cache = KVCache.empty(config, ROWS, LENGTH, "int8")
    size = sum(x.nbytes for x in jax.tree.leaves((cache.keys, cache.values)))
    assert size == cache_bytes(config, LENGTH, 2, ROWS, "int8")
    assert size / cache_bytes(config, LENGTH, 2, ROWS) == 130 / 256


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="XLA's CPU backend's memory")
def test_decoding_holds_floats_of_one_layer_at_most() -> None:
    """What XLA's CPU backend widens for a product; never a dequantised cache."""
    config, slots = changed(CONFIG, num_hidden_layers=3), 2048
    params = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
    cache = jax.eval_shape(lambda: KVCache.empty(config, ROWS, slots, "int8"))
    token = jnp.zeros((ROWS, 1), jnp.int32)
    step = jax.jit(forward, static_argnames="config", donate_argnames="cache")
    program = step.lower(params, token, cache=cache, config=config).compile()
    sizes = program.memory_analysis()
    assert sizes.alias_size_in_bytes >= cache_bytes(config, slots, 4, ROWS, "int8")
    layer = cache_bytes(changed(config, num_hidden_layers=1), slots, 4, ROWS)
    assert sizes.temp_size_in_bytes < 1.5 * layer
    whole = rf"= f32\[{ROWS},{slots},(?:2,16|32)\]\S* (\w+)"
    does = {*re.findall(whole, program.as_text())}
    assert does and not does & {"multiply", "copy", "transpose"}


# --- refusals


def test_other_dtypes_and_a_second_cache_are_refused(params: Params) -> None:
    wanted = r"cache_dtype: got 'int4', want 'int8' or None"
    wrong: Any = "int4"
    with pytest.raises(JropeError, match=wanted):
        forward(params, TOKENS, config=CONFIG, cache_dtype=wrong)
    cache = KVCache.empty(CONFIG, ROWS, LENGTH, "float32")
    with pytest.raises(JropeError, match="cache already has one; give only one of"):
        forward(params, TOKENS, config=CONFIG, cache=cache, cache_dtype="int8")
