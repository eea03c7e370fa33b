"""How `jrope generate` tells what came of it."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jrope.cli.text import Answer


@dataclass
class Timing:
    """Seconds: of loading, while other things were done; then since the weights."""

    load: float
    first: float | None = None
    total: float = 0.0
    early: int = 0  # tokens that came with the first block

    def rate(self, tokens: int) -> float | None:
        """Tokens a second after the first ones."""
        since = self.total - (self.first or 0.0)
        return (tokens - self.early) / since if tokens > self.early else None


def print_texts(prompts: Sequence[str], answers: Sequence[Answer]) -> None:
    """Every answer under a line with the beginning of its prompt."""
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        head = " ".join(prompt.split())
        head = head if len(head) <= 60 else head[:57] + "..."
        print(f"[{i}/{len(prompts)}] {head}\n{answer.text}")


def print_figures(
    lengths: np.ndarray, answers: Sequence[Answer], timing: Timing
) -> None:
    """One line on standard error: how much, how fast, on what."""
    new = sum(answer.count for answer in answers)
    rate = timing.rate(new)
    parts = [
        f"{lengths.sum()} prompt tokens",
        f"{new} new tokens",
        "" if timing.first is None else f"first after {timing.first:.2f} s",
        "" if rate is None else f"then {rate:.1f} tokens/s",
        f"weights loaded in {timing.load:.2f} s",
        _device(),
    ]
    print(f"[{', '.join(part for part in parts if part)}]", file=sys.stderr)


def _device() -> str:
    """Such as "NVIDIA H100" or "cpu (2 cores)"."""
    kind = jax.devices()[0].device_kind
    return f"{kind} ({os.cpu_count()} cores)" if kind == "cpu" else kind


def print_json(
    folder: str,
    prompts: Sequence[str],
    lengths: np.ndarray,
    answers: Sequence[Answer],
    timing: Timing,
) -> None:
    """Everything as one JSON object on standard output."""
    rows = zip(prompts, lengths.tolist(), answers, strict=True)
    report = {
        "model": folder,
        "device": _device(),
        "answers": [
            {
                "prompt": prompt,
                "text": answer.text,
                "prompt_tokens": length,
                "new_tokens": answer.count,
                "finish": answer.finish,
            }
            for prompt, length, answer in rows
        ],
        "load_seconds": timing.load,
        "first_token_seconds": timing.first,
        "tokens_per_second": timing.rate(sum(answer.count for answer in answers)),
    }
    print(json.dumps(report, indent=2, ensure_ascii=False))
