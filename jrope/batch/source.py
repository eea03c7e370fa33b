"""The lines of an input, one at a time, and what tells them from each other."""

import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np

from jrope.errors import JropeError
from jrope.forms.request import asks
from jrope.hf.folders import parse_json

PARQUET = ".parquet"
LONGEST_LINE = 2**26
_FEW = 5


@final
@dataclass(frozen=True)
class Line:
    """A line of the input.

    Args:
      number: counted from 1.
      id: 32 hexadecimal digits: the first half from custom_id, or from the number
        where there is none, the second half from the bytes of the line.
      custom_id: of the row, where it has one.
      fields: the row; {} where it cannot be read.
      problem: why it cannot be read.
    """

    number: int
    id: str
    custom_id: str | None
    fields: dict[str, Any]
    problem: str | None = None

    @property
    def structured(self) -> bool:
        """Whether it asks for a form of its answer."""
        body = self.fields.get("body")
        return asks(self.fields) or (isinstance(body, dict) and asks(body))


@final
class Index:
    """The rows of an input by their ids, 16 bytes each, and which are done.

    Attributes:
      rows: how many.
      structured: whether some ask for a form of their answers.
    """

    def __init__(self) -> None:
        self._bodies: dict[bytes, bytes] = {}
        self._done: set[bytes] = set()
        self.rows, self.structured = 0, False

    def add(self, id: str, *, mine: bool = True) -> bool:
        """Add a row, of this shard or not; False: one of this custom_id is there."""
        head, body = _halves(id)
        if head in self._bodies:
            return False
        self._bodies[head] = body if mine else b""
        self.rows += mine
        return True

    def finish(self, id: str) -> bool:
        """Count a row as done; False: it is already."""
        head, _ = _halves(id)
        new = head not in self._done
        self._done.add(head)
        return new

    def is_done(self, id: str) -> bool:
        """Whether the row is done."""
        return _halves(id)[0] in self._done

    def __contains__(self, id: str) -> bool:
        head, body = _halves(id)
        return self._bodies.get(head) == body

    @property
    def done(self) -> int:
        """How many rows are done."""
        return len(self._done)


def _halves(id: str) -> tuple[bytes, bytes]:
    return bytes.fromhex(id[:16]), bytes.fromhex(id[16:])


@final
@dataclass(frozen=True)
class Source:
    """An input file: JSON lines, or Parquet by its name's end.

    Args:
      path: of the file, which is read more than once.
      shard, shards: only the lines whose number - 1 is shard modulo shards.
    """

    path: Path
    shard: int = 0
    shards: int = 1

    def __iter__(self) -> Iterator[Line]:
        parquet = self.path.suffix == PARQUET
        lines = _parquet_rows(self.path) if parquet else _json_lines(self.path)
        for number, data in lines:
            if not data.isspace():
                yield read_line(number, data)

    def mine(self) -> Iterator[Line]:
        """The lines of this shard."""
        return filter(self._is_mine, self)

    def _is_mine(self, line: Line) -> bool:
        return (line.number - 1) % self.shards == self.shard

    def index(self) -> Index:
        """The rows of this shard.

        Raises:
          JropeError: two rows of the input have the same custom_id; or it is a pipe or
            a folder.
        """
        if self.path.exists() and not self.path.is_file():
            why = "it is no regular file, and it is read more than once"
            raise JropeError(f"{self.path}: {why}; write the rows into one")
        found, twice = Index(), list[str]()
        for line in self:
            mine = self._is_mine(line)
            found.structured |= mine and line.structured
            if not found.add(line.id, mine=mine):
                twice.append(f"{line.custom_id!r} (line {line.number})")
        if twice:
            more = f" and {len(twice) - _FEW} more" if len(twice) > _FEW else ""
            first = ", ".join(twice[:_FEW])
            raise JropeError(
                f"{self.path}: custom_id given twice: {first}{more}; want each once"
            )
        return found


def read_line(number: int, data: bytes) -> Line:
    """A line from its bytes, whatever these are."""
    problem, fields = None, dict[str, Any]()
    if len(data) > LONGEST_LINE:
        problem = f"it is longer than {LONGEST_LINE} bytes"
    else:
        try:
            fields = parse_json(data, "the line")
        except JropeError as error:
            problem = str(error)
    custom_id = fields.get("custom_id")
    custom_id = custom_id if isinstance(custom_id, str) else None
    name = f"line {number}" if custom_id is None else f"id {custom_id}"
    return Line(number, line_id(name, data.strip()), custom_id, fields, problem)


def line_id(name: str, data: bytes) -> str:
    """The id of a `Line`: what names it, and all that it says."""
    parts = name.encode("utf-8", "surrogatepass"), data
    return "".join(blake2b(part, digest_size=8).hexdigest() for part in parts)


def _json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        number = 0
        while data := file.readline(LONGEST_LINE + 1):
            number += 1
            _skip_rest(file, data)
            yield number, data


def _skip_rest(file: BinaryIO, data: bytes) -> None:
    """Read on to the end of a line that is too long."""
    while len(data) > LONGEST_LINE and not data.endswith(b"\n"):
        data = file.readline(LONGEST_LINE + 1)
        if not data:
            return


def _parquet_rows(path: Path) -> Iterator[tuple[int, bytes]]:
    """Rows as JSON lines."""
    number, damaged = 0, pyarrow("pyarrow").ArrowException
    try:
        for batch in pyarrow("pyarrow.parquet").ParquetFile(path).iter_batches(256):
            for row in batch.to_pylist():
                number += 1
                yield number, json.dumps(from_table(row), default=_as_text).encode()
    except damaged as error:
        raise JropeError(f"{path}: it is no whole Parquet file: {error}") from None


def _as_text(value: Any) -> str:
    """What JSON has no word for; bytes that are no UTF-8 as what no prompt may hold."""
    if isinstance(value, bytes):  # texts of columns that do not say so
        return value.decode(errors="surrogateescape")
    return str(value)


def from_table(value: Any) -> Any:
    """A table's value of plain Python values, without the fields that it lacks.

    In tables a row has the fields of all, and what is missing is a null or, for pandas,
    NaN.
    """
    if isinstance(value, int | str):  # first, as most are
        return value
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, Mapping):
        return {k: x for k, v in value.items() if (x := from_table(v)) is not None}
    return [from_table(item) for item in value] if isinstance(value, list) else value


def pyarrow(name: str) -> Any:
    """A module of pyarrow.

    Raises:
      JropeError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        hint = 'pip install "jrope[parquet]", or give JSON lines'
        raise JropeError(f"Parquet needs the package pyarrow; {hint}") from None
