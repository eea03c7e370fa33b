"""One small engine and rows for it, compiled once for all tests of it."""

import zlib
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from generate_helpers import KEY, VOCABULARY, model

from jrope.batch.engine import Engine
from jrope.batch.work import Finished, Work
from jrope.generation.run import generate
from jrope.generation.sample import Sampler
from jrope.model.config import LlamaConfig

SLOTS, CAPACITY, PIECE, CHUNK = 16, 112, 32, 8
SAMPLERS = (
    Sampler(),
    Sampler(temperature=0.8, top_p=0.9),
    Sampler(temperature=1.2, top_k=10),
    Sampler(repetition_penalty=1.3),
    Sampler(temperature=1.5, min_p=0.05),
    Sampler(frequency_penalty=0.8, presence_penalty=-0.3),
    Sampler(temperature=0.9, repetition_penalty=1.1, presence_penalty=1.5),
)


def engine_of(params: Any, config: LlamaConfig, **options: Any) -> Engine:
    fixed = {"slots": SLOTS, "capacity": CAPACITY, "piece": PIECE, "chunk": CHUNK}
    return Engine(params, config, key=KEY, **{**fixed, **options})


@cache
def engine() -> Engine:
    return engine_of(*model()[1:])


def without_token(bad: int, params: Any) -> Any:
    """Parameters that have a NaN for one token."""
    table = np.array(params["model"]["embed_tokens"]["weight"])
    table[bad] = np.nan
    table = {"embed_tokens": {"weight": jnp.asarray(table)}}
    return {**params, "model": {**params["model"], **table}}


def without(bad: int) -> Engine:
    """An engine for a model that has a NaN for one token."""
    _, params, config = model()
    own = engine_of(without_token(bad, params), config)
    own._programs = engine().compile()
    return own


def work(key: Any, size: int, new: int, **fields: Any) -> Work:
    """A row whose prompt follows from its key."""
    prompt = np.random.default_rng(zlib.crc32(str(key).encode())).integers(
        0, VOCABULARY, size
    )
    own = {"sampler": Sampler(), "seed": 100, "stop_ids": (), **fields}
    return Work(key=key, prompt=prompt.astype(np.int32), max_new_tokens=new, **own)


def asks(row: int, new: int) -> dict[str, Any]:
    """Of some rows, what changes their logits besides the sampler."""
    own: dict[str, Any] = {"min_new_tokens": min(new, 7)} if row % 4 == 1 else {}
    return own | ({"logit_bias": {5: 2.5, 11: -100.0, 30: 4.0}} if row % 5 == 1 else {})


def ragged(count: int) -> list[Work]:
    """Prompts of 1 to 90 tokens, samplers and wishes of all kinds."""
    random = np.random.default_rng(3)
    sizes, news = random.integers(1, 91, count), random.integers(1, 21, count)
    return [
        work(
            i,
            int(sizes[i]),
            int(news[i]),
            sampler=SAMPLERS[i % len(SAMPLERS)],
            seed=1000 - 7 * i,
            stop_ids=(5, 9) if i % 3 else (),
            **asks(i, int(news[i])),
        )
        for i in range(count)
    ]


def draw_best(logits: Any, *_: Any, **__: Any) -> Any:
    """In the place of `draw`, most of what compiles."""
    return jnp.argmax(logits, 1).astype(jnp.int32), logits, jnp.ones(len(logits), bool)


def by_key(rows: Any) -> dict[Any, Finished]:
    rows = list(rows)
    found = {row.key: row for row in rows}
    assert len(found) == len(rows), "a row came twice"
    return found


LONGEST = 40  # new tokens of every row alone: one shape, which compiles once


def alone(row: Work, params: Any = None, config: LlamaConfig | None = None) -> Any:
    """What `generate` makes of a row by itself."""
    if params is None or config is None:
        _, params, config = model()
    prompt = np.zeros((1, 96), np.int32)
    prompt[0, : len(row.prompt)] = row.prompt
    planned = config.rope.needs_length
    return generate(
        params,
        prompt,
        [len(row.prompt)],
        config=config,
        sampler=row.sampler,
        key=KEY,
        seeds=[row.seed],
        max_new_tokens=row.max_new_tokens if planned else LONGEST,
        min_new_tokens=row.min_new_tokens,
        stop_ids=row.stop_ids,
        logit_bias=row.logit_bias,
        logprobs=not planned,
    )


def tokens_alone(row: Work, *own: Any) -> list[int]:
    """The tokens alone."""
    out = alone(row, *own)
    count = min(int(out.lengths[0]), row.max_new_tokens)
    return np.asarray(out.tokens)[0, :count].tolist()
