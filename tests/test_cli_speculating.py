"""`jrope generate --speculate`: guesses from the text, and from a second folder."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cli_helpers import (
    ANSWER,
    CONFIG,
    SIZE,
    fail,
    make_weights,
    succeed,
    write_folder,
)
from cli_helpers import _no_compile_cache as _no_compile_cache
from cli_helpers import model as model

import jrope
from jrope.cli import generate
from jrope.cli.speculating import DraftFolder, speculation
from jrope.generation.guesser import PromptLookup


def test_words_of_the_flag() -> None:
    assert speculation("prompt") == PromptLookup()
    assert speculation("draft:a/b") == DraftFolder("a/b", 4)
    assert speculation("draft:a:b:12") == DraftFolder("a:b", 12)


@pytest.mark.parametrize("word", ["prompt:", "prompt:x", "draft", "draft:", "both:2"])
def test_other_words_are_refused(word: str, capsys: Any, model: Path) -> None:
    error = fail(capsys, "generate", model, "x", "--speculate", word)
    assert f"{word!r} is not prompt, draft:FOLDER, or such as prompt:7" in error


def test_a_draft_s_folder_guesses_what_the_model_says(
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    model: Path,
) -> None:
    seen: dict[str, Any] = {}

    def stream(*given: Any, **options: Any) -> Any:
        seen.update(options)
        return jrope.stream(*given, **options)

    monkeypatch.setattr(generate, "stream", stream)
    caplog.set_level(logging.WARNING, "jax")
    words = ("v", "--dtype", "bfloat16", "--speculate", f"draft:{model}:3")
    with jax.log_compiles():
        out, _ = succeed(capsys, "generate", model, *words)
    assert out == f"wx{ANSWER}\n"
    draft = seen["speculate"]
    assert isinstance(draft, jrope.Draft) and draft.tokens == 3
    assert draft.config == seen["config"]
    weight = draft.params["lm_head"]["weight"]
    assert weight.dtype.name == "bfloat16"
    want = make_weights()["lm_head.weight"]
    np.testing.assert_array_equal(np.asarray(weight, np.float32), want)
    lines = [record.getMessage() for record in caplog.records]
    begun = [line for line in lines if line.startswith("Compiling jit(decode_guess")]
    assert len(begun) == 1  # ahead, for shapes, and not again for the weights


def test_a_draft_of_another_vocabulary_is_one_line(
    capsys: Any, model: Path, tmp_path: Path
) -> None:
    more = {name: np.resize(w, (SIZE + 8, SIZE)) for name, w in make_weights().items()
            if w.shape == (SIZE, SIZE)}  # fmt: skip
    folder = tmp_path / "draft"
    config = {**CONFIG, "vocab_size": SIZE + 8}
    write_folder(folder, config, {**make_weights(), **more}.items())
    error = fail(capsys, "generate", model, "x", "--speculate", f"draft:{folder}")
    assert error.endswith(
        f"the draft has a vocabulary of {SIZE + 8}, the model one of {SIZE}; give a "
        "draft that shares the model's tokenizer"
    )


def test_a_draft_that_is_not_there_is_one_line(capsys: Any, model: Path) -> None:
    error = fail(capsys, "generate", model, "x", "--speculate", "draft:/no/such:2")
    assert "no folder /no/such" in error
