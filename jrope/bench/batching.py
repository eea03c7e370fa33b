"""Rows of all lengths: an engine's slots beside batches that wait for their longest.

The rows are drawn once: prompts of clip(exp(N(5.6, 1)), 32, 2048) tokens, and
clip(exp(N(5, 1)), 16, 1024) new ones each, which nothing ends early.  Their answers may
be of a form, JSON values one behind the other without end, for tokens that are drawn.
"""

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, final

import jax
import numpy as np

from jrope.batch.engine import Engine
from jrope.batch.stats import Stats
from jrope.batch.work import Work
from jrope.bench.device import Ceilings, peak_memory
from jrope.bench.model import cache_bytes, prefill_flops, tree_bytes
from jrope.forms.cache import Forms
from jrope.forms.values import COMMA, anything
from jrope.generation.ahead import compile_ahead
from jrope.generation.request import bucket
from jrope.generation.run import generate
from jrope.generation.sample import Sampler
from jrope.model.config import LlamaConfig
from jrope.tree import Params

PROMPT = (5.6, 32, 2048)  # mean of the logarithm, least, most
NEW = (5.0, 16, 1024)
AT_ONCE = 8192  # tokens of a static batch's prompts, but at least
SHORTEST = 256  # of each row


@final
@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one way of batching took.

    Args:
      by: "slots", "slots, structured" or "static batches".
      rows: at once.
      tokens: new ones that were asked for.
      seconds: for all rows, after compiling.
      compile_seconds: before that.
      compiled: programs.
      steps: of decoding.
      occupancy: rows that wanted a token in a step, in terms of all.
      of_limit: what the device needs at its best, in terms of `seconds`.
      peak_bytes: of the device's memory, at most in use since the process began; None:
        it does not tell.
      stats: of the engine.
    """

    by: str
    rows: int
    tokens: int
    seconds: float
    compile_seconds: float
    compiled: int
    steps: int
    occupancy: float
    of_limit: float = 0.0
    peak_bytes: int | None = None
    stats: dict[str, Any] | None = None

    def lines(self) -> list[str]:
        """For people."""
        head = f"{self.by}, {self.rows} rows at once"
        lines = [
            f"{head}: {self.tokens / self.seconds:.1f} useful tokens/s, "
            f"{self.seconds:.2f} s, {self.of_limit:.1%} of the device's limit",
            f"    {self.steps} steps, {self.occupancy:.1%} occupied; {self.compiled} "
            f"programs compiled in {self.compile_seconds:.1f} s",
        ]
        if self.peak_bytes is not None:
            lines[-1] += f"; {self.peak_bytes / 1e9:.1f} GB in use at most"
        if self.stats is not None:
            whole, padded = self.stats["seconds"], self.stats["padded_tokens"]
            filled = self.stats["prefill_tokens"] / max(padded, 1)
            lines.append(
                f"    {self.stats['chunks']} chunks; the device waited for the host "
                f"{self.stats['between'] / whole:.1%} of the time, starting prompts "
                f"took {self.stats['calls'] / whole:.1%}; prompts filled "
                f"{filled:.1%} of their shapes"
            )
        return lines


def workload(config: LlamaConfig, rows: int, shrink: int = 1) -> list[Work]:
    """The rows, the same ones for a vocabulary; `shrink` divides their lengths."""
    random = np.random.default_rng(5)

    def lengths(mean: float, least: int, most: int) -> np.ndarray:
        drawn = np.exp(random.normal(mean, 1, rows)).clip(least, most)
        return np.maximum(drawn.astype(np.int64) // shrink, 1)

    prompts, news = lengths(*PROMPT), lengths(*NEW)
    return [
        Work(
            key=i,
            prompt=random.integers(0, config.vocab_size, prompts[i]).astype(np.int32),
            sampler=Sampler(),
            seed=i,
            max_new_tokens=int(news[i]),
            stop_ids=(),
        )
        for i in range(rows)
    ]


def structured(works: list[Work], size: int) -> list[Work]:
    """The same rows with answers of a form, which each takes all of its tokens for."""
    regex = f"(?:{anything(2)}{COMMA})*"
    given = {"structured_outputs": {"regex": regex}}
    structure = Forms().of(given, (), partial(vocabulary, size))
    return [replace(work, structure=structure) for work in works]


def vocabulary(size: int) -> list[bytes]:
    """All bytes, and then words of 1 to 7 letters of which the first may be a sign."""
    random, letters = np.random.default_rng(6), b"abcdefghijklmnopqrstuvwxyz"
    signs = np.frombuffer(letters + b' "{}[],:-.0123456789', np.uint8)
    text = random.choice(signs[:26], (size, 7))
    text[:, 0] = random.choice(signs, size)
    words = zip(text, random.integers(1, 8, size), strict=True)
    return [
        bytes([i]) if i < 256 else word[:length].tobytes()
        for i, (word, length) in enumerate(words)
    ]


def capacity_of(works: list[Work]) -> int:
    """Tokens of the longest row."""
    return max(len(work.prompt) + work.max_new_tokens for work in works)


def in_slots(engine: Engine, works: list[Work]) -> Measured:
    """All rows through an engine."""
    engine.compile()
    begin = time.perf_counter()
    tokens = sum(len(row.tokens) for row in engine.run(works))
    seconds, stats = time.perf_counter() - begin, engine.stats
    return Measured(
        by="slots",
        rows=stats.slots,
        tokens=tokens,
        seconds=seconds,
        compile_seconds=stats.compile_seconds,
        compiled=stats.compiled,
        steps=stats.steps,
        occupancy=stats.occupancy,
        peak_bytes=peak_memory(),
        stats=asdict(stats),
    )


def in_batches(
    params: Params, config: LlamaConfig, works: list[Work], size: int
) -> Measured:
    """All rows in batches, each of which runs until its longest row is done."""
    batches = [works[i : i + size] for i in range(0, len(works), size)]
    begin, shapes = time.perf_counter(), dict[Any, Any]()
    for batch in batches:
        arrays, options = _request(batch, size)
        width, new = arrays[0].shape[1], options["max_new_tokens"]
        shapes.setdefault((len(batch), bucket(width), bucket(new)), (arrays, options))
    for arrays, options in shapes.values():
        compile_ahead(params, *arrays, config=config, **options)
    compiled, steps = time.perf_counter(), 0
    for batch in batches:
        arrays, options = _request(batch, size)
        out = generate(params, *arrays, config=config, **options)
        jax.block_until_ready(out)
        steps += options["max_new_tokens"]
    tokens = sum(work.max_new_tokens for work in works)
    return Measured(
        by="static batches",
        rows=size,
        tokens=tokens,
        seconds=time.perf_counter() - compiled,
        compile_seconds=compiled - begin,
        compiled=4 * len(shapes),
        steps=steps,
        occupancy=tokens / (steps * size),
        peak_bytes=peak_memory(),
    )


def _request(batch: list[Work], size: int) -> tuple[Any, Any]:
    lengths = np.array([len(work.prompt) for work in batch])
    prompt = np.zeros((len(batch), lengths.max()), np.int32)
    for row, work in zip(prompt, batch, strict=True):
        row[: len(work.prompt)] = work.prompt
    options: dict[str, Any] = {
        "max_new_tokens": max(work.max_new_tokens for work in batch),
        "stop_ids": (),
        "prefill_chunk": max(AT_ONCE // size, SHORTEST),
    }
    return (prompt, lengths), options


def least_seconds(
    params: Params, config: LlamaConfig, works: list[Work], steps: int, best: Ceilings
) -> float:
    """What the device needs at its best for these rows in so many steps of decoding.

    A step reads all weights, a row of it every slot that the row has filled; prompts
    are bound by FLOPs.
    """
    itemsize: int = params["model"]["norm"]["weight"].dtype.itemsize
    sizes = [(len(work.prompt), work.max_new_tokens) for work in works]
    filled = sum(new * prompt + new * (new + 1) // 2 for prompt, new in sizes)
    read = steps * tree_bytes(params)[1]
    read += cache_bytes(config, filled, itemsize)
    flops = sum(prefill_flops(config, 1, prompt) for prompt, _ in sizes)
    return read / best.read + flops / best.matmul


def compare(
    params: Params,
    config: LlamaConfig,
    works: list[Work],
    best: Ceilings,
    *,
    slots: int | None,
    size: int,
    forms: bool = False,
) -> Iterator[Measured]:
    """The engine, then batches of `size` rows; none where that is 0.

    With `forms` the engine takes the rows again with answers of a form.
    """
    how: dict[str, Any] = {"slots": slots, "logprobs": False, "structures": forms}
    engine = Engine(params, config, capacity=capacity_of(works), **how)
    runs = {"slots": works}
    if forms:
        runs["slots, structured"] = structured(works, config.vocab_size)
    for by, rows in runs.items():
        found = in_slots(engine, rows)
        least = least_seconds(params, config, works, found.steps, best)
        yield replace(found, by=by, of_limit=least / found.seconds)
        engine.stats = Stats(slots=engine.stats.slots)
    del engine
    gc.collect()
    if size:
        found = in_batches(params, config, works, size)
        least = least_seconds(params, config, works, found.steps, best)
        yield replace(found, of_limit=least / found.seconds)
