"""The main claim: jrope computes what transformers computes.

A matrix of tiny random models, each method past its trained length, rows ragged.
"""

import dataclasses
import functools
import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_helpers import METHODS, TRAINED

from jrope.generation.run import generate
from jrope.hf import config_from_hf
from jrope.model.config import LlamaConfig
from jrope.model.llama import forward
from jrope.model.with_rope import with_rope
from jrope.parity import jrope_stages
from jrope.parity.report import Error, stage
from jrope.parity.torch_side import torch_stages
from jrope.rope import ROPE_TYPES
from jrope.tree import nest

LENGTHS = np.array([96, 40, 17])
KINDS = {"MHA": 4, "GQA": 2, "MQA": 1}  # key/value heads of 4
each_method = pytest.mark.parametrize("method", METHODS)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_tied = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
# Neither heads nor head know the method: all combinations in float32, of the rest every
# method and every model, and all of them where JROPE_ALL_PAIRS is set.
PAIRS = {(method, "GQA", False) for method in METHODS}
PAIRS |= {("yarn", kind, tied) for kind in KINDS for tied in (False, True)}
if os.environ.get("JROPE_ALL_PAIRS"):
    PAIRS = {*itertools.product(METHODS, KINDS, (False, True))}
each_pair = pytest.mark.parametrize(("method", "kind", "tied"), sorted(PAIRS))


@pytest.fixture(scope="module")
def make(tiny_hf: Any) -> Any:
    """(torch model, params, config) of a case; asked for again, the same one."""

    import torch

    @functools.cache
    def build(method: str, kind: str, tied: bool) -> tuple[Any, Any, LlamaConfig]:
        parameters, ours, _ = METHODS[method]
        tiny = tiny_hf(
            kv_heads=KINDS[kind],
            tied=tied,
            max_position_embeddings=TRAINED,
            rope_parameters=parameters,
        )
        torch.set_num_threads(1)  # two only wait for each other at this size
        config = config_from_hf(tiny.config)
        if method == "ntk":
            theta = dataclasses.replace(config.rope, theta=10000.0)
            config = dataclasses.replace(config, rope=theta)
        params = nest({name: jnp.asarray(w) for name, w in tiny.weights.items()})
        return tiny.model, params, with_rope(config, **ours)

    return build


def tokens(config: LlamaConfig, count: int, seed: int = 0) -> np.ndarray:
    shape = (len(LENGTHS), count)
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape, np.int32)


def torch_logits(model: Any, row: np.ndarray, condense: float) -> np.ndarray:
    """One sequence without padding, at positions 0, 1, ...: [T, V]."""
    steps = np.arange(row.size)[None]
    return torch_stages(model, row[None], steps, condense=condense)["logits"][0]


def valid(logits: Any) -> np.ndarray:
    """[B, T, V] -> the logits of valid tokens, [tokens, V]."""
    rows = zip(np.asarray(logits), LENGTHS, strict=True)
    return np.concatenate([row[:length] for row, length in rows])


def test_every_method_is_in_the_matrix() -> None:
    assert {*METHODS} == {"default", "condense", *ROPE_TYPES} - {"dynamic-yarn"}


@each_tied
@each_kind
@each_method
def test_logits_in_float32(make: Any, method: str, kind: str, tied: bool) -> None:
    model, params, config = make(method, kind, tied)
    ids, condense = tokens(config, 96), METHODS[method].condense
    got, _ = forward(params, jnp.asarray(ids), config=config, lengths=LENGTHS)
    rows = zip(ids, LENGTHS, strict=True)
    want = [torch_logits(model, row[:length], condense) for row, length in rows]
    error = Error.of(valid(got), np.concatenate(want))
    assert error.of_max <= 2e-5


@each_pair
def test_logits_in_bfloat16(make: Any, method: str, kind: str, tied: bool) -> None:
    import torch

    model, params, config = make(method, kind, tied)
    ids, condense = tokens(config, 96), METHODS[method].condense
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    # Compiled as a whole, where XLA is free to drop roundings between operations.
    run = jax.jit(forward, static_argnames=("config",))
    got, _ = run(params, jnp.asarray(ids), config=config, lengths=LENGTHS)
    narrow = rounded_twin(model, torch.bfloat16)
    runs = []
    for twin in (narrow, rounded_twin(narrow, torch.float32)):
        rows = zip(ids, LENGTHS, strict=True)
        runs += [[torch_logits(twin, row[:n], condense) for row, n in rows]]
    theirs, truth = (np.concatenate(r) for r in runs)
    judged = stage("logits", valid(got), truth, theirs)
    assert judged.ratio is not None and judged.ratio <= 1.10
    assert judged.torch is not None and judged.torch.rms < 0.05


def rounded_twin(model: Any, dtype: Any) -> Any:
    """A copy of a torch model with its weights in another dtype."""
    twin = type(model)(model.config).eval().to(dtype)
    weights = {name: w.to(dtype) for name, w in model.state_dict().items()}
    twin.load_state_dict(weights)
    return twin


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Greedy:
    """The likeliest token; compiles in a fraction of `Sampler`'s time."""

    temperature: float = 0.0

    def __call__(self, logits: jax.Array, keys: Any, seen: Any) -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


@each_pair
def test_greedy_tokens(make: Any, method: str, kind: str, tied: bool) -> None:
    """From past the trained length, across it, and inside."""
    model, params, config = make(method, kind, tied)
    lengths, new = np.array([40, 28, 11]), 10
    ids = tokens(config, 40, seed=1)
    out = generate(
        params,
        ids,
        lengths,
        config=config,
        sampler=Greedy(),
        max_new_tokens=new,
        stop_ids=(),
    )
    condense = METHODS[method].condense
    for row, length, got in zip(ids, lengths, np.asarray(out.tokens), strict=True):
        want = torch_greedy(model, row[:length], new, condense)
        np.testing.assert_array_equal(got, want)


def torch_greedy(
    model: Any, prompt: np.ndarray, new: int, condense: float
) -> list[int]:
    """A whole pass for each token, padded to the planned total.

    The padding makes transformers take jrope's length: prompt + new tokens.
    """
    row = np.concatenate([prompt, np.zeros(new, np.int32)])
    for at in range(prompt.size, row.size):
        row[at] = torch_logits(model, row, condense)[at - 1].argmax()
    return row[prompt.size :].tolist()


# torch's side of the comparison


def test_condensing_divides_torch_positions_too(make: Any) -> None:
    model, _, config = make("default", "GQA", False)
    ids, places = tokens(config, 8), np.tile(np.arange(8), (3, 1))
    halved = torch_stages(model, ids, places, condense=2.0)["logits"]
    even = torch_stages(model, ids, 2 * places, condense=4.0)["logits"]
    np.testing.assert_array_equal(halved, even)
    plain = torch_stages(model, ids, places)["logits"]
    assert np.abs(plain - halved).max() > 0.1


def test_gaps_do_not_part_sequences(make: Any) -> None:
    model, params, config = make("default", "GQA", False)
    ids = tokens(config, 8)
    places = np.tile(100 * np.arange(8), (3, 1))
    want = torch_stages(model, ids, places)["logits"]
    got = jrope_stages(params, config, ids, places.astype(np.int32))["logits"]
    assert Error.of(got, want).of_max <= 2e-5
    ids[:, 0] = 0  # a first token that later ones see
    assert np.abs(torch_stages(model, ids, places)["logits"] - want)[:, -1].max() > 1e-3


def test_torch_rows_have_no_memory(make: Any) -> None:
    model, _, config = make("dynamic", "GQA", False)
    ids = tokens(config, 8)
    places = np.stack([np.arange(8) + at for at in (200, 60, 0)])
    whole = torch_stages(model, ids, places)["logits"]
    for i in (2, 1, 0):
        alone = torch_stages(model, ids[i : i + 1], places[i : i + 1])["logits"]
        np.testing.assert_array_equal(alone[0], whole[i])
