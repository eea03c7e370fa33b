"""The tokenizer that a GGUF file describes, rebuilt and saved by transformers.

A GGUF file names the rule that splits text before merging (`tokenizer.ggml.pre`), but
does not hold it.  A tokenizer with another rule would be silently wrong, so only rules
that we can set or check are written; for others there is a note and no tokenizer.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _common import note

DIGITS = ("smollm", "starcoder", "refact", "command-r")  # each digit by itself, GPT-2
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")  # digits in threes
PLAIN = ("gpt-2",)
PROBE = "ab 12345"
SPLITS = {LLAMA3: ["ab", "Ġ", "123", "45"], PLAIN: ["ab", "Ġ12345"]}


def save_tokenizer(path: Path, values: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the tokenizer's files to a folder, or tell why not.

    Args:
      path: the GGUF file.
      values: its metadata.
      folder: where to write.

    Returns:
      The files; none if the tokenizer cannot be rebuilt faithfully.
    """
    model = values["tokenizer.ggml.model"]
    if model is None:
        note(f"{path.name} holds no tokenizer")
        return []
    try:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        problem = _set_splitting(tokenizer, model, values["tokenizer.ggml.pre"])
        if problem is None:
            tokenizer.save_pretrained(folder)
            return sorted(folder.iterdir())
    except Exception as error:  # transformers absent, or unable to rebuild it
        problem = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    note(f"tokenizer not written, copy the original's files ({problem})")
    return []


def _set_splitting(tokenizer: Any, model: str, rule: str | None) -> str | None:
    """Make the tokenizer split as the file says; returns what is wrong, if anything."""
    if model == "llama":  # sentencepiece does not split
        return None
    backend = tokenizer.backend_tokenizer
    if rule in DIGITS:
        from tokenizers import pre_tokenizers

        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        return None
    wanted = next((split for rules, split in SPLITS.items() if rule in rules), None)
    if wanted is None:
        return f"the splitting rule {rule!r} is unknown"
    got = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(PROBE)]
    return None if got == wanted else f"rule {rule!r} splits {PROBE!r} into {got}"
