"""Records as JSON lines, each on the disk before the next begins.

The first line, the header, says what was measured, on what and how; every other line is
one record.  A run that was killed goes on where it stopped: what is recorded is not
measured again, and a last line that was cut short is dropped.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, final

from jrope.errors import JropeError
from jrope.locks import lock

SCHEMA = 1
Record = dict[str, Any]
Key = tuple[Any, ...]
# What makes two records of a kind different measurements.
KEYS = {
    "header": (),
    "method": ("rope", "length"),
    "perplexity": ("rope", "context", "windows"),
    "passkey": ("rope", "length", "depth"),
    "distance": ("rope", "length"),
    "failure": ("task", "rope", "context", "windows", "depth"),
}
_RESULTS = ("perplexity", "passkey", "distance")
# What of the header must be as it was for a run to go on.
SAME = ("schema", "jrope", "model", "model_sha256", "device", "dtype")


@final
class Journal:
    """A file of records, or a list of them where no file is wanted; a context.

    Attributes:
      records: all of them, the header first.
      resumed: how many measurements an earlier run left; without any, a file begins
        anew, whatever its settings were.
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        """Open or make the file.

        Args:
          path: of the file; None: nothing is written.
          header: the first record; "plan" holds the settings, by name.

        Raises:
          JropeError: the file is something else, is damaged, holds a run of another
            model, text or settings, or another process writes to it.
        """
        self.records: list[Record] = [{"kind": "header", "schema": SCHEMA, **header}]
        self.path, self.resumed = path, 0
        self._file: BinaryIO | None = None
        if path is not None:
            # Unbuffered: a line is written at once or, when killed, cut short.
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115
            try:
                self._open(path, self._file)
            except BaseException:
                self._file.close()
                raise
        self._known = {key_of(record) for record in self.records}

    def _open(self, path: Path, file: BinaryIO) -> None:
        lock(file, path)
        file.seek(0)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        found = _parse(path, whole) if whole else _nothing(path, data)
        self.resumed = sum(record["kind"] in _RESULTS for record in found)
        if self.resumed:
            _check_same(path, found[0], self.records[0])
            self.records = found
            file.truncate(len(whole))
        else:  # nothing that could be lost
            file.truncate(0)
            self._write(self.records[0])

    def add(self, record: Mapping[str, Any]) -> None:
        """Keep a record; when this returns, it is on the disk."""
        record = dict(record)
        self.records.append(record)
        self._known.add(key_of(record))
        self._write(record)

    def has(self, record: Mapping[str, Any]) -> bool:
        """Whether there is a record of this kind with this method, context, ..."""
        return key_of(record) in self._known

    def known(self) -> str:
        """What `has` answers by, as text."""
        return json.dumps([_named(record) for record in self.records])

    def know(self, text: str) -> None:
        """Answer as the journal whose `known` this is; what it holds is not told."""
        told: list[Record] = json.loads(text)
        self.records += [r for r in told if key_of(r) not in self._known]
        self._known |= {key_of(record) for record in told}

    def _write(self, record: Mapping[str, Any]) -> None:
        if self._file is not None:
            text = json.dumps(record, allow_nan=False, ensure_ascii=False)
            self._file.write(text.encode() + b"\n")
            os.fsync(self._file.fileno())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def read_journal(path: Path) -> list[Record]:
    """The records of a finished or running journal, the header first.

    Raises:
      JropeError: the file is not a journal.
    """
    data = path.read_bytes()
    return current(_parse(path, data[: data.rfind(b"\n") + 1]))


def current(records: Sequence[Record]) -> list[Record]:
    """The records that hold.

    Failures that a later run made good or met again are left out, and of each method's
    distances all but the last: a run with longer contexts measured them anew.
    """
    kept: list[Record] = []
    later: set[Key] = set()
    for record in reversed(records):
        work = _work(record)
        if record["kind"] not in ("failure", "distance") or work not in later:
            kept.append(record)
        later.add(work)
    return kept[::-1]


def _named(record: Mapping[str, Any]) -> Record:
    names = ("kind", *KEYS[record["kind"]])
    return {name: record.get(name) for name in names}


def key_of(record: Mapping[str, Any]) -> Key:
    """What tells this record from the others: its kind, method, context, ..."""
    kind = record["kind"]
    return (kind, *(record.get(name) for name in KEYS[kind]))


def _work(record: Mapping[str, Any]) -> Key:
    """Task, method, context, ..., the same for a failure and for the result."""
    task = record.get("task", record["kind"])
    if task == "distance":
        return task, record["rope"]
    context = record.get("context", record.get("length"))
    return task, context, *(record.get(n) for n in ("rope", "windows", "depth"))


def _parse(path: Path, data: bytes) -> list[Record]:
    records: list[Record] = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            record = json.loads(line)
            good = isinstance(record, dict) and record.get("kind") in KEYS
        except ValueError:
            record, good = {}, False
        if number == 1 and (not good or record["kind"] != "header"):
            raise _foreign(path)
        if not good:
            raise JropeError(
                f"{path}: line {number} is damaged; remove it, or choose another file"
            )
        records.append(record)
    if not records:
        raise _foreign(path)
    return records


def _nothing(path: Path, data: bytes) -> list[Record]:
    """An empty file, or a header cut short; anything else is left alone."""
    if data and not data.startswith(b'{"kind": "header"'):
        raise _foreign(path)
    return []


def _foreign(path: Path) -> JropeError:
    return JropeError(f"{path} is not a journal of jrope evaluate; choose another file")


def _check_same(path: Path, old: Record, new: Record) -> None:
    before, now = ({n: r.get(n) for n in SAME} | r.get("plan", {}) for r in (old, new))
    before["texts"], now["texts"] = (
        [text["sha256"] for text in r.get("texts", ())] for r in (old, new)
    )
    changed = [
        f"{name} {_short(before.get(name))} (now {_short(now.get(name))})"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise JropeError(
            f"{path} holds a run with {', '.join(changed)}: run it as it was, or "
            "choose another file"
        )


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    text = str(value)
    return text[:8] if len(text) == 64 else text  # a hash
