"""generation_config.json: read as transformers' `generate` does."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from generate_helpers import NEW, model, prompts
from transformers import AutoModelForCausalLM

import jrope
from jrope.errors import JropeError
from jrope.generation.run import generate
from jrope.generation.sample import Sampler
from jrope.hf.generation import (
    new_tokens,
    read_generation_config,
    sampler_fields,
    unsupported,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _, params, config = model()
    return jrope.save(tmp_path_factory.mktemp("generation") / "m", params, config)


def write(folder: Path, **found: Any) -> dict[str, Any]:
    (folder / "generation_config.json").write_text(json.dumps(found))
    return read_generation_config(folder)


def theirs(folder: Path, ids: list[int], **options: Any) -> Any:
    """transformers' generate with this folder, as it stands."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    given = torch.tensor([ids])
    return loaded.generate(given, attention_mask=torch.ones_like(given), **options)


@pytest.mark.parametrize("penalty", [1.6, 0.8])
def test_greedy_tokens_are_those_of_transformers(folder: Path, penalty: float) -> None:
    """The temperature does not count without do_sample."""
    found = write(folder, repetition_penalty=penalty, temperature=0.1, top_p=0.2)
    assert sampler_fields(found) == {"repetition_penalty": penalty}
    _, params, config = model()
    sampler = Sampler(**sampler_fields(found))
    for ids in prompts()[:2]:
        options: dict[str, Any] = {"max_new_tokens": NEW, "stop_ids": []}
        out = generate(params, [ids], config=config, sampler=sampler, **options)
        plain = generate(params, [ids], config=config, **options)
        want = theirs(folder, ids, max_new_tokens=NEW, pad_token_id=0)
        assert out.tokens[0].tolist() == want[0, len(ids) :].tolist()
        assert (np.asarray(out.tokens) != np.asarray(plain.tokens)).any()


@pytest.mark.parametrize(
    "found",
    [
        {},
        {"repetition_penalty": 1.3},
        {"do_sample": False, "top_k": 3},
        {"do_sample": True},
        {"do_sample": True, "top_k": None, "temperature": 0.6, "top_p": 0.9},
        {"do_sample": True, "top_k": 0, "min_p": 0.2},
        {"do_sample": True, "top_k": 5, "repetition_penalty": 1.3},
    ],
)
def test_logits_are_warped_as_in_transformers(
    folder: Path, found: dict[str, Any]
) -> None:
    """The scores that the first token is drawn from, -inf where it cannot be."""
    ids, options = prompts()[0], {"return_dict_in_generate": True, "pad_token_id": 0}
    options |= {"output_scores": True, "output_logits": True, "max_new_tokens": 1}
    sampler = Sampler(**sampler_fields(write(folder, **found)))
    out = theirs(folder, ids, **options)
    logits, seen = jnp.asarray(out.logits[0].numpy()), np.zeros((1, 61), bool)
    seen[0, ids] = True
    got = sampler.warp(logits, jnp.asarray(seen))
    np.testing.assert_allclose(got, out.scores[0].numpy(), rtol=1e-6)


@pytest.mark.parametrize(
    ("sample", "fields"),
    [
        (None, {"repetition_penalty": 1.2}),
        (False, {"repetition_penalty": 1.2}),
        (True, {"repetition_penalty": 1.2, "temperature": 0.6, "top_p": 0.9}),
    ],
)
def test_sampling_asked_for_or_not(sample: bool | None, fields: dict[str, Any]) -> None:
    found = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.2}
    assert sampler_fields(found, sample=sample) == fields
    found["do_sample"] = True
    with_k = fields if sample is False else {**fields, "top_k": 50}
    if sample is None:
        with_k |= {"temperature": 0.6, "top_p": 0.9}
    assert sampler_fields(found, sample=sample) == with_k


def test_what_has_no_counterpart_is_named() -> None:
    idle = {"num_beams": 1, "min_new_tokens": 0, "suppress_tokens": [], "use_cache": 1}
    assert unsupported(idle) == []
    found = {**idle, "num_beams": 4, "suppress_tokens": [7], "typical_p": 0.9}
    assert unsupported(found) == ["num_beams", "suppress_tokens"]
    sampled = ["num_beams", "suppress_tokens", "typical_p"]
    assert unsupported({**found, "do_sample": True}) == sampled
    assert unsupported(found, sample=True) == sampled


def test_new_tokens_are_those_of_transformers(folder: Path) -> None:
    """max_new_tokens wins; max_length counts the prompt."""
    ids = prompts()[0]
    for fields in (
        {"max_new_tokens": 3},
        {"max_length": len(ids) + 5},
        {"max_new_tokens": 4, "max_length": 2},
    ):
        found = write(folder, **fields)
        want = theirs(folder, ids, pad_token_id=0, eos_token_id=None)
        assert new_tokens(found, len(ids)) == want.shape[1] - len(ids)
    assert new_tokens({}, 5) is None and new_tokens({"max_length": 5}, 9) == 1


def test_no_file_says_nothing(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == sampler_fields({}) == {}


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"do_sample": "yes"}, "do_sample: got 'yes', want true or false"),
        ({"temperature": "hot"}, "temperature: got 'hot', want a number"),
        ({"max_new_tokens": 0}, "max_new_tokens: got 0, want a positive integer"),
        ({"top_p": float("nan")}, "top_p: got nan, want a number"),
        (
            {"top_k": [5], "do_sample": 1},
            r"top_k: got \[5\], .*; do_sample: got 1, want",
        ),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, found: Any, message: str) -> None:
    with pytest.raises(JropeError, match=f"generation_config.json: {message}"):
        write(tmp_path, **found)
