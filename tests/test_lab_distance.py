"""Mean attention scores by distance against float64 NumPy, pair by pair."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from conftest import make_tiny_hf

from jrope.bench.model import named_shape
from jrope.errors import JropeError
from jrope.hf import config_from_hf
from jrope.lab.distance import Means, describe, mean_queries_and_keys, scores_at
from jrope.model.config import LlamaConfig
from jrope.rope import DynamicNTK, Linear, Rope, Yarn
from jrope.tree import nest

DISTANCES = [0, 1, 5, 40, 999]
DIM, LENGTH = 8, 1000
METHODS = {
    "default": (None, lambda: reference.default(DIM, 1e4)),
    "linear": (Linear(factor=3), lambda: reference.linear(DIM, 1e4, 3)),
    "dynamic": (
        DynamicNTK(factor=2, original_length=64),
        lambda: reference.dynamic(DIM, 1e4, 2, 64, LENGTH),
    ),
    "yarn": (
        Yarn(factor=4, original_length=64),
        lambda: reference.yarn(DIM, 1e4, 4, 64),
    ),
}


def turned(x: np.ndarray, position: int, f: Any, scaling: float) -> np.ndarray:
    """Rotate the first 2 R channels of x [..., H] in halves, in 80 bits."""
    r = len(f)
    cos, sin = (scaling * g(position * f) for g in (np.cos, np.sin))
    a, b, rest = x[..., :r], x[..., r : 2 * r], x[..., 2 * r :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def model(rope: Rope, head_dim: int = DIM, **switches: Any) -> LlamaConfig:
    """Of 4 heads; what reads the weights' shapes is not asked."""
    config = named_shape("llama3-8b")
    return replace(config, rope=rope, head_dim=head_dim, **switches)


@pytest.mark.parametrize("head_dim", [DIM, DIM + 4])
@pytest.mark.parametrize("condense", [1.0, 2.5])
@pytest.mark.parametrize("method", METHODS)
def test_scores_are_the_mean_over_all_pairs(
    method: str, condense: float, head_dim: int
) -> None:
    random = np.random.default_rng(0)
    q = random.standard_normal((7, 2, 4, head_dim))  # positions, layers, heads
    k = random.standard_normal((9, 2, 2, head_dim))
    scaling, wanted = METHODS[method]
    f, attention = wanted()
    rope = Rope(theta=1e4, rotary_dim=DIM, scaling=scaling, condense=condense)
    means = Means(q.mean(0), k.mean(0))
    got = scores_at(means, model(rope, head_dim), DISTANCES, length=LENGTH)
    assert got.shape == (len(DISTANCES), 2, 4)
    for row, distance in zip(got, DISTANCES, strict=True):
        here = turned(k, 3, f / condense, attention)
        there = turned(q, 3 + distance, f / condense, attention)
        for head in range(4):
            pairs = np.einsum("ilh,jlh->ijl", there[:, :, head], here[:, :, head // 2])
            want = pairs.mean((0, 1)) / np.sqrt(head_dim)
            np.testing.assert_allclose(row[:, head], want, atol=1e-9)


def test_queries_and_keys_are_pytorch_s() -> None:
    """Before they are rotated, averaged over positions, heads apart; windows too."""
    tiny = make_tiny_hf(bias=True)
    config = config_from_hf(tiny.config)
    params = nest(jax.tree.map(jnp.asarray, tiny.weights))
    text = np.random.default_rng(0).integers(0, 61, 100)
    got = mean_queries_and_keys(params, config, [text], 32)
    seen: dict[str, list[np.ndarray]] = {"q_proj": [], "k_proj": []}
    for layer in tiny.model.model.layers:
        for name, found in seen.items():
            getattr(layer.self_attn, name).register_forward_hook(
                lambda _m, _i, y, found=found: found.append(y.double().numpy())
            )
    for at in (0, 32, 64):
        tiny.model(torch.as_tensor(text[None, at : at + 32]))
    for values, (name, heads) in zip(got, (("q_proj", 4), ("k_proj", 2)), strict=True):
        want = np.stack(seen[name]).reshape(3, 2, 32, heads, 16).mean((0, 2))
        np.testing.assert_allclose(values, want, atol=2e-6)


def test_a_record_has_the_mean_and_the_spread_over_heads() -> None:
    random = np.random.default_rng(1)
    means = Means(random.standard_normal((2, 4, 8)), random.standard_normal((2, 2, 8)))
    rope = Rope(theta=1e4, rotary_dim=8)
    record = describe(means, model(rope), 500)
    assert record["distances"][0] == 1 and record["distances"][-1] == 500
    each = scores_at(means, model(rope), record["distances"]).reshape(-1, 8)
    np.testing.assert_allclose(record["scores"], each.mean(1))
    np.testing.assert_allclose(record["low"], np.percentile(each, 10, axis=1))
    np.testing.assert_allclose(record["high"], np.percentile(each, 90, axis=1))


def test_each_layer_has_its_own_rope_window_and_scale() -> None:
    random = np.random.default_rng(2)
    q, k = random.standard_normal((2, 3, 4, DIM))
    switches: dict[str, Any] = {
        "num_hidden_layers": 3,
        "windows": (None, 40, None),
        "rotary": (True, True, False),
        "local_rope": Rope(theta=100.0, rotary_dim=DIM),
        "attention_scale": 0.3,
    }
    config = model(Rope(theta=1e4, rotary_dim=DIM), **switches)
    got = scores_at(Means(q, k), config, DISTANCES)
    for row, distance in zip(got, DISTANCES, strict=True):
        for layer, theta in enumerate((1e4, 100.0, None)):
            f = (
                np.zeros(DIM // 2)
                if theta is None
                else reference.default(DIM, theta)[0]
            )
            there = turned(q[layer], 7 + distance, f, 1.0)
            want = 0.3 * (there * turned(k[layer], 7, f, 1.0)).sum(-1)
            want = np.full(4, np.nan) if layer == 1 and distance >= 40 else want
            np.testing.assert_allclose(row[layer], want, atol=1e-9)
    record = describe(Means(q, k), config, 500)
    assert record["distances"][-1] == 500
    seen = scores_at(Means(q, k), config, [500])[0, [0, 2]]
    assert record["scores"][-1] == pytest.approx(seen.mean())
    windowed = replace(config, windows=(8, 40, 20))
    assert describe(Means(q, k), windowed, 500)["distances"][-1] == 39


def test_a_short_text_is_an_error() -> None:
    with pytest.raises(JropeError, match="text: got 5 tokens, want at least 32"):
        mean_queries_and_keys(
            {}, config_from_hf(make_tiny_hf().config), [np.arange(5)], 32
        )
