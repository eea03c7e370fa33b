"""One small engine and rows for it, compiled once for all tests of it."""

from functools import cache
from typing import Any

import jax
import numpy as np
from generate_helpers import KEY, VOCABULARY, model

from jrope.batch.engine import Engine
from jrope.batch.work import Finished, Work
from jrope.generation.run import generate
from jrope.generation.sample import Sampler

SLOTS, CAPACITY, PIECE, CHUNK = 5, 80, 16, 8
SAMPLERS = (
    Sampler(),
    Sampler(temperature=0.8, top_p=0.9),
    Sampler(temperature=1.2, top_k=10),
    Sampler(repetition_penalty=1.3),
    Sampler(temperature=1.5, min_p=0.05),
)


def engine_of(rope: str | None = None, **options: Any) -> Engine:
    _, params, config = model(rope)
    options = {"slots": SLOTS, "capacity": CAPACITY, "piece": PIECE, **options}
    return Engine(params, config, chunk=CHUNK, key=KEY, **options)


@cache
def engine() -> Engine:
    return engine_of()


def work(key: Any, size: int, new: int, **fields: Any) -> Work:
    """A row whose prompt follows from its key."""
    prompt = np.random.default_rng(abs(hash(key))).integers(0, VOCABULARY, size)
    own = {"sampler": Sampler(), "seed": 100, "stop_ids": (), **fields}
    return Work(key=key, prompt=prompt.astype(np.int32), max_new_tokens=new, **own)


def ragged(count: int) -> list[Work]:
    """Prompts of 1 to 60 tokens, samplers of all kinds, some with stop ids."""
    random = np.random.default_rng(3)
    sizes, news = random.integers(1, 60, count), random.integers(1, 21, count)
    return [
        work(
            i,
            int(sizes[i]),
            int(news[i]),
            sampler=SAMPLERS[i % len(SAMPLERS)],
            seed=1000 - 7 * i,
            stop_ids=(5, 9) if i % 3 else (),
        )
        for i in range(count)
    ]


def by_key(rows: Any) -> dict[Any, Finished]:
    rows = list(rows)
    found = {row.key: row for row in rows}
    assert len(found) == len(rows), "a row came twice"
    return found


def alone(row: Work, rope: str | None = None, **options: Any) -> Any:
    """What `generate` makes of a row by itself."""
    _, params, config = model(rope)
    return generate(
        params,
        row.prompt[None],
        config=config,
        sampler=row.sampler,
        key=KEY,
        seeds=[row.seed],
        max_new_tokens=row.max_new_tokens,
        stop_ids=row.stop_ids,
        **options,
    )


def tokens_alone(row: Work, rope: str | None = None) -> list[int]:
    out = alone(row, rope)
    return np.asarray(out.tokens)[0, : int(out.lengths[0])].tolist()


def bits(params: Any) -> Any:
    return jax.tree.map(np.asarray, params)
