"""What a run's answers depend on, beside them; and that one process writes them."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from jrope.batch.journal import sync_folder, telling
from jrope.errors import JropeError
from jrope.locks import lock

_SCHEMA = 1


@final
class Manifest:
    """The file OUTPUT.run.json, locked; a context.

    Attributes:
      created: seconds since 1970 when the run first began, or SOURCE_DATE_EPOCH.
    """

    def __init__(self, output: Path, fingerprint: Mapping[str, Any]) -> None:
        """Lock the file, and compare it or write it.

        Raises:
          JropeError: another process has it, the run was one of other settings, or the
            output is something else's.
        """
        self.path = output.with_name(f"{output.name}.run.json")
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115
        try:
            lock(self._file, output)
            self.created = self._open(output, fingerprint)
        except BaseException:
            self._file.close()
            raise

    def _open(self, output: Path, fingerprint: Mapping[str, Any]) -> int:
        self._file.seek(0)
        now = json.loads(json.dumps(fingerprint, default=repr))  # of a Rope, say
        try:
            found = json.loads(self._file.read())
            created, before = int(found["created"]), found["settings"]
        except (ValueError, KeyError, TypeError):  # not there, or cut short by a kill
            return self._begin(output, now)
        if changed := _changed({"schema": found.get("schema"), **before}, now):
            raise JropeError(
                f"{output} is from a run with {', '.join(changed)}: run it as it was, "
                "or choose another output"
            )
        return created

    def _begin(self, output: Path, settings: dict[str, Any]) -> int:
        if _holds(output):
            if not self.path.stat().st_size:
                self.path.unlink()
            raise JropeError(
                f"{output} is there, but not {self.path.name}, which tells how it was "
                "made: choose another output"
            )
        created = int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
        record = {"schema": _SCHEMA, "created": created, "settings": settings}
        with telling(self.path):
            self._file.truncate(0)
            self._file.write(json.dumps(record, indent=1).encode())
            os.fsync(self._file.fileno())
            sync_folder(self.path)
        return created

    def __enter__(self) -> "Manifest":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _holds(output: Path) -> bool:
    """Whether there is something that could be lost."""
    if output.is_dir():
        return any(output.iterdir())
    return output.exists() and output.stat().st_size > 0


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    now = {"schema": _SCHEMA, **now}
    return [
        f"{name} {_short(before.get(name))} (now {_short(now.get(name))})"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:8] if len(text) == 64 else text  # a hash
