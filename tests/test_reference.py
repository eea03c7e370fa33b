"""The oracle against other oracles: mpmath, transformers, FastChat's own lines."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
from rope_cases import HF_CASES, Case, each, hf_table

TinyFactory = Callable[..., Any]


def test_tables_are_right_to_1e_12() -> None:
    """Fifty digits, at positions up to 2**24."""
    mpmath = pytest.importorskip("mpmath")
    positions = [0, 1, 257, 131071, 2**20 - 1, 2**24 - 1, 2**24]
    f, _ = reference.default(96, 500000.0)
    cos, sin = reference.table(f, 1.5, positions)
    with mpmath.workdps(50):
        exponents = [mpmath.mpf(-2 * i) / 96 for i in range(48)]
        exact = [mpmath.power(500000, e) for e in exponents]
        for row, p in enumerate(positions):
            want = [[1.5 * mpmath.cos(p * g), 1.5 * mpmath.sin(p * g)] for g in exact]
            got = np.stack([cos[row], sin[row]], -1)
            assert np.abs(got - np.array(want, float)).max() < 5e-12


@each(HF_CASES)
def test_frequencies_match_transformers(case: Case) -> None:
    """To float32: 3e-6, the worst that float32's rounded exponents and ramps do."""
    for length in (case.trained, case.trained + 1, 131072):
        theirs = hf_table(case, np.array([0]), length)
        f, scaling = case.truth(length)
        assert scaling == pytest.approx(theirs.scaling, rel=1e-14)
        np.testing.assert_allclose(theirs.inv_freq, f.astype(np.float64), rtol=4e-6)


def test_ntk_keeps_the_first_pair_and_stretches_the_last() -> None:
    plain, _ = reference.default(64, 10000.0)
    f, _ = reference.ntk(64, 10000.0, 8.0)
    assert f[0] == plain[0] == 1
    assert float(plain[-1] / f[-1]) == pytest.approx(8.0, rel=1e-15)
    assert (np.diff(plain / f) > 0).all()


@pytest.mark.parametrize("ratio", [1, 3, 8])
def test_fastchat_table_matches_its_lines(ratio: int) -> None:
    """The published constructor, line by line, in torch."""
    import torch

    inv_freq = 1.0 / (10000 ** (torch.arange(0, 64, 2).float() / 64))
    t = torch.arange(2048 * ratio, dtype=inv_freq.dtype) / ratio
    freqs = torch.einsum("i,j->ij", t, inv_freq)
    emb = torch.cat((freqs, freqs), dim=-1)
    got = reference.fastchat_table(64, ratio)
    for mine, theirs in zip(got, (emb.cos(), emb.sin()), strict=True):
        assert mine.dtype == np.float32 and mine.shape == (1, 1, 2048 * ratio, 64)
        same_frequency = 2.0**-23 * 2048  # where torch's power is 1 ulp off
        difference = np.abs(mine[0, 0] - theirs.numpy())
        assert difference.max() < same_frequency
        assert (difference <= 2.0**-24).mean() > 0.95


def test_fastchat_table_in_float64_is_the_linear_truth() -> None:
    f, scaling = reference.linear(64, 10000.0, 3.0)
    want = reference.table(f, scaling, np.arange(6144))
    got = reference.fastchat_table(64, 3, dtype=np.float64)
    for mine, truth in zip(got, want, strict=True):
        np.testing.assert_allclose(mine[0, 0, :, :32], truth, rtol=0, atol=1e-11)
        np.testing.assert_array_equal(mine[..., :32], mine[..., 32:])


def test_rotation_layouts_differ_by_a_permutation() -> None:
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 12))
    f, scaling = reference.default(8, 100.0)
    tables = reference.table(f, scaling, np.arange(10).reshape(2, 5))
    order = [0, 2, 4, 6, 1, 3, 5, 7, 8, 9, 10, 11]
    half = reference.rotate(x[..., order], *tables, "half")
    interleaved = reference.rotate(x, *tables, "interleaved")
    np.testing.assert_array_equal(half, interleaved[..., order])
    np.testing.assert_array_equal(half[..., 8:], x[..., 8:])
    norms = np.linalg.norm(half, axis=-1) / np.linalg.norm(x, axis=-1)
    np.testing.assert_allclose(norms, 1, rtol=1e-14)


def test_activations_match_transformers() -> None:
    import torch
    from transformers.activations import ACT2CLS, ACT2FN

    with_weights = {"prelu", "xielu"}  # no LLaMA has weights in its activation
    assert set(reference.ACTIVATIONS) == set(ACT2CLS) - with_weights
    x = np.linspace(-12, 12, 1001)
    for name, function in reference.ACTIVATIONS.items():
        want = ACT2FN[name](torch.from_numpy(x)).numpy()
        atol = 1e-6 if name in ("gelu_fast", "gelu_accurate") else 1e-13
        np.testing.assert_allclose(function(x), want, rtol=0, atol=atol, err_msg=name)


def arguments(config: dict[str, Any]) -> dict[str, Any]:
    """The plain numbers that `reference.forward` takes, from a config.json."""
    f, scaling = reference.from_hf(
        config["rope_parameters"],
        config["max_position_embeddings"],
        config["head_dim"],
        length=32,
    )
    return {
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_dim": config["head_dim"],
        "frequencies": f,
        "scaling": scaling,
        "eps": config["rms_norm_eps"],
        "activation": config["hidden_act"],
    }


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MODELS: list[dict[str, Any]] = [
    {"kv_heads": 4},
    {"kv_heads": 2, "tied": True, "rope_parameters": YARN},
    {"kv_heads": 1, "attention_bias": True, "rms_norm_eps": 0.1},
    {"mlp_bias": True, "hidden_act": "gelu_new"},
    {"head_dim": 24, "bias": True, "layers": 3, "hidden_act": "relu2"},
]


@pytest.mark.parametrize("fields", MODELS)
def test_forward_matches_transformers(
    tiny_hf: TinyFactory, fields: dict[str, Any]
) -> None:
    """Each stage, float64 against float32: a few thousand float32 roundings."""
    import torch

    model, weights, config = tiny_hf(**fields)
    tokens = np.random.default_rng(1).integers(0, 61, (2, 32))
    theirs = model(torch.from_numpy(tokens), output_hidden_states=True)
    ours = reference.forward(weights, tokens, **arguments(config))
    hidden = [*ours.hidden[:-2], ours.hidden[-1]]  # theirs: the last one normed only
    for got, want in zip(hidden, theirs.hidden_states, strict=True):
        np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=3e-5)
    np.testing.assert_allclose(ours.logits, theirs.logits.numpy(), rtol=0, atol=3e-5)
    assert ours.logits.std() > 0.5


def test_forward_rows_are_independent(tiny_hf: TinyFactory) -> None:
    """Ragged rows, each with its own frequencies, equal their single runs."""
    _, weights, config = tiny_hf()
    known = arguments(config)
    tokens = np.random.default_rng(1).integers(0, 61, (3, 16))
    lengths, starts = np.array([16, 9, 1]), np.array([0, 100, 7])
    rows = known.pop("frequencies") / np.array([[1], [2], [3]])
    places = np.arange(16) + starts[:, None]
    together = reference.forward(
        weights, tokens, frequencies=rows, positions=places, lengths=lengths, **known
    )
    for row, n in enumerate(lengths):
        one = slice(row, row + 1)
        alone = reference.forward(
            weights,
            tokens[one, :n],
            frequencies=rows[row],
            positions=places[one, :n],
            **known,
        )
        np.testing.assert_allclose(together.logits[one, :n], alone.logits, atol=1e-12)
    padded = tokens.copy()
    padded[1, 9:] = 0
    known |= {"frequencies": rows, "positions": places, "lengths": lengths}
    again = reference.forward(weights, padded, **known)
    np.testing.assert_array_equal(again.logits[1, :9], together.logits[1, :9])


def test_shifted_positions_change_nothing(tiny_hf: TinyFactory) -> None:
    """Attention sees distances only."""
    _, weights, config = tiny_hf()
    tokens = np.random.default_rng(1).integers(0, 61, (1, 16))
    here = reference.forward(weights, tokens, **arguments(config))
    far = np.arange(16)[None] + 2**20
    there = reference.forward(weights, tokens, positions=far, **arguments(config))
    np.testing.assert_allclose(here.logits, there.logits, rtol=0, atol=1e-10)
    torn = reference.forward(weights, tokens, positions=far**2, **arguments(config))
    assert np.abs(here.logits - torn.logits).max() > 0.1


def test_interleaved_layout_is_the_permuted_model(tiny_hf: TinyFactory) -> None:
    _, weights, config = tiny_hf()
    order = np.concatenate([np.arange(0, 16, 2), np.arange(1, 16, 2)])
    meta = dict(weights)
    for name, tensor in weights.items():
        if "q_proj" in name or "k_proj" in name:
            meta[name] = tensor.reshape(-1, 16, 64)[:, np.argsort(order)].reshape(
                -1, 64
            )
    tokens = np.arange(20)[None]
    half = reference.forward(weights, tokens, **arguments(config))
    other = reference.forward(meta, tokens, layout="interleaved", **arguments(config))
    np.testing.assert_allclose(half.logits, other.logits, rtol=0, atol=1e-12)


def test_tiny_models_are_reproducible(tiny_hf: TinyFactory) -> None:
    one, two, other = tiny_hf(tied=True), tiny_hf(tied=True), tiny_hf(tied=True, seed=1)
    assert one.config == two.config and one.config["tie_word_embeddings"]
    assert "lm_head.weight" not in one.weights
    assert "lm_head.weight" in tiny_hf().weights
    for name, tensor in one.weights.items():
        np.testing.assert_array_equal(tensor, two.weights[name])
        assert (tensor != other.weights[name]).any()
