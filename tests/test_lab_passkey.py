"""The passkey test: how prompts are made, and which answers count."""

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_tiny_hf

from jrope.errors import JropeError
from jrope.hf import config_from_hf
from jrope.lab import memory, passkey
from jrope.lab.passkey import NEW, Passkeys, answer_passkeys, make_passkeys
from jrope.tree import nest

LENGTH = 900


def encode(text: str) -> list[int]:
    """One token a byte."""
    return [*text.encode()]


def text_of(prompt: np.ndarray) -> str:
    return bytes(prompt.tolist()).decode()


@pytest.mark.parametrize("depth", [0, 0.25, 0.5, 1])
def test_the_key_stands_where_it_should(depth: float) -> None:
    found = make_passkeys(encode, LENGTH, depth, 3)
    assert found.prompts.shape == (3, LENGTH - NEW)
    for prompt, key in zip(found.prompts, found.keys, strict=True):
        text = text_of(prompt)
        assert re.fullmatch("[0-9]{5}", key)
        needle = passkey.NEEDLE.format(key=key)
        assert text.count(needle) == 1 and text.count(key) == 2
        assert text.startswith(passkey.HEAD) and text.endswith(passkey.QUESTION)
        before, after = (
            len(part)
            for part in text[len(passkey.HEAD) : -len(passkey.QUESTION)].split(needle)
        )
        assert before / (before + after) == pytest.approx(depth, abs=0.15)
        assert before % len(passkey.FILLER) == 0 or after == 0
    assert len({*found.keys}) == 3


def test_trials_have_the_same_keys_at_every_depth_and_length() -> None:
    one = make_passkeys(encode, LENGTH, 0.5, 2)
    assert make_passkeys(encode, 2 * LENGTH, 1.0, 2).keys == one.keys
    assert make_passkeys(encode, LENGTH, 0.5, 2, seed=1).keys != one.keys


def test_any_text_may_be_the_filler() -> None:
    filler = np.frombuffer(b"call me Ishmael. " * 200, np.uint8).astype(np.int32)
    found = make_passkeys(encode, LENGTH, 0.5, 2, filler=filler, first=[7])
    assert found.prompts[:, 0].tolist() == [7, 7]
    assert "The grass" not in text_of(found.prompts[0])
    assert "me Ishmael. call me" in text_of(found.prompts[0])


def test_a_depth_outside_the_text_is_an_error() -> None:
    with pytest.raises(JropeError, match=r"depth: got 1.5, want a number from 0 to 1"):
        make_passkeys(encode, LENGTH, 1.5, 1)


def test_the_error_says_the_least_length() -> None:
    frame = passkey.HEAD + passkey.NEEDLE.format(key="12345") + passkey.QUESTION
    least = len(frame) + NEW
    message = f"context of {least - 1} tokens has no room .* want at least {least}"
    with pytest.raises(JropeError, match=message):
        make_passkeys(encode, least - 1, 0.5, 1)
    assert make_passkeys(encode, least, 0.5, 1).prompts.shape == (1, least - NEW)


def test_a_short_filler_is_an_error() -> None:
    with pytest.raises(JropeError, match="filler: got 5 tokens, want at least"):
        make_passkeys(encode, LENGTH, 0.5, 1, filler=np.arange(5))


def tiny() -> tuple[Any, Any]:
    model = make_tiny_hf(vocab_size=128, layers=1)
    return nest(jax.tree.map(jnp.asarray, model.weights)), config_from_hf(model.config)


def test_answers_are_read_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five prompts in batches of two: a model that finds all but the third key."""
    params, config = tiny()
    keys = ("11111", "22222", "33333", "44444", "55555")
    prompts = np.stack([np.full(40, 50 + i, np.int32) for i in range(5)])
    asked: list[np.ndarray] = []

    def generate(_: Any, batch: np.ndarray, **options: Any) -> Any:
        assert options["max_new_tokens"] == NEW
        asked.append(batch)
        told = [" 11111.", "22222 or", "33334", " 44444", "it is 55555\n"]
        rows = [encode(told[row[0] - 50]) for row in batch]
        tokens = np.array([r + [57] * (NEW - len(r)) for r in rows])  # more digits
        return SimpleNamespace(tokens=tokens, lengths=np.array([len(r) for r in rows]))

    monkeypatch.setattr(passkey, "generate", generate)
    told: list[int] = []
    found = answer_passkeys(
        params,
        config,
        Passkeys(prompts=prompts, keys=keys),
        lambda ids: bytes(ids).decode(),
        tokens_at_once=2 * (40 + NEW) + 1,
        progress=told.append,
    )
    assert found == [True, True, False, True, True]
    assert [batch.shape for batch in asked] == [(2, 40)] * 3
    assert sum(told) == 5 * (40 + NEW)


def test_a_real_model_is_asked() -> None:
    params, config = tiny()
    found = make_passkeys(encode, LENGTH, 0.5, 1)
    assert answer_passkeys(params, config, found, lambda ids: "no idea") == [False]


def test_prompts_past_the_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    params, config = tiny()
    monkeypatch.setattr(memory, "free_bytes", lambda: 1000)
    found = make_passkeys(encode, LENGTH, 0.5, 1)
    with pytest.raises(JropeError, match=r"passkey at 900 with 1 prompts .* are free"):
        answer_passkeys(params, config, found, str)
