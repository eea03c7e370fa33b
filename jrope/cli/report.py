"""How `jrope generate` tells what came of it."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from jrope.cli.terminal import warn
from jrope.cli.text import Answer
from jrope.generation.sample import Sampler
from jrope.rope import Rope, describe
from jrope.sharding.meshes import mesh_text


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
    lengths: np.ndarray,
    answers: Sequence[Answer],
    timing: Timing,
    rope: Rope,
    device: str,
) -> None:
    """One line on standard error: how much, how fast, with which rope, on what."""
    new = sum(answer.count for answer in answers)
    rate = timing.rate(new)
    parts = [
        f"{lengths.sum()} prompt tokens",
        f"{new} new tokens",
        "" if timing.first is None else f"first after {timing.first:.2f} s",
        "" if rate is None else f"then {rate:.1f} tokens/s",
        f"weights loaded in {timing.load:.2f} s",
        f"rope {describe(rope)}",
        device,
    ]
    print(f"[{', '.join(part for part in parts if part)}]", file=sys.stderr)


def device_text(mesh: Mesh | None) -> str:
    """Such as "NVIDIA H100", "cpu (2 cores)" or "NVIDIA H100, mesh model=4"."""
    kind = jax.devices()[0].device_kind
    kind = f"{kind} ({os.cpu_count()} cores)" if kind == "cpu" else kind
    return kind if mesh is None else f"{kind}, mesh {mesh_text(mesh.shape)}"


def print_json(
    folder: str,
    prompts: Sequence[str],
    lengths: np.ndarray,
    answers: Sequence[Answer],
    timing: Timing,
    rope: Rope,
    sampler: Sampler,
    device: str,
) -> None:
    """Everything as one JSON object on standard output."""
    rows = zip(prompts, lengths.tolist(), answers, strict=True)
    report = {
        "model": folder,
        "device": device,
        "rope": describe(rope),
        "sampler": asdict(sampler),
        "answers": [
            {
                "prompt": prompt,
                "text": answer.text,
                "prompt_tokens": length,
                "new_tokens": answer.count,
                "finish": answer.finish,
                "finite": answer.finite,
            }
            for prompt, length, answer in rows
        ],
        "load_seconds": timing.load,
        "first_token_seconds": timing.first,
        "tokens_per_second": timing.rate(sum(answer.count for answer in answers)),
    }
    print(json.dumps(report, indent=2, ensure_ascii=False))


def tell_not_finite(answers: Sequence[Answer], dtype: str) -> int:
    """A line on standard error for each answer whose logits were not finite.

    Args:
      answers: of all prompts.
      dtype: of the activations.

    Returns:
      The exit status: 0 where all were finite, else 1.
    """
    # Loading refuses weights that are not finite, hence something has overflowed.
    remedy = "--dtype bfloat16 has the range of float32"
    if dtype != "float16":
        remedy = f"the weights overflow even {dtype}: take another checkpoint"
    bad = [i for i, answer in enumerate(answers, 1) if not answer.finite]
    for i in bad:
        which = f"answer {i} of {len(answers)}"
        warn(f"{which} means nothing: its logits hold NaN or infinity; {remedy}")
    return 1 if bad else 0
