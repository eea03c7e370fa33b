"""One small model and its requests, for the tests of generation."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from conftest import TinyHF, make_tiny_hf
from transformers import GenerationConfig

from jrope.generation import run as doors
from jrope.generation.loop import decode
from jrope.generation.run import Generation, generate, stream
from jrope.generation.sample import Sampler
from jrope.hf import config_from_hf
from jrope.model.config import LlamaConfig
from jrope.tree import nest

VOCABULARY = 61
# One bucket for nearly all tests: compiling is what takes the time.
NEW, WIDTH = 16, 18
LENGTHS = np.array([WIDTH, 1, 7])
PROMPT = np.random.default_rng(0).integers(0, VOCABULARY, (3, WIDTH))
PROMPT[np.arange(WIDTH) >= LENGTHS[:, None]] = -7  # anything may stand past the end
HOT = Sampler(temperature=1.3, top_p=0.97)
KEY = jax.random.key(5)

LONG = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0 + 0.1 * r for r in range(8)],
        "long_factor": [2.0 + 0.7 * r for r in range(8)],
    },
}

Model = tuple[TinyHF, dict[str, Any], LlamaConfig]


@cache
def model(rope: str | None = None, **fields: Any) -> Model:
    """The transformers model, our parameters, our configuration."""
    fields = {"vocab_size": VOCABULARY, **fields}
    tiny = make_tiny_hf(rope_parameters=LONG.get(rope or ""), **fields)
    tiny.model.generation_config = GenerationConfig(pad_token_id=0)
    params = nest({name: jnp.asarray(x) for name, x in tiny.weights.items()})
    return tiny, params, config_from_hf(tiny.config)


def run(prompt: Any = PROMPT, lengths: Any = LENGTHS, **options: Any) -> Generation:
    _, params, config = model()
    options = {"max_new_tokens": NEW, "stop_ids": [], **options}
    return generate(params, prompt, lengths, config=config, **options)


def blocks(**options: Any) -> list[np.ndarray]:
    _, params, config = model()
    options = {"max_new_tokens": NEW, "stop_ids": [], **options}
    return list(stream(params, PROMPT, LENGTHS, config=config, **options))


def prompts() -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(PROMPT, LENGTHS, strict=True)]


def transformers_greedy(ids: list[int], **options: Any) -> list[int]:
    given_ = torch.tensor([ids])
    out = model()[0].model.generate(
        given_,
        attention_mask=torch.ones_like(given_),
        generation_config=GenerationConfig(
            do_sample=False, max_new_tokens=NEW, pad_token_id=0, **options
        ),
    )
    return out[0, len(ids) :].tolist()


def torch_logprobs(tiny: TinyHF, ids: list[int]) -> np.ndarray:
    """log p(. | tokens up to t) [T, V] from one full pass, and nothing kept from it."""
    inner = tiny.model.model
    inner.rotary_emb = type(inner.rotary_emb)(tiny.model.config)  # no memory of lengths
    with torch.no_grad():
        logits = tiny.model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits.log_softmax(-1).numpy()


@cache
def greedy() -> np.ndarray:
    """Tokens without any stop: int32 [3, NEW]."""
    return np.asarray(run(logprobs=True).tokens)


def stops() -> list[int]:
    """The token that ends row 0 after a few steps, and one that ends row 2 later."""
    early = int(greedy()[0, 4])
    late = next(t for t in greedy()[2, 8:].tolist() if t != early)
    return [early, late]


def stopped(ids: list[int], pad: int) -> tuple[np.ndarray, list[int]]:
    """What should come of `greedy()`: rows cut behind the first stop, and lengths."""
    tokens, lengths = greedy().copy(), []
    for row in tokens:
        ends = np.flatnonzero(np.isin(row, ids))
        lengths.append(int(ends[0]) + 1 if ends.size else NEW)
        row[lengths[-1] :] = pad
    return tokens, lengths


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The columns that are filled after each call of `decode`."""
    seen: list[int] = []

    def watched(*args: Any, **options: Any) -> Any:
        cache, rows = decode(*args, **options)
        seen.append(int(rows.step))
        return cache, rows

    monkeypatch.setattr(doors, "decode", watched)
    return seen
