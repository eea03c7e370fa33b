"""Every family beside transformers' own class: folders, logits, tokens."""

import copy
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from checkpoint_helpers import assert_same_tensors, tensors_of
from family_helpers import (
    CASES,
    COUNT,
    TRAINED,
    build,
    config_json,
    torch_greedy,
    torch_logits,
)
from model_helpers import close

from jrope.generation.run import generate
from jrope.hf.checkpoint import load, save
from jrope.hf.families import FAMILIES
from jrope.model.config import parameter_shapes
from jrope.model.llama import forward, init_params
from jrope.model.scores import score
from jrope.parity import compare
from jrope.parity.comparison import REPEATS
from jrope.parity.report import Error
from jrope.sharding.axes import Axes, spec_of
from jrope.tree import flatten
from jrope.weights.fuse import fuse, unfuse
from jrope.weights.int8 import dequantize, quantize

NEW = 8
PROVENANCE = {"_name_or_path", "transformers_version", "dtype", "architectures"}
# One of each arithmetic: biases, norms of heads, factors, partial rotary, caps, ...
ROUNDINGS = ("qwen2", "qwen3", "granite", "phi3-longrope", "gemma2", "gemma3", "olmo3")
each = pytest.mark.parametrize("name", CASES)
_forward = jax.jit(forward, static_argnames=("config", "capacity", "logits"))


def some(*names: str) -> Any:
    return pytest.mark.parametrize("name", names)


@pytest.fixture(autouse=True, scope="module")
def quickly() -> Iterator[None]:
    """Compiling is what takes the time here."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def tokens_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(3, 61, shape, np.int32)


def says(ours: Any, theirs: Any) -> bool:
    """Whether they are the same; objects may hold more, such as defaults."""
    if isinstance(theirs, dict):
        return all(says(ours.get(key), value) for key, value in theirs.items())
    return ours == theirs


def test_every_family_is_built() -> None:
    assert {case.model_type for case in CASES.values()} == {*FAMILIES} - {"llama"}


@each
def test_folder_in_and_out(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    model = build(name)
    save(tmp_path / "out", model.params, model.config)
    assert_same_tensors(tensors_of(tmp_path / "out"), tensors_of(model.folder))
    assert load(tmp_path / "out")[1] == model.config
    told = config_json(tmp_path / "out")
    assert told["architectures"] == [type(model.torch).__name__]
    ours, theirs = (
        AutoConfig.from_pretrained(folder).to_dict()
        for folder in (tmp_path / "out", model.folder)
    )
    for key in {*theirs} - PROVENANCE:
        assert says(ours[key], theirs[key]), key


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in CASES), *((n, "bfloat16") for n in ROUNDINGS)],
)
def test_logits_inside_at_and_past_the_trained_length(name: str, dtype: str) -> None:
    """Of the largest in float32; in bfloat16 beside the errors of PyTorch's own."""
    model, repeats = build(name), 1 if dtype == "float32" else REPEATS
    starts = np.repeat([0, TRAINED - 8, TRAINED + 8, 9000], repeats)
    tokens = tokens_of(len(starts), COUNT + 3)
    places = starts[:, None] + np.arange(COUNT + 3, dtype=np.int32)[None, :]
    params = jax.tree.map(lambda x: x.astype(dtype), model.params)
    got = np.asarray(_forward(params, tokens, places, config=model.config)[0])
    rounded = copy.deepcopy(model.torch).to(getattr(torch, dtype))
    theirs = torch_logits(rounded, tokens, places)
    if dtype == "float32":
        close(got, theirs, 2e-5)
        return
    want = torch_logits(rounded.float(), tokens, places)
    ours, theirs = (Error.of(x, want).typical for x in (got, theirs))
    assert 1e-4 < theirs < 0.05 and ours <= 1.10 * theirs


@each
def test_tokens_are_those_of_transformers(name: str) -> None:
    """Ragged prompts, in one chunk; then a token at a time, far past the window."""
    model, prompt = build(name), tokens_of(2, COUNT)
    lengths, capacity = np.array([COUNT, 4], np.int32), COUNT + NEW
    prompt[1, 4:] = 0
    run = partial(_forward, model.params, config=model.config, logits="last")
    logits, cache = run(prompt, lengths=lengths, capacity=capacity)
    found: list[np.ndarray] = []
    for _ in range(NEW):
        found.append(np.asarray(jnp.argmax(logits, axis=-1), np.int32))
        logits, cache = run(found[-1][:, None], cache=cache)
    for row, length, got in zip(prompt, lengths, np.stack(found, 1), strict=True):
        assert got.tolist() == torch_greedy(model.torch, row[:length], NEW)


@some("qwen2-window")
def test_generate(name: str) -> None:
    model, prompt = build(name), tokens_of(1, COUNT)
    options: dict[str, Any] = {"max_new_tokens": NEW, "stop_ids": []}
    got = generate(
        model.params, prompt, config=model.config, prefill_chunk=4, **options
    )
    assert got.tokens[0].tolist() == torch_greedy(model.torch, prompt[0], NEW)


@some("granite", "gemma3")
def test_parity_command(name: str) -> None:
    """Multipliers, caps and windows are in every stage that it compares."""
    positions = ["0", "trained-8"]
    report = compare(build(name).folder, count=COUNT + 3, positions=positions)
    assert report.ok and report.figure > 0, report.table()
    assert all(stage.jrope.of_max <= 2e-5 for stage in report.stages)


@some("qwen3")
def test_weights_in_other_forms(name: str) -> None:
    model, tokens = build(name), tokens_of(1, COUNT)
    run = partial(_forward, tokens=tokens, config=model.config)
    plain = np.asarray(run(model.params)[0])
    joined = fuse(model.params, "in_out")
    close(run(joined)[0], plain)
    whole = flatten(model.params)
    for key, x in flatten(unfuse(joined, model.config)).items():
        assert np.array_equal(x, whole[key])
    small = quantize(model.params)
    close(run(small)[0], run(dequantize(small))[0], 1e-4)
    scores = score(model.params, tokens, config=model.config)
    want = jax.nn.log_softmax(plain[0, :-1])[np.arange(COUNT - 1), tokens[0, 1:]]
    close(scores[0], want, 1e-5)


@each
def test_fresh_parameters_have_its_shapes(name: str) -> None:
    model = build(name)
    fresh = jax.eval_shape(partial(init_params, config=model.config), jax.random.key(0))
    shapes = {key: x.shape for key, x in flatten(fresh).items()}
    assert shapes == parameter_shapes(model.config)
    assert shapes == {key: x.shape for key, x in flatten(model.params).items()}
    for key, shape in shapes.items():
        spec = spec_of(key, len(shape), Axes())
        assert len(spec) == len(shape)
        whole = r"norm\.weight|(o|down)_proj\.bias"
        assert any(spec) == (re.search(whole, key) is None)
