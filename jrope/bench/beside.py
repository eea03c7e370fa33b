"""transformers on the rows of `jrope bench batch`, in a process of its own.

The process reads the model's shape and the rows as JSON, makes random weights on its
device, and has ended before jrope takes the device's memory.  It runs continuous
batching; on a CPU, and where that fails, static batches as well, left-padded, of rows
sorted by the lengths of their prompts.
"""

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeAlias, final

from jrope.batch.work import Work
from jrope.bench.runs import told
from jrope.bench.versus import import_peers, torch_device
from jrope.errors import JropeError
from jrope.hf import config_to_hf
from jrope.model.config import LlamaConfig

SIZES = (8, 16, 32, 64)  # rows of a static batch that are tried
PAGE = 256  # tokens of a block of transformers' cache
# On a CPU, where a mask of all tokens of a step over all blocks is made:
MOST_BLOCKS, MOST_TOKENS = 256, 2048
WARM = 64  # rows that run before the clock starts, with few new tokens

Row: TypeAlias = "tuple[list[int], int]"
"""A prompt, and how many new tokens it gets."""


@final
@dataclass(frozen=True, kw_only=True)
class Beside:
    """What one way of batching in transformers took.

    Args:
      by: the way, and its attention.
      rows: of a static batch; None: as many as transformers takes at once.
      tokens: new ones.
      seconds: for all rows, after warming up.
      problem: why there are none.
    """

    by: str
    rows: int | None = None
    tokens: int = 0
    seconds: float = 0.0
    problem: str | None = None

    @property
    def speed(self) -> float:
        """Useful tokens per second; 0 where it failed."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def line(self) -> str:
        """For people."""
        if self.problem is not None:
            return f"{self.by}: {self.problem}"
        size = "" if self.rows is None else f", {self.rows} rows at once"
        return (
            f"{self.by}{size}: {self.speed:.1f} useful tokens/s, {self.seconds:.2f} s"
        )


def beside(config: LlamaConfig, dtype: str, works: Sequence[Work]) -> list[Beside]:
    """All ways that were tried, the rows being those of `works`.

    Raises:
      JropeError: torch or transformers is not there, or all ways failed.
    """
    words = {**config_to_hf(config, dtype=dtype), "eos_token_id": None}
    rows = [(work.prompt.tolist(), work.max_new_tokens) for work in works]
    answer = _ask(json.dumps({"config": words, "dtype": dtype, "rows": rows}))
    if "problem" in answer:
        raise JropeError(answer["problem"])
    found = [Beside(**one) for one in answer["found"]]
    if not any(one.speed for one in found):
        problems = "; ".join(one.line() for one in found)
        raise JropeError(f"--versus: nothing worked: {problems}")
    return found


def _ask(text: str) -> dict[str, Any]:
    """What the process printed last."""
    done = subprocess.run(
        [sys.executable, "-m", "jrope.bench.beside"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )
    lines, last = done.stdout.splitlines(), done.stderr.splitlines()[-1:]
    if done.returncode or not lines:
        why = f"status {done.returncode} {' '.join(last)}".strip()
        raise JropeError(f"--versus: the process of transformers ended with {why}")
    return json.loads(lines[-1])


def measure(asked: dict[str, Any]) -> list[Beside]:
    """The same in this process."""
    torch, transformers = import_peers()
    transformers.logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
    device, rows = torch_device(torch), [(p, n) for p, n in asked["rows"]]
    settings = transformers.AutoConfig.for_model(**asked["config"])
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(
            settings, dtype=getattr(torch, asked["dtype"]), attn_implementation="sdpa"
        )
    model.eval().requires_grad_(False)
    name = f"transformers {transformers.__version__}"
    run = partial(_continuous, model, rows)
    found = [_tried(f"{name}, continuous batching", run)]
    if device == "cpu" or found[0].problem is not None:
        for size in sorted({min(size, len(rows)) for size in SIZES}):
            run = partial(_static, model, rows, size)
            found.append(_tried(f"{name}, static batches", run))
    return found


def _tried(by: str, run: Callable[[str], Beside]) -> Beside:
    try:
        return run(by)
    except Exception as error:  # whatever a device or another library says
        return Beside(by=by, problem=told(error))


def _continuous(model: Any, rows: Sequence[Row], by: str) -> Beside:
    """All rows through transformers' own scheduler, with its best attention."""
    transformers: Any = import_peers()[1]
    cpu = model.device.type == "cpu"
    longest = max(len(prompt) for prompt, _ in rows), max(new for _, new in rows)
    blocks = sum(-(-(len(prompt) + new) // PAGE) for prompt, new in rows)
    hints = transformers.generation.continuous_batching.utils.WorkloadHints
    with model.continuous_batching_context_manager(
        generation_config=_settings(longest[1], eos=-1),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            allow_block_sharing=False,  # no two prompts begin alike
            num_blocks=min(blocks + 1, MOST_BLOCKS) if cpu else None,
            max_batch_tokens=MOST_TOKENS if cpu else None,
        ),
        warmup=not cpu,  # of CUDA graphs
        workload_hints=hints(*longest, len(rows)),
    ) as manager:
        by = f"{by}, {model.config._attn_implementation} attention"
        _answers(manager, [(prompt, min(new, 8)) for prompt, new in rows[:WARM]])
        begin = time.perf_counter()
        tokens = _answers(manager, rows)
        return Beside(by=by, tokens=tokens, seconds=time.perf_counter() - begin)


def _answers(manager: Any, rows: Sequence[Row]) -> int:
    """New tokens of all rows."""
    tokens = 0
    for prompt, new in rows:
        manager.add_request(prompt, max_new_tokens=new)
    for left in range(len(rows), 0, -1):
        while (answer := manager.get_result(timeout=1)) is None:
            if not manager.is_running():
                raise JropeError(f"it stopped, {left} rows of {len(rows)} unanswered")
        if answer.error is not None:
            raise JropeError(answer.error)
        tokens += len(answer.generated_tokens)
    return tokens


def _static(model: Any, rows: Sequence[Row], size: int, by: str) -> Beside:
    """All rows in batches of `size`, each of which runs to its longest row's end."""
    by = f"{by}, {model.config._attn_implementation} attention"
    rows = sorted(rows, key=lambda row: len(row[0]))
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    _generate(model, [(prompt, 2) for prompt, _ in batches[0]])
    begin = time.perf_counter()
    tokens = sum(_generate(model, batch) for batch in batches)
    seconds = time.perf_counter() - begin
    return Beside(by=by, rows=size, tokens=tokens, seconds=seconds)


def _generate(model: Any, batch: Sequence[Row]) -> int:
    """New tokens that were asked for; those of shorter rows past their end are not."""
    torch: Any = import_peers()[0]
    width, new = max(len(prompt) for prompt, _ in batch), max(n for _, n in batch)
    ids = [[0] * (width - len(prompt)) + prompt for prompt, _ in batch]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt, _ in batch]
    out = model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        generation_config=_settings(new, eos=None),
    )
    made = out.shape[1] - width  # asking for the shape waits for no device
    out.cpu()
    return sum(min(new, made) for _, new in batch)


def _settings(new: int, eos: int | None) -> Any:
    make: Any = import_peers()[1].GenerationConfig
    return make(max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=eos)


def _main() -> None:
    try:
        answer: Any = {"found": [asdict(one) for one in measure(json.load(sys.stdin))]}
    except Exception as error:  # one line in the other process
        answer = {"problem": told(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    _main()
