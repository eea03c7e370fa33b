"""`score` against PyTorch's cross entropy, whatever the chunks of the vocabulary."""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TinyHF, make_tiny_hf

from jrope.hf import config_from_hf
from jrope.model.config import LlamaConfig, parameter_shapes
from jrope.model.llama import forward
from jrope.model.scores import LOGITS_AT_ONCE, score, token_logprobs
from jrope.tree import nest

VOCABULARY = 61
DYNAMIC = (("rope_type", "dynamic"), ("factor", 2.0))


@cache
def model(
    rope: tuple[tuple[str, Any], ...] = (), tied: bool = False
) -> tuple[TinyHF, dict[str, Any], LlamaConfig]:
    tiny = make_tiny_hf(layers=1, tied=tied, rope_parameters=dict(rope))
    params = nest({name: jnp.asarray(x) for name, x in tiny.weights.items()})
    return tiny, params, config_from_hf(tiny.config)


def random_tokens(batch: int, count: int) -> np.ndarray:
    shape = (batch, count)
    return np.random.default_rng(count).integers(0, VOCABULARY, shape, np.int32)


def torch_scores(tiny: TinyHF, ids: np.ndarray) -> np.ndarray:
    """Minus the cross entropy of every token [T - 1]."""
    inner = tiny.model.model
    inner.rotary_emb = type(inner.rotary_emb)(tiny.model.config)  # no memory of lengths
    row = torch.tensor(ids, dtype=torch.long)
    with torch.no_grad():
        logits = tiny.model(row[None], use_cache=False).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, row[1:], reduction="none")
    return -loss.numpy()


@pytest.mark.parametrize(
    "count, tied",
    [(2, False), (256, False), (257, False), (258, False), (600, False), (40, True)],
)
def test_score_is_cross_entropy(count: int, tied: bool) -> None:
    """One token, chunks of 256 of which the last is full, nearly empty or partial."""
    assert LOGITS_AT_ONCE == 256
    tiny, params, config = model(tied=tied)
    tokens = random_tokens(2, count)
    got = score(params, tokens, config=config)
    assert got.shape == (2, count - 1) and got.dtype == jnp.float32
    want = np.stack([torch_scores(tiny, row) for row in tokens])
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("rope", [(), DYNAMIC], ids=["default", "dynamic"])
def test_ragged_rows(rope: tuple[tuple[str, Any], ...]) -> None:
    """Each row as if alone, 0 past its end; dynamic NTK goes by the row's length."""
    tiny, params, config = model(rope)
    lengths, tokens = [70, 1, 33, 70], random_tokens(4, 70)
    got = np.asarray(score(params, tokens, np.array(lengths), config=config))
    for row, ids, n in zip(got, tokens, lengths, strict=True):
        if n > 1:
            want = torch_scores(tiny, ids[:n])
            np.testing.assert_allclose(row[: n - 1], want, atol=1e-5)
        assert not row[n - 1 :].any() and row[: n - 1].all()
    changed = tokens.copy()
    changed[2, 33:] = 5
    again = score(params, changed, np.array(lengths), config=config)
    np.testing.assert_array_equal(again, got)


def test_planned_length() -> None:
    """The first half of a text, scored as a part of the whole."""
    _, params, config = model(DYNAMIC)
    tokens = random_tokens(1, 100)
    whole = score(params, tokens, config=config)
    part = score(params, tokens[:, :50], config=config, rope_lengths=100)
    np.testing.assert_allclose(part, whole[:, :49], atol=1e-5)
    alone = score(params, tokens[:, :50], config=config)
    assert float(jnp.abs(alone - whole[:, :49]).max()) > 1e-3


def test_one_token_has_nothing_to_score() -> None:
    _, params, config = model()
    assert score(params, random_tokens(2, 1), config=config).shape == (2, 0)


def test_16_bit_weights_score_in_float32() -> None:
    """The very logits of `forward`, not rounded before the softmax."""
    _, params, config = model()
    small = jax.tree.map(lambda x: x.astype("bfloat16"), params)
    tokens = random_tokens(1, 20)
    logits, _ = jax.jit(partial(forward, config=config))(small, tokens)
    every = jax.nn.log_softmax(logits[:, :-1])
    want = jnp.take_along_axis(every, tokens[:, 1:, None], axis=-1)[..., 0]
    got = score(small, tokens, config=config)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_gradient_is_that_of_torch(remat: bool) -> None:
    """Of the mean loss, through two chunks and the remat of each, or of layers too."""
    tiny, params, config = model()
    tokens = random_tokens(1, 300)

    def loss(params: dict[str, Any]) -> jax.Array:
        return -score(params, tokens, config=config, remat=remat).mean()

    gradients = jax.grad(loss)(params)
    row = torch.tensor(tokens, dtype=torch.long)
    head = tiny.model.lm_head.weight.requires_grad_(True)
    up = tiny.model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    try:
        tiny.model(row, labels=row, use_cache=False).loss.backward()
        wanted = {"head": head.grad.numpy(), "up": up.grad.numpy()}
    finally:
        for weight in (head, up):
            weight.requires_grad_(False).grad = None
    block = gradients["model"]["layers"]["0"]["mlp"]["up_proj"]
    got = {"head": gradients["lm_head"]["weight"], "up": block["weight"]}
    for name, want in wanted.items():
        tolerance = 1e-5 * np.abs(want).max()
        np.testing.assert_allclose(got[name], want, atol=tolerance)


@pytest.mark.parametrize("batch, count", [(1, 1), (3, 255), (2, 513)])
def test_token_logprobs_of_any_hidden_states(batch: int, count: int) -> None:
    _, params, config = model()
    states = np.random.default_rng(0).standard_normal((batch, count, 64), np.float32)
    targets = random_tokens(batch, count)
    run = jax.jit(partial(token_logprobs, config=config))
    got = run(params, states, targets)
    logits = states.astype(np.float64) @ np.asarray(params["lm_head"]["weight"]).T
    top = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
    want = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - total
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("gradient", [False, True])
def test_logits_of_a_long_text_never_exist_at_once(gradient: bool) -> None:
    """4096 tokens of 32768 logits are 512 MiB: compiled only, in a quarter of it."""
    count, vocabulary = 4096, 32768
    tiny = make_tiny_hf(layers=1, vocab_size=vocabulary, hidden_size=16, heads=2)
    config = config_from_hf(tiny.config)
    shapes = {
        name: jax.ShapeDtypeStruct(shape, jnp.float32)
        for name, shape in parameter_shapes(config).items()
    }
    tokens = jax.ShapeDtypeStruct((1, count), jnp.int32)

    def loss(params: Any, tokens: Any) -> jax.Array:
        return score(params, tokens, config=config).mean()

    greedy = partial(score, config=config, greedy=True)
    run = jax.jit(jax.grad(loss) if gradient else greedy)
    memory = run.lower(nest(shapes), tokens).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * count * vocabulary / 4


@pytest.mark.parametrize("count", [2, 258])
def test_greedy_tokens_are_torchs_argmax(count: int) -> None:
    """Texts of which some tokens are the best ones, ragged, and under jit."""
    tiny, params, config = model()
    tokens, lengths = random_tokens(2, count), np.array([count, (count + 1) // 2 + 1])
    with torch.no_grad():
        for t in sorted({1, count // 2, count - 1}):
            given = torch.tensor(tokens[:, :t], dtype=torch.long)
            tokens[:, t] = tiny.model(given, use_cache=False).logits[:, -1].argmax(-1)
        given = torch.tensor(tokens, dtype=torch.long)
        logits = tiny.model(given, use_cache=False).logits[:, :-1]
    inside = np.arange(1, count) < lengths[:, None]
    want = (logits.argmax(-1).numpy() == tokens[:, 1:]) & inside
    assert want[0, [0, count // 2 - 1, -1]].all()
    got = jax.jit(partial(score, config=config, greedy=True))(params, tokens, lengths)
    assert got.greedy.dtype == bool
    np.testing.assert_array_equal(got.greedy, want)
    plain = score(params, tokens, lengths, config=config)
    np.testing.assert_array_equal(got.logprobs, plain)


def test_of_equal_logits_the_first_is_greedy() -> None:
    """As torch's argmax; here, all are equal."""
    _, params, config = model()
    params = {**params, "lm_head": jax.tree.map(jnp.zeros_like, params["lm_head"])}
    tokens = np.array([[3, 0, 1, 0]], np.int32)
    got = score(params, tokens, config=config, greedy=True).greedy
    np.testing.assert_array_equal(got, [[True, False, True]])
    assert int(torch.zeros(VOCABULARY).argmax()) == 0
