"""The processes of a program: what they tell each other, and how they end together.

The key-value store of `jax.distributed` carries what they tell each other, which takes
no device; its heartbeats, which XLA's own threads send, tell who is alive.  A thread in
every process asks for both, and ends the process with one line when another one has
failed or is gone: a collective would wait for it, on some devices for ever.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO, final

import jax

from jrope.errors import JropeError
from jrope.sharding.aborts import on_abort

HEARTBEAT = 10  # seconds without a sign of life, after which a process counts as dead
_STATUS = 2  # of a process that ends after a failure, its own or another's
_LONG = 7 * 24 * 3600.0  # waits that the end of a process cuts short


class Disagreement(JropeError):
    """What processes were given differs; raised in all of them, with one message."""


def end(line: str, stream: TextIO) -> None:
    """Leave at once, whatever other threads do."""
    _briefly(_flush)  # or it would wait for a pipe that nobody reads
    with contextlib.suppress(OSError, ValueError):
        stream.write(f"jrope: error: {' '.join(line.split())}\n")
        stream.flush()
    os._exit(_STATUS)


def _briefly(act: Callable[..., None], *given: Any) -> None:
    """Act, but do not wait for it for longer than a few seconds."""
    thread = threading.Thread(target=act, args=given, daemon=True)
    thread.start()
    thread.join(3)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


@final
class Processes:
    """The processes of a program, of `processes`; a context.

    Attributes:
      index: which one this is.
      count: how many there are.
      hosts: the name of each one's host.
    """

    def __init__(self, patience: float) -> None:
        from jax._src import distributed  # the store has no public name

        state: Any = distributed.global_state
        self._store: Any = state.client
        self._errors = sys.stderr  # which the caller may yet redirect
        self.index, self.count = int(state.process_id), int(state.num_processes)
        self._rounds, self._failed = 0, False
        self._over, self._last_word = threading.Event(), threading.Lock()
        self.hosts: tuple[str, ...] = ("host unknown",) * self.count
        self._undo = on_abort(self._lost)
        self.hosts = tuple(self._told("host", socket.gethostname(), patience))
        atexit.register(self._leave)
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def name(self, index: int | None = None) -> str:
        """A process with its host, for messages; None: this one."""
        index = self.index if index is None else index
        return f"process {index} ({self.hosts[index]})"

    def agree(self, facts: Mapping[str, str]) -> None:
        """Go on where every process gives the same facts; all call it, as often.

        Args:
          facts: name -> a short value, or a hash of a long one.

        Raises:
          Disagreement: in every process, naming those that differ from most, and what.
        """
        every = [
            json.loads(text) for text in self._told("facts", json.dumps({**facts}))
        ]
        values = [json.dumps(given, sort_keys=True) for given in every]
        usual = values.index(Counter(values).most_common(1)[0][0])
        odd = [i for i, value in enumerate(values) if value != values[usual]]
        if not odd:
            return
        self._last_word.acquire()  # what the others do now is no news
        told = [_difference(every[i], every[usual]) for i in odd]
        names = "; ".join(
            f"{self.name(i)} has {t}" for i, t in zip(odd, told, strict=True)
        )
        raise Disagreement(f"processes differ from {self.name(usual)}: {names}")

    def share(self, text: str) -> str:
        """What process 0 gives; all call it, as often."""
        return self._told("text", text if self.index == 0 else "")[0]

    def stop(self) -> None:
        """Wait until every process is done, and part; JAX goes on alone."""
        if self._over.is_set():
            return
        self._barrier("stop", _LONG)
        self._over.set()
        self._watcher.join(HEARTBEAT)
        everyone = [*range(self.count)]
        # process 0 takes the store with it when it ends: the others leave first
        while self.index == 0 and len(self._store.get_live_nodes(everyone)) > 1:
            time.sleep(0.05)
        jax.distributed.shutdown()
        self._undo()

    def fail(self, error: BaseException) -> None:
        """Tell the others of an error here; or learn that it came of one of them.

        Where a process is gone, this does not return: the thread that finds out ends
        this one.
        """
        own = isinstance(error, JropeError | MemoryError)
        foreign = isinstance(error, ValueError | RuntimeError) and not own
        if foreign and self.count > 1 and "RESOURCE_EXHAUSTED" not in str(error):
            time.sleep(HEARTBEAT + 3)  # of a dead process, heartbeats tell until then
        self._failed = True
        if isinstance(error, Disagreement):
            _briefly(self._linger, range(self.count))
            return
        self._last_word.acquire()
        what = str(error) or type(error).__name__
        if isinstance(error, JropeError):
            error.args = (f"{self.name()}: {error}",)
        _briefly(self._tell, f"{self.name()}: {what}")

    def __enter__(self) -> "Processes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: Any
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.stop()
        else:
            self.fail(error)

    def _told(self, what: str, text: str, patience: float = _LONG) -> list[str]:
        """What each process gives under this name, in order."""
        self._rounds += 1
        key = f"jrope/{what}/{self._rounds}"
        self._store.key_value_set(f"{key}/{self.index}", f"={text}")  # none is empty
        self._barrier(key, patience)
        told = dict(self._store.key_value_dir_get(f"{key}/"))
        self._barrier(f"{key}/read", patience)
        return [told[f"{key}/{i}"][1:] for i in range(self.count)]

    def _barrier(self, name: str, patience: float) -> None:
        self._store.wait_at_barrier(f"jrope/{name}", int(patience * 1000))

    def _watch(self) -> None:
        """End this process when another one has failed or is gone."""
        everyone = list(range(self.count))
        while not self._over.is_set():
            try:
                alive = self._store.get_live_nodes(everyone)  # each asks, or is dead
                if gone := [i for i in everyone if i not in alive]:
                    self._end_with(self._gone(gone), [*alive])
                line = self._store.blocking_key_value_get("jrope/failed", 1000)
                self._end_with(line, everyone)
            except Exception as error:  # of XLA: its kinds differ between versions
                if "DEADLINE_EXCEEDED" not in str(error) and not self._over.is_set():
                    self._lost()

    def _lost(self) -> None:
        """End where the store is not there any more, or XLA gives up."""
        line = f"{self.name()}: XLA's runtime aborted it (JROPE_DEBUG=1 shows its log)"
        self._end_with(self._gone([0]) if self.index else line)

    def _gone(self, gone: list[int]) -> str:
        names = ", ".join(map(self.name, gone))
        return f"{names} is gone: killed, or its host is; see what it printed last"

    def _end_with(self, line: str, others: Sequence[int] = ()) -> None:
        if self._last_word.acquire(timeout=HEARTBEAT) and not self._over.is_set():
            _briefly(self._linger, others)
            end(line, self._errors)

    def _tell(self, line: str) -> None:
        with contextlib.suppress(Exception):  # another one has failed, too
            self._store.key_value_set("jrope/failed", line)
        self._linger(range(self.count))

    def _linger(self, others: Sequence[int]) -> None:
        """Process 0 keeps the store until the others have heard what is in it."""
        with contextlib.suppress(Exception):
            if self.index and others:
                self._store.key_value_set(f"jrope/heard/{self.index}", "yes")
            while not self.index and self._heard() < len(others) - 1:
                time.sleep(0.05)

    def _heard(self) -> int:
        return len(self._store.key_value_dir_get("jrope/heard/"))

    def _leave(self) -> None:
        """At the interpreter's end: after a failure nobody can be waited for."""
        uncaught = getattr(sys, "last_value", None)
        if uncaught is not None and not self._failed and not self._over.is_set():
            self.fail(uncaught)
        if self._failed:
            _flush()
            os._exit(_STATUS)
        with contextlib.suppress(Exception):
            self.stop()


def _difference(given: Mapping[str, str], usual: Mapping[str, str]) -> str:
    names = [n for n in {**usual, **given} if given.get(n) != usual.get(n)]
    return ", ".join(f"{n} {_apart(given.get(n), usual.get(n))}" for n in names)


def _apart(value: str | None, usual: str | None) -> str:
    """Both, long ones from a little before they part."""
    texts = [text or "none" for text in (value, usual)]
    parted = (i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
    start = max(next(parted, 0) - 20, 0) if max(map(len, texts)) > 60 else 0
    one, other = ("..." * (start > 0) + text[start : start + 60] for text in texts)
    return f"{one!r}, not {other!r}"
