"""Batch inference as a stage of Ray Data, under the names of Ray Data LLM's columns.

    dataset.map_batches(
        JropePredictor, fn_constructor_kwargs={"folder": FOLDER}, batch_size=256,
        concurrency=4, num_gpus=1,
    )

Ray is not imported: what it calls takes and gives dicts of numpy arrays.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import jax
import numpy as np

from jrope.batch.answering import Run
from jrope.batch.answers import PREFIX, Record, failure
from jrope.batch.engine import Engine
from jrope.batch.fields import integers, refuse_unknown
from jrope.batch.rows import BatchSettings
from jrope.batch.source import Index, Line, from_table, line_id
from jrope.cli.batch import longest_row
from jrope.errors import JropeError, RowError, want
from jrope.generation.sample import Sampler
from jrope.hf.folders import PathLike
from jrope.hf.generation import read_generation_config, sampler_fields
from jrope.integrations.loaded import open_model
from jrope.weights.int8 import Quantization

_PROMPTS = ("prompt", "messages", "token_ids")
_TEXTS = ("generated_text", "finish_reason")
_COUNTS = ("num_input_tokens", "num_generated_tokens")
ERROR = "__inference_error__"


@final
class JropePredictor:
    """A batch of rows in, the same rows with their answers out.

    Columns that are read: `prompt`, `messages` or `token_ids`; `sampling_params`, a
    dict of the fields that `jrope batch` takes; `custom_id`.  A row's answer follows
    from its own columns and the model: tokens are drawn with a seed from `custom_id`,
    so that a row that is computed again, in another batch, says the same.

    Columns that are added: `generated_text`, `generated_tokens`, `finish_reason`,
    `num_input_tokens`, `num_generated_tokens`, `request_id`, `__inference_error__`, and
    `logprobs` where a row of the batch asks for them.  A row that cannot be answered
    has the reason as its `__inference_error__`; other errors are raised.

    Args:
      folder, dtype, rope, quantize, adapter: as in `loaded.open_model`.
      max_length: tokens of a row, prompt and new ones; None: as `jrope batch`.
      slots: rows that are computed at once; None: as many as the memory holds.
      max_new_tokens: of rows that do not say; None: 256.
      sampling_params: what rows do not say; then generation_config.json does.
      seed: of the random numbers, for all rows.
    """

    def __init__(
        self,
        folder: PathLike,
        *,
        dtype: str | None = None,
        rope: str | None = None,
        quantize: Quantization | None = None,
        adapter: PathLike | None = None,
        max_length: int | None = None,
        slots: int | None = None,
        max_new_tokens: int | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        how: dict[str, Any] = {"dtype": dtype, "rope": rope, "quantize": quantize}
        model = open_model(folder, **how, adapter=adapter)
        capacity = longest_row(max_length, model.config)
        self._sampling = dict(sampling_params or {})
        self._settings = BatchSettings(
            tokenizer=model.tokenizer,
            config=model.config,
            max_length=capacity,
            sampler=Sampler(**sampler_fields(read_generation_config(model.folder))),
            max_new_tokens=max_new_tokens,
        )
        own: dict[str, Any] = {"capacity": capacity, "slots": slots}
        key = jax.random.key(seed)
        self._engine = Engine(model.params, model.config, **own, key=key)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Answer the rows, in their order."""
        lines = [self._line(number, row) for number, row in enumerate(_rows(batch))]
        index = Index()
        index.structured = any(line.structured for line in lines)
        given = _Given([line for line in lines if index.add(line.id)])
        never, nothing = lambda: False, lambda _: None
        Run(given, self._settings, index, given, never, nothing, None).drain(
            self._engine
        )
        return {**batch, **_columns([given.record(line) for line in lines])}

    def _line(self, number: int, row: Mapping[str, Any]) -> Line:
        # Of a batch's integers Ray makes floats where one is missing.
        name = integers(row.get("custom_id"))
        own, problem = row.get("sampling_params") or {}, None
        fields = dict(self._sampling)
        try:
            want(isinstance(own, Mapping), "sampling_params", own, "a dict")
            fields |= own
            refuse_unknown(fields, set())
            if fields.get("n", 1) != 1:
                raise RowError(f"n: got {fields['n']}, want 1: a row has one answer")
        except RowError as error:
            problem = f"sampling_params: {str(error).removeprefix('sampling_params: ')}"
        name = None if name is None else str(name)
        fields |= {key: integers(row[key]) for key in _PROMPTS if key in row}
        same = {key: integers(value) for key, value in sorted(fields.items())}
        text = json.dumps(same, default=repr)
        id = line_id(text if name is None else f"id {name}", text.encode())
        return Line(number, id, name, {**fields, "custom_id": name}, problem)


@dataclass
class _Given:
    """The rows of a batch, each once, and what comes of them."""

    lines: list[Line]
    records: dict[str, Record] = field(default_factory=dict)
    path = Path("the batch")

    def mine(self) -> Iterator[Line]:
        return iter(self.lines)

    def add(self, record: Record) -> None:
        self.records[_name(record)] = record

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass

    def record(self, line: Line) -> Record:
        if (found := self.records.get(PREFIX + line.id)) is not None:
            return found
        why = f"custom_id {line.custom_id!r} came before in this batch, with other"
        return failure(line, RowError(f"{why} fields"))


def _rows(batch: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """The rows that arrays hold, of plain Python values."""
    if not any(name in batch for name in _PROMPTS):
        wanted = f"one of {', '.join(_PROMPTS)}"
        raise JropeError(f"the batch: got columns {[*batch]}, want {wanted}")
    names = [n for n in (*_PROMPTS, "sampling_params", "custom_id") if n in batch]
    for values in zip(*(batch[name] for name in names), strict=True):
        yield from_table(dict(zip(names, values, strict=True)))


def _name(record: Record) -> str:
    return record["request_id"] if "request_id" in record else record["id"]


def _columns(records: Sequence[Record]) -> dict[str, np.ndarray]:
    errors = [record.get("error") for record in records]
    found = {name: _objects([r.get(name) for r in records]) for name in _TEXTS}
    tokens = [np.array(r.get("generated_tokens", []), np.int32) for r in records]
    found["generated_tokens"] = _objects(tokens)
    found |= {n: np.array([r.get(n, 0) for r in records], np.int64) for n in _COUNTS}
    found["request_id"] = _objects([*map(_name, records)])
    if any("logprobs" in record for record in records):
        found["logprobs"] = _objects([record.get("logprobs") for record in records])
    found[ERROR] = _objects([None if e is None else e["message"] for e in errors])
    return found


def _objects(values: Sequence[Any]) -> np.ndarray:
    array = np.empty(len(values), object)
    for i, value in enumerate(values):
        array[i] = value
    return array
