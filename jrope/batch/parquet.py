"""Records as Parquet: a folder of whole files, a file for every thousand rows."""

import re
import time
from pathlib import Path
from typing import Any, final

from jrope.batch.answers import Record
from jrope.batch.journal import refuse_foreign, replaced, settles, to_line
from jrope.batch.source import Index, pyarrow

_ROWS, _SECONDS = 1024, 300.0  # at most, of a file
_PART = re.compile(r"part-(\d+)\.parquet")
_COLUMNS = ("request_id", "custom_id", "error", "text", "finish_reason", "record")


@final
class ParquetParts:
    """An output of Parquet files.

    The columns are text: the first choice's text among them, and the whole record as
    JSON.  A file gets its name when it is complete and on the disk; a killed process
    loses the rows of the one it was at.  Failures are dropped when the folder is opened
    again.
    """

    def __init__(self, path: Path, index: Index) -> None:
        """Open or make the folder, and mark in `index` what is done.

        Raises:
          JropeError: pyarrow is missing, or there are answers to rows that are not in
            the index.
        """
        self._arrow, self._parquet = pyarrow("pyarrow"), pyarrow("pyarrow.parquet")
        path.mkdir(exist_ok=True)
        self._path, self._rows = path, list[list[str | None]]()
        self._synced = time.monotonic()
        names = sorted(n.name for n in path.iterdir() if _PART.fullmatch(n.name))
        self._next = 1 + max((int(name[5:-8]) for name in names), default=-1)
        foreign, kept = list[str](), dict[Path, list[bool]]()
        for name in names:
            kept[path / name] = self._settled(path / name, index, foreign)
        refuse_foreign(path, foreign)
        for part, flags in kept.items():
            self._keep(part, flags)

    def _settled(self, part: Path, index: Index, foreign: list[str]) -> list[bool]:
        table = self._parquet.read_table(part, columns=["request_id", "error"])
        return [settles(row, index, foreign) for row in table.to_pylist()]

    def _keep(self, part: Path, flags: list[bool]) -> None:
        if not any(flags):
            part.unlink()
        elif not all(flags):
            table = self._parquet.read_table(part).filter(self._arrow.array(flags))
            self._write(part, table)

    def _write(self, part: Path, table: Any) -> None:
        with replaced(part) as file:
            self._parquet.write_table(table, file)

    def add(self, record: Record) -> None:
        """Keep a record for the next file."""
        self._rows.append(_columns(record))
        late = time.monotonic() - self._synced >= _SECONDS
        if len(self._rows) >= _ROWS or late:
            self.sync()

    def sync(self) -> None:
        """Write the records that are in no file yet."""
        if self._rows:
            kind = self._arrow.string()
            columns = zip(*self._rows, strict=True)
            arrays = [self._arrow.array(column, kind) for column in columns]
            part = self._path / f"part-{self._next:06}.parquet"
            self._write(part, self._arrow.table(arrays, names=_COLUMNS))
            self._next += 1
            self._rows = []
        self._synced = time.monotonic()

    def close(self) -> None:
        """Write what is left."""
        self.sync()


def _columns(record: Record) -> list[str | None]:
    line = to_line(record).decode().rstrip("\n")
    body = (record.get("response") or {"body": record})["body"]
    first = (body.get("choices") or [body])[0]
    text = first.get("text", first.get("generated_text"))
    text = first.get("message", {}).get("content") if text is None else text
    reason, error = first.get("finish_reason"), record.get("error")
    text, reason = (x[0] if isinstance(x, list) else x for x in (text, reason))
    told = None if error is None else error["message"]
    name = record.get("request_id", record.get("id"))
    values = name, record.get("custom_id"), told, text, reason, line
    # Arrow cannot hold half a surrogate pair; the record has it as an escape.
    return [x and x.encode(errors="replace").decode() for x in values]
