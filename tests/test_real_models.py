"""Trained weights: a published text, and a 135M model token for token.

The folders are not part of the repository.  stories260K is looked for in
JROPE_STORIES260K or beside the repository; SmolLM2-135M-Instruct in JROPE_SMOLLM2, and
its variants, in several files and with an older config.json, beside it.
"""

import os
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

from jrope.generation.run import generate, stream
from jrope.hf.checkpoint import load
from jrope.parity import compare
from jrope.tree import flatten

NEIGHBOUR = Path(__file__).parents[2] / "shared" / "data" / "stories260K"
STORIES = Path(os.environ.get("JROPE_STORIES260K") or NEIGHBOUR)
SMOLLM2 = os.environ.get("JROPE_SMOLLM2", "")

needs_stories = pytest.mark.skipif(
    not STORIES.is_dir(),
    reason="no stories260K folder: set JROPE_STORIES260K to one",
)

# What the model's page shows for temperature 0: 256 tokens.
PUBLISHED = """\
Once upon a time, there was a little girl named Lily. She loved to play outside in \
the park. One day, she saw a big, red ball. She wanted to play with it, but it was too \
high.
Lily's mom said, "Lily, let's go to the park." Lily was sad and didn't know what to \
do. She said, "I want to play with your ball, but I can't find it."
Lily was sad and didn't know what to do. She said, "I'm sorry, Lily. I didn't know \
what to do."
Lily didn't want to help her mom, so she said, "I'm sorry, mom. I didn't know what to \
do." Her mom said, "Don't worry, Lily. We can help you."""


@needs_stories
def test_stories_are_the_published_ones() -> None:
    params, config = load(STORIES, "float32")
    bos = [[config.bos_token_id]]
    out = generate(params, bos, config=config, max_new_tokens=256, stop_ids=[])
    story = out.tokens[0].tolist()
    assert AutoTokenizer.from_pretrained(STORIES).decode(story) == PUBLISHED


@needs_stories
def test_stories_in_a_stream() -> None:
    """Block by block, decoded as a reader sees it grow."""
    params, config = load(STORIES, "float32")
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    ids, text = list[int](), ""
    for block in stream(params, [[1]], config=config, max_new_tokens=256):
        ids += block[0].tolist()
        text = tokenizer.decode(ids)
        assert text and PUBLISHED.startswith(text)
    assert text == PUBLISHED


# --- SmolLM2-135M-Instruct

DIARY = "".join(
    f"Day {day}. The wind came from the north again, and we kept {day + 3} miles off "
    "the coast. In the afternoon the cook caught a fish as long as his arm; nobody "
    "could say what kind it was, but it was eaten to the last bone. The captain wrote "
    "in his book that the glass was falling, and had the boats tied down.\n"
    for day in range(1, 11)
)
TEXTS = (
    "The capital of France is",
    "Write a short poem about the sea.\n\nThe sea",
    f"{DIARY}Day 11.",
)
NEW = 64


def folder(variant: str) -> Path:
    path = Path(SMOLLM2 + variant)
    if not path.is_dir():
        pytest.skip(f"no folder {path.name} beside the model")
    return path


@cache
def transformers_answers() -> tuple[list[list[int]], list[list[int]]]:
    """Ids of the prompts, and what PyTorch says in float32, one prompt at a time."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    model = LlamaForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32).eval()
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=NEW, eos_token_id=2, pad_token_id=2
    )
    answers: list[list[int]] = []
    for ids in prompts:
        given = torch.tensor([ids])
        mask = torch.ones_like(given)
        out = model.generate(given, attention_mask=mask, generation_config=settings)
        answers.append(out[0, len(ids) :].tolist())
    return prompts, answers


@pytest.mark.slow
def test_smollm2_says_what_transformers_says() -> None:
    """Three prompts in one batch, one of them longer than 512 tokens."""
    params, config = load(folder(""), "float32")
    prompts, want = transformers_answers()
    lengths = np.array([len(ids) for ids in prompts])
    assert lengths.max() > 512
    rows = np.array([ids + [0] * (lengths.max() - len(ids)) for ids in prompts])
    out = generate(params, rows, lengths, config=config, max_new_tokens=NEW)
    for tokens, length, answer in zip(out.tokens, out.lengths, want, strict=True):
        assert tokens[: int(length)].tolist() == answer


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["-sharded", "-legacy"])
def test_smollm2_s_variants_are_one_model(variant: str) -> None:
    """Equal numbers and an equal configuration, hence equal text."""
    (params, config), (other, twin) = load(folder("")), load(folder(variant))
    assert twin == config
    assert flatten(other).keys() == flatten(params).keys()
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, other))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_s_parity_table_is_clean(dtype: str) -> None:
    ids: Any = transformers_answers()[0][2]
    report = compare(folder(""), dtype=dtype, tokens=ids)
    print(report.table())
    assert report.ok, report.table()
