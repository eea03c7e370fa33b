"""Every method with real parameters, in our words and in those of a config.json."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from jrope.rope import (
    DynamicNTK,
    DynamicYarn,
    Linear,
    Llama3,
    LongRope,
    NTKAware,
    Proportional,
    Rope,
    Yarn,
)

ULP = 2.0**-23  # of float32: the spacing of [1, 2), and the largest relative spacing


class Case(NamedTuple):
    """One configuration: our method, and the words of a config.json for the same."""

    method: Any
    parameters: dict[str, Any]
    max_position_embeddings: int
    head_dim: int = 128

    @property
    def trained(self) -> int:
        """The last length before anything changes: O where there is one, else M."""
        key = "original_max_position_embeddings"
        return self.parameters.get(key, self.max_position_embeddings)

    def rope(self, **fields: Any) -> Rope:
        """Our description of the case."""
        share = self.parameters.get("partial_rotary_factor", 1.0)
        if self.parameters["rope_type"] == "proportional":
            share = 1.0  # it has its own meaning there
        theta, rotary_dim = self.parameters["rope_theta"], int(self.head_dim * share)
        return Rope(theta=theta, rotary_dim=rotary_dim, scaling=self.method, **fields)

    def truth(self, length: int) -> reference.Frequencies:
        """Frequencies and scaling from the papers."""
        known = self.parameters, self.max_position_embeddings, self.head_dim
        return reference.from_hf(*known, length)


def hf(rope_type: str, theta: float = 10000.0, **fields: Any) -> dict[str, Any]:
    """A `rope_parameters` dictionary; `original` is short for the long key."""
    if original := fields.pop("original", None):
        fields["original_max_position_embeddings"] = original
    return {"rope_type": rope_type, "rope_theta": theta, **fields}


def _divisors(pairs: int, last: float) -> tuple[float, ...]:
    return tuple(
        round(1 + (last - 1) * (i / (pairs - 1)) ** 2, 3) for i in range(pairs)
    )


def _longrope(dim: int, last: float, length: int, max_length: int, **f: Any) -> Case:
    lists: dict[str, Any] = {
        "short_factor": _divisors(dim // 2, 1.5),
        "long_factor": _divisors(dim // 2, last),
    }
    theta = f.pop("theta", 10000.0)
    given: dict[str, Any] = {"factor": max_length / length, **f}
    method = LongRope(**lists, original_length=length, **given)
    lists = {name: list(values) for name, values in lists.items()}
    return Case(
        method, hf("longrope", theta, **lists, original=length, **f), max_length, dim
    )


def _yarn(dim: int, theta: float, length: int, factor: float, **f: Any) -> Case:
    method = Yarn(factor=factor, original_length=length, **f)
    parameters = hf("yarn", theta, factor=factor, original=length, **f)
    return Case(method, parameters, int(length * factor), dim)


def _dynamic_yarn(
    dim: int, theta: float, length: int, tuned: float = 1.0, **f: Any
) -> Case:
    method = DynamicYarn(original_length=length, factor=tuned, **f)
    parameters = hf("dynamic-yarn", theta, original=length, finetuned=tuned > 1, **f)
    return Case(method, parameters, int(length * tuned), dim)


def _llama3(dim: int, factor: float, length: int, low: float, high: float) -> Case:
    ends = {"low_freq_factor": low, "high_freq_factor": high}
    method = Llama3(factor=factor, original_length=length, **ends)
    parameters = hf("llama3", 500000.0, factor=factor, original=length, **ends)
    return Case(method, parameters, 131072, dim)


CASES: dict[str, list[Case]] = {
    "default": [
        Case(None, hf("default"), 4096),  # Llama 2
        Case(None, hf("default", 500000.0), 8192),  # Llama 3
        Case(None, hf("default", 1000000.0), 32768, 96),
        Case(None, hf("default"), 2048, 64),
        Case(None, hf("default"), 256, 8),
    ],
    "linear": [
        Case(Linear(factor=8), hf("linear", factor=8.0), 16384),  # LongChat
        Case(Linear(factor=3), hf("linear", 500000.0, factor=3.0), 2048, 64),
        Case(Linear(factor=2.5), hf("linear", 1e6, factor=2.5), 4096, 96),
        Case(
            Linear(factor=2),
            hf("linear", factor=2.0, partial_rotary_factor=0.5),
            2048,
            64,
        ),
    ],
    "ntk": [
        Case(NTKAware(factor=4), hf("ntk", factor=4.0), 4096),
        Case(NTKAware(factor=2.5), hf("ntk", 1e6, factor=2.5), 4096, 64),
        Case(NTKAware(factor=8), hf("ntk", 500000.0, factor=8.0), 256, 8),
    ],
    "dynamic": [
        Case(
            DynamicNTK(factor=2, original_length=4096),
            hf("dynamic", factor=2.0),
            4096,
        ),
        Case(
            DynamicNTK(factor=4, original_length=2048),
            hf("dynamic", 500000.0, factor=4.0),
            2048,
            64,
        ),
        Case(
            DynamicNTK(factor=1.7, original_length=3000),
            hf("dynamic", 1e6, factor=1.7),
            3000,
            96,
        ),
        Case(
            DynamicNTK(factor=3, original_length=256),
            hf("dynamic", factor=3.0, partial_rotary_factor=0.25),
            256,
            32,
        ),
    ],
    "yarn": [
        _yarn(128, 10000.0, 4096, 32.0),  # Yarn-Llama-2-128k
        _yarn(128, 1e6, 32768, 4.0),  # Qwen 2.5
        _yarn(64, 10000.0, 4096, 40.0, mscale=0.707, mscale_all_dim=0.707),
        _yarn(64, 10000.0, 4096, 40.0, mscale=1.2, mscale_all_dim=0.8),
        _yarn(64, 10000.0, 4096, 40.0, mscale=0.5),  # alone it is not read
        _yarn(64, 150000.0, 4096, 32.0, truncate=False),  # gpt-oss
        _yarn(96, 500000.0, 8192, 4.0, attention_factor=1.25),
        _yarn(96, 10000.0, 2048, 3.0, beta_fast=16.0, beta_slow=2.0),
        _yarn(8, 10000.0, 64, 2.0),  # all pairs on the ramp or past it
        _yarn(64, 10000.0, 65536, 2.0),  # the ramp would end past the last pair
        _yarn(64, 10.0, 1000, 2.0),  # and past the last channel
        _yarn(8, 10000.0, 6, 2.0),  # no ramp: a step
        Case(  # factor inferred: M / O
            Yarn(factor=16.0, original_length=4096),
            hf("yarn", factor=None, original=4096),
            65536,
        ),
    ],
    "dynamic-yarn": [
        _dynamic_yarn(128, 10000.0, 4096),
        _dynamic_yarn(64, 500000.0, 8192, 4.0),  # tuned at four times its length
        _dynamic_yarn(96, 1e6, 3000, 1.5, beta_fast=16.0, beta_slow=2.0),
        _dynamic_yarn(8, 10000.0, 64),
    ],
    "llama3": [
        _llama3(128, 8.0, 8192, 1.0, 4.0),  # Llama 3.1
        _llama3(64, 32.0, 8192, 1.0, 4.0),  # Llama 3.2 1B
        _llama3(96, 4.0, 4096, 1.5, 6.0),
    ],
    "longrope": [
        _longrope(96, 64.0, 4096, 131072),  # Phi-3-mini-128k; factor inferred
        _longrope(128, 12.0, 8192, 32768, factor=3.0, theta=500000.0),
        _longrope(64, 40.0, 2048, 65536, attention_factor=1.19),
        _longrope(8, 5.0, 256, 256),  # M = O: no scaling of attention
    ],
    "proportional": [
        Case(
            Proportional(partial_rotary_factor=0.25),
            hf("proportional", 1e6, partial_rotary_factor=0.25),
            131072,
        ),
        Case(
            Proportional(partial_rotary_factor=0.6, factor=3),
            hf("proportional", factor=3.0, partial_rotary_factor=0.6),
            4096,
            96,
        ),
        Case(Proportional(), hf("proportional"), 4096, 64),
    ],
}


def each(cases: dict[str, list[Case]]) -> Any:
    """Parametrize over a table of cases, with names such as yarn-2."""
    rows = [(f"{k}-{i}", case) for k in cases for i, case in enumerate(cases[k])]
    return pytest.mark.parametrize(
        "case", [c for _, c in rows], ids=[n for n, _ in rows]
    )


LENGTH_CASES = {k: CASES[k] for k in ("dynamic", "dynamic-yarn", "longrope")}
FIRST_CASES = {name: cases[:1] for name, cases in CASES.items()}
FIXED_CASES = {k: v for k, v in CASES.items() if k not in LENGTH_CASES}
NOT_HF = ("ntk", "dynamic-yarn")  # what transformers does not have
HF_CASES = {k: v for k, v in CASES.items() if k not in NOT_HF}


def sample(last: int, count: int = 400) -> np.ndarray:
    """Positions below `last`: both ends, the powers of two and random ones."""
    powers = 2 ** np.arange(last.bit_length() - 1)
    edges = np.concatenate([np.arange(4), powers - 1, powers, last - 1 - np.arange(4)])
    random = np.random.default_rng(0).integers(0, last, count - edges.size)
    return np.concatenate([edges, random]).astype(np.int32)


def plain(**fields: Any) -> Rope:
    """A small rope for tests that are not about methods."""
    defaults: dict[str, Any] = {"theta": 10000.0, "rotary_dim": 16}
    return Rope(**(defaults | fields))


def random_array(*shape: int, seed: int = 0) -> jax.Array:
    """Normal random numbers, float32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def assert_same(left: Any, right: Any) -> None:
    """Bit for bit, over pairs of arrays."""
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def errors(got: Any, want: Any) -> np.ndarray:
    """|got - want| in float64, cos and sin stacked: [2, ...]."""
    return np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))


def lengths_of(case: Case) -> list[int]:
    """Below, at and past the trained length, and far past it."""
    return [case.trained - 1, case.trained, case.trained + 1, 131072]


class HFTable(NamedTuple):
    """What LlamaRotaryEmbedding computes."""

    inv_freq: np.ndarray
    scaling: float
    cos: np.ndarray
    sin: np.ndarray


def hf_table(case: Case, positions: np.ndarray, length: int) -> HFTable:
    """A new module per call, for it remembers; it takes n from the largest position."""
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    module = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=case.head_dim,
            head_dim=case.head_dim,
            num_attention_heads=1,
            max_position_embeddings=case.max_position_embeddings,
            rope_parameters=dict(case.parameters),
        )
    )
    known = torch.tensor([[*positions.tolist(), length - 1]])
    cos, sin = (x[0, :-1].numpy() for x in module(torch.zeros(1), known))
    pairs = cos.shape[-1] // 2
    np.testing.assert_array_equal(cos[:, :pairs], cos[:, pairs:])
    inv_freq, scaling = module.inv_freq.numpy(), float(module.attention_scaling)
    return HFTable(inv_freq, scaling, cos[:, :pairs], sin[:, :pairs])


BAD_NUMBERS = [0, -1, float("nan"), float("inf"), True, "4", None, 1j]
ONES = (1.0,) * 8
LISTS: dict[str, Any] = {
    "short_factor": ONES,
    "long_factor": ONES,
    "original_length": 64,
}
