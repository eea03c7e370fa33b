"""Records as JSON lines that outlive a kill: appended, synced, taken up again."""

import contextlib
import json
import os
import re
import time
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import BinaryIO, Protocol, cast, final

from jrope.batch.answers import PREFIX, Record
from jrope.batch.source import Index
from jrope.errors import JropeError

_ROWS, _SECONDS = 32, 1.0  # at most, between two syncs
_ID = re.compile(re.escape(PREFIX) + "([0-9a-f]{32})")
# What some readers take for the end of a line.
_SPLITTING = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


class Output(Protocol):
    """Where records go."""

    def add(self, record: Record) -> None:
        """Keep a record."""
        ...

    def sync(self) -> None:
        """See that all records are on the disk."""
        ...

    def close(self) -> None:
        """Sync and let go of the file."""
        ...


def to_line(record: Record) -> bytes:
    """A record as one line of JSON; a ValueError where JSON cannot hold it."""
    text = json.dumps(record, allow_nan=False, ensure_ascii=False)
    try:
        return text.translate(_SPLITTING).encode() + b"\n"
    except UnicodeEncodeError:  # half a surrogate pair, from an escape
        return json.dumps(record, allow_nan=False).encode() + b"\n"


def id_of(record: Record) -> str | None:
    """The id of the line that a record answers."""
    name = record.get("request_id", record.get("id"))
    match = _ID.fullmatch(name) if isinstance(name, str) else None
    return match[1] if match else None


def settles(record: Record, index: Index, foreign: list[str]) -> bool:
    """Count the row of a record as done, unless it failed, which is tried again.

    Args:
      foreign: where the ids go of answers to rows that the input does not have.

    Returns:
      Whether the record stays.
    """
    id = id_of(record)
    if id is None or record.get("error") is not None:
        return False
    if id not in index:
        foreign.append(str(record.get("custom_id") or id))
        return False
    return index.finish(id)


def refuse_foreign(path: Path, foreign: list[str]) -> None:
    """Raise a JropeError where answers belong to no row."""
    if foreign:
        raise JropeError(
            f"{path} has {len(foreign)} answers to rows that the input no longer has, "
            f"such as {foreign[0]}; give the input as it was, or another output"
        )


@contextlib.contextmanager
def telling(path: Path) -> Generator[None]:
    """Name the file where the system does not, and what becomes of the run."""
    try:
        yield
    except OSError as error:
        rest = "what it holds is kept, and the same command goes on from there"
        raise JropeError(f"{path}: {error.strerror or error}; {rest}") from error


@contextlib.contextmanager
def replaced(path: Path) -> Generator[BinaryIO]:
    """A file to write that takes the place of `path` at the end, or vanishes."""
    fresh = path.with_name(f".{path.name}.tmp")
    with telling(path):
        try:
            with fresh.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
            sync_folder(path)
        finally:
            fresh.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """See that the name of a new file is on the disk."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@final
class JsonLines:
    """An output of JSON lines.

    A line is written at once, so that a killed process loses none, and synced with
    others, so that a power cut loses a second of them; a last line cut short, failures
    and lines that cannot be read are dropped when the file is opened again.
    """

    def __init__(self, path: Path, index: Index) -> None:
        """Open or make the file, and mark in `index` what is done.

        Raises:
          JropeError: it has answers to rows that are not in the index.
        """
        self._path, self._unsynced, self._synced = path, 0, time.monotonic()
        if path.exists():
            _keep(path, _spans(path, index))
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._file = os.open(path, flags, 0o666)
        sync_folder(path)
        self._size = os.fstat(self._file).st_size

    def add(self, record: Record) -> None:
        """Append a record; it is synced with the next ones."""
        data = memoryview(to_line(record))
        with telling(self._path):
            try:
                written = 0
                while written < len(data):
                    written += os.write(self._file, data[written:])
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._size)
                raise
        self._size += len(data)
        self._unsynced += 1
        late = time.monotonic() - self._synced >= _SECONDS
        if self._unsynced >= _ROWS or late:
            self.sync()

    def sync(self) -> None:
        """See that all records are on the disk."""
        with telling(self._path):
            os.fsync(self._file)
        self._unsynced, self._synced = 0, time.monotonic()

    def close(self) -> None:
        """Sync and let go of the file."""
        try:
            self.sync()
        finally:
            os.close(self._file)


def _spans(path: Path, index: Index) -> list[list[int]]:
    """From where to where the file has lines that stay."""
    spans, foreign, at = list[list[int]](), list[str](), 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n") and settles(_record(line), index, foreign):
                if not spans or spans[-1][1] < at:
                    spans.append([at, at])
                spans[-1][1] = at + len(line)
            at += len(line)
    refuse_foreign(path, foreign)
    return spans


def _record(line: bytes) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return cast(Record, record) if isinstance(record, dict) else {}


def _keep(path: Path, spans: list[list[int]]) -> None:
    """Cut the file's end off, or write it anew where other parts go."""
    if len(spans) <= 1 and (not spans or spans[0][0] == 0):
        with telling(path):
            os.truncate(path, spans[0][1] if spans else 0)
        return
    with path.open("rb") as old, replaced(path) as new:
        for start, end in spans:
            old.seek(start)
            for at in range(start, end, 2**20):
                new.write(old.read(min(2**20, end - at)))


def put_in_order(path: Path, ids: Iterable[str]) -> None:
    """Sort a complete file by the ids, in a new one that takes its place."""
    places, at = dict[str | None, tuple[int, int]](), 0
    with path.open("rb") as old:
        for line in old:
            places[id_of(_record(line))] = at, len(line)
            at += len(line)
        with replaced(path) as new:
            for id in ids:
                start, size = places[id]
                old.seek(start)
                new.write(old.read(size))
