"""An engine whose tokens are hashes of what it is given, and files of rows."""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from cli_helpers import CONFIG, TEMPLATE, byte_tokenizer, fast, ids_of

from jrope.batch.answering import BatchSummary
from jrope.batch.files import run_batch
from jrope.batch.rows import BatchSettings
from jrope.batch.work import Finished, Stopped, Work
from jrope.errors import JropeError
from jrope.hf import config_from_hf

LETTERS, BAD = ids_of("abcdefghijklmnop"), ids_of("NaN")


class HashEngine:
    """Continuous batching without a model: letters, and now and then a stop id.

    What comes of a work depends on it alone; in which order works finish depends on
    the others.
    """

    def __init__(self, slots: int = 4, chunk: int = 4, seconds: float = 0) -> None:
        self.slots, self.chunk, self.seconds = slots, chunk, seconds
        self.taken = self.most = 0
        self.structures: list[bool] = []  # as it was told

    def expect(self, *, structures: bool) -> None:
        self.structures.append(structures)

    def check(self, work: Work) -> None:
        if len(work.stop_ids) > 8:
            raise JropeError(f"row {work.key!r}: stop_ids: too many")

    def run(self, work: Iterable[Work], stopped: Stopped | None) -> Iterator[Finished]:
        queue, live = iter(work), list[tuple[Work, list[int]]]()
        while True:
            while len(live) < self.slots and (new := next(queue, None)) is not None:
                self.taken += 1
                live.append((new, []))
            if not live:
                return
            self.most = max(self.most, len(live))
            time.sleep(self.seconds)
            for one, tokens in [*live]:
                if (reason := self.step(one, tokens, stopped)) is not None:
                    live.remove((one, tokens))
                    yield finished(one, tokens, reason)

    def step(self, one: Work, tokens: list[int], stopped: Stopped | None) -> str | None:
        for _ in range(self.chunk):
            tokens.append(token_of(one, len(tokens)))
            if tokens[-1] in one.stop_ids:
                return "stop"
            if len(tokens) == one.max_new_tokens:
                return "length"
        keep = None if stopped is None else stopped(one, np.array(tokens, np.int32))
        if keep is None:
            return None
        del tokens[keep:]
        return "stop"


def token_of(work: Work, at: int) -> int:
    """A letter, or in one of 16 cases the first stop id."""
    given = repr((work.prompt.tolist(), work.seed, work.sampler, at)).encode()
    digest = hashlib.sha256(given).digest()
    if digest[0] < 16 and work.stop_ids:
        return work.stop_ids[0]
    return LETTERS[digest[1] % len(LETTERS)]


def finished(work: Work, tokens: list[int], reason: Any) -> Finished:
    top = work.logprobs
    scores = -np.arange(1, len(tokens) + 1, dtype=np.float32) / 8
    ids = np.array([[token + i for i in range(top or 0)] for token in tokens], np.int32)
    return Finished(
        key=work.key,
        tokens=np.array(tokens, np.int32),
        finish_reason=reason,
        finite=work.prompt.tolist() != BAD,
        logprobs=None if top is None else scores,
        top_ids=ids if top else None,
        top_logprobs=scores[:, None] - np.arange(top, dtype=np.float32)
        if top
        else None,
    )


def settings(**more: Any) -> BatchSettings:
    tokenizer = fast(byte_tokenizer())
    tokenizer.chat_template = TEMPLATE
    given = {"tokenizer": tokenizer, "config": config_from_hf(CONFIG), **more}
    return BatchSettings(**given)


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def mixed_rows(count: int) -> list[Any]:
    """Plain and OpenAI rows, good and bad."""
    rows: list[Any] = []
    for i in range(count):
        body = {"prompt": f"row {i}", "max_tokens": 3 + i % 20, "n": 1 + i % 3}
        kinds: list[Any] = [
            {"prompt": f"row {i}", "max_tokens": 2 + i % 30, "number": i},
            {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions"}
            | {"body": body},
            {"custom_id": f"r{i}", "url": "/v1/chat/completions"}
            | {"body": {"messages": [{"role": "user", "content": f"row {i}"}]}},
            {"prompt": f"row {i}", "custom_id": f"p{i}", "stop": ["ab", "o"]},
            '{"prompt": "cut short',
            {"prompt": f"row {i}", "tools": ["none"]},
            {"prompt": "NaN", "number": i},
        ]
        rows.append(kinds[i % len(kinds)])
    return rows


def records_of(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    assert data.endswith(b"\n") or not data
    return [json.loads(line) for line in data.split(b"\n")[:-1]]


def lines_of(path: Path) -> list[bytes]:
    return sorted(path.read_bytes().split(b"\n"))


def run(source: Path, output: Path, **options: Any) -> BatchSummary:
    engine = options.pop("engine", None) or HashEngine()
    given = options.pop("settings", None) or settings(max_length=64)
    return run_batch(engine, source, output, given, **options)
