"""Windows and packed sequences: attention against float64, and whole models."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_helpers import WAYS, choose
from model_helpers import changed, close, tokens_of
from model_helpers import make as make

from jrope.errors import JropeError
from jrope.model.attention import attend
from jrope.model.kernels import cudnn
from jrope.model.layers import Step, decoder_layer
from jrope.model.llama import forward, hidden_states
from jrope.model.scores import score
from jrope.rope import DynamicNTK, Rope, table

B, T, N, K, H = 2, 37, 4, 2, 8
RANDOM = np.random.default_rng(0)
Q, KEYS, VALUES = (
    jnp.asarray(RANDOM.standard_normal((B, T, heads, H)), jnp.float32)
    for heads in (N, K, K)
)
SEGMENTS = np.sort(RANDOM.integers(0, 4, (B, T)), axis=1).astype(np.int32)
EPS = 2.0**-23


def expected(
    window: int | None, segments: np.ndarray | None, cap: float | None = None
) -> np.ndarray:
    """Softmax attention in float64, masks written out."""
    q, k, v = (np.asarray(x, np.float64) for x in (Q, KEYS, VALUES))
    k, v = (np.repeat(x, N // K, axis=2) for x in (k, v))
    at = np.arange(T)
    hidden = np.broadcast_to(at[None, :] > at[:, None], (B, T, T)).copy()
    if window is not None:
        hidden |= at[None, :] <= at[:, None] - window
    if segments is not None:
        hidden |= segments[:, :, None] != segments[:, None, :]
    scores = np.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(H)
    scores = scores if cap is None else np.tanh(scores / cap) * cap
    weights = np.where(hidden[:, None], 0, np.exp(scores))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bnts,bsnh->btnh", weights, v)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All scores at once, or blocks of 8 keys and queries."""
    choose(monkeypatch, request.param)
    return request.param


@pytest.mark.parametrize("cap", [None, 0.5])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 1, 5, 12, 20, 24, 64])
def test_masks(way: str, window: int | None, packed: bool, cap: float | None) -> None:
    """Within 16 roundings of values of at most 4; windows have blocks all inside."""
    segments = SEGMENTS if packed else None
    given = None if segments is None else jnp.asarray(segments)
    see = jax.jit(partial(attend, window=window, segments=given, cap=cap))
    got, want = see(Q, KEYS, VALUES), expected(window, segments, cap)
    np.testing.assert_allclose(got, want, atol=64 * EPS, rtol=0)


@pytest.mark.parametrize("window", [1, 5, 64])
def test_a_window_in_decode(window: int) -> None:
    want = expected(window, None)
    for at in (0, 4, T - 1):
        starts = jnp.full(B, at, jnp.int32)
        got = attend(Q[:, at : at + 1], KEYS, VALUES, starts, window=window)
        np.testing.assert_allclose(got[:, 0], want[:, at], atol=64 * EPS, rtol=0)


@pytest.mark.parametrize("window", [None, 1, 5])
def test_cudnn_is_asked_for_the_same_windows(
    window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the GPU's kernel is given, through JAX's plain way of the same function."""
    given = jax.nn.dot_product_attention

    def plain(*args: Any, implementation: str, **how: Any) -> jax.Array:
        assert implementation == "cudnn"
        return given(*args, implementation="xla", **how)

    monkeypatch.setattr(jax.nn, "dot_product_attention", plain)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        got = cudnn(Q, KEYS, VALUES, None, scale=None, window=window)
    np.testing.assert_allclose(got, expected(window, None), atol=64 * EPS, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_through_masked_blocks(way: str, packed: bool) -> None:
    segments = jnp.asarray(SEGMENTS) if packed else None
    see = partial(attend, window=5, segments=segments)
    grads = jax.grad(lambda *x: jnp.sum(see(*x) ** 2), argnums=(0, 1, 2))(
        Q, KEYS, VALUES
    )
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0.1 for g in grads)
    far = jax.grad(lambda k: jnp.sum(see(Q, k, VALUES)[:, -1]))(KEYS)
    assert not np.asarray(far)[:, : T - 5].any()  # keys that the window hides


def test_packed_sequences_equal_single_ones(make) -> None:
    model = make(layers=2)
    tokens = tokens_of(model.config, 1, 20)
    sizes = (7, 1, 12)
    segments = jnp.asarray(np.repeat([3, 1, 9], sizes)[None], jnp.int32)
    run = partial(forward, model.params, config=model.config)
    got, _ = run(tokens, segment_ids=segments)
    ends = np.cumsum(sizes)
    parts = [
        run(tokens[:, end - size : end])[0]
        for size, end in zip(sizes, ends, strict=True)
    ]
    close(got, np.concatenate(parts, axis=1), 5e-6)
    whole, _ = run(tokens)
    assert np.abs(np.asarray(whole - got))[:, sizes[0] :].max() > 0.1
    scores = score(model.params, tokens, config=model.config, segment_ids=segments)
    alone = [
        score(model.params, tokens[:, end - size : end], config=model.config)[0]
        for size, end in zip(sizes, ends, strict=True)
    ]
    want = np.concatenate([alone[0], [0], alone[1], [0], alone[2]])
    np.testing.assert_allclose(scores[0], want, atol=1e-5, rtol=0)


def test_packed_sequences_of_a_length_rule(make) -> None:
    model = make()
    rope = Rope(
        theta=1e4,
        rotary_dim=model.config.head_dim,
        scaling=DynamicNTK(factor=2, original_length=4),
    )
    config = changed(model.config, rope=rope)
    tokens = tokens_of(config, 1, 12)
    segments = jnp.asarray(np.repeat([0, 1], 6)[None], jnp.int32)
    with pytest.raises(JropeError, match="DynamicNTK depend on each sequence's length"):
        forward(model.params, tokens, config=config, segment_ids=segments)
    run = partial(forward, model.params, config=config, rope_lengths=9)
    got, _ = run(tokens, segment_ids=segments)
    close(got[:, 6:], run(tokens[:, 6:])[0], 5e-6)


def test_a_layer_without_rotation_knows_no_positions(make) -> None:
    """The last of two tokens sees both in any order, once nothing is rotated."""
    model = make(layers=1)
    config, weights = model.config, model.params["model"]["layers"]["0"]
    x = jax.random.normal(jax.random.key(0), (1, 3, config.hidden_size))
    cos, sin = table(config.rope, jnp.arange(3)[None])
    layer = partial(decoder_layer, weights, config=config, capacity=3)
    step = Step(cos=cos, sin=sin)
    swapped = x[:, jnp.asarray([1, 0, 2])]
    plain, turned = (layer(x, step, rotary=on)[0][:, 2] for on in (False, True))
    close(layer(swapped, step, rotary=False)[0][:, 2], plain, 5e-6)
    assert np.abs(layer(swapped, step, rotary=True)[0][:, 2] - turned).max() > 1e-3


def test_halves_of_a_layer_may_be_replaced(make) -> None:
    model = make(layers=1)
    config, weights = model.config, model.params["model"]["layers"]["0"]
    x = jax.random.normal(jax.random.key(0), (1, 3, config.hidden_size))
    step = Step(cos=jnp.ones((1, 3, 1)), sin=jnp.zeros((1, 3, 1)))
    got, slots = decoder_layer(
        weights,
        x,
        step,
        config=config,
        capacity=3,
        attention=lambda weights, x, step, **_: (2 * x, (x, x)),
        mlp=lambda weights, x, **_: -x / 3,
    )
    close(got, 2 * x, 1e-6)
    assert slots[0] is not None


def test_hidden_states_are_what_the_head_is_given(make) -> None:
    model = make(layers=2, tied=True)
    tokens = tokens_of(model.config, 2, 5)
    x, _ = hidden_states(model.params, tokens, config=model.config)
    head = model.params["model"]["embed_tokens"]["weight"]
    want, _ = forward(model.params, tokens, config=model.config)
    close(np.asarray(x) @ np.asarray(head).T, np.asarray(want), 5e-6)


WRONG_INPUTS = {
    "a list": ({"tokens": [[1, 2]]}, r"tokens: got a list, .*jnp.asarray\(tokens\)"),
    "one row": (
        {"tokens": np.array([1, 2])},
        r"tokens: got int.*\[2\].*tokens\[None\]",
    ),
    "floats": (
        {"tokens": np.ones((1, 2))},
        r"tokens: got float64 \[1, 2\], want integ",
    ),
    "one row of positions": (
        {"positions": np.arange(4)},
        r"positions: got shape \[4\], want .*tokens, \[2, 4\]; positions\[None\]",
    ),
    "float positions": ({"positions": np.ones((2, 4))}, "positions: got float64"),
    "segments": (
        {"segment_ids": np.ones((2, 3), int)},
        r"segment_ids: got shape \[2, 3",
    ),
    "a mask": (
        {"attention_mask": 1},
        "forward has no argument attention_mask .*lengths",
    ),
    "another word": ({"foo": 1}, "forward has no argument foo"),
    "small": ({"capacity": 3}, "capacity: got 3, want at least T = 4"),
}


@pytest.mark.parametrize("given, words", WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_inputs_of_another_kind_are_told_what_to_give(make, given, words: str) -> None:
    model = make(layers=1)
    arguments = {"tokens": np.ones((2, 4), np.int32), **given}
    with pytest.raises(JropeError, match=words):
        forward(model.params, config=model.config, **arguments)


def test_torch_tensors_and_whole_variables_are_told_apart(make) -> None:
    import torch

    model = make(layers=1)
    with pytest.raises(JropeError, match=r"got a torch Tensor, .* tokens.numpy\(\)"):
        forward(
            model.params, torch.ones((1, 2), dtype=torch.int64), config=model.config
        )
    tokens = np.ones((1, 2), np.int32)
    with pytest.raises(JropeError, match=r"params: .*\['params'\].*tree\[\"params\"\]"):
        forward({"params": model.params}, tokens, config=model.config)
    cache = forward(model.params, tokens, config=model.config, capacity=4)[1]
    with pytest.raises(JropeError, match="segment_ids: got a cache, too"):
        forward(
            model.params,
            tokens,
            cache=cache,
            config=model.config,
            segment_ids=np.zeros((1, 2), int),
        )
