"""Regular expressions as automata over bytes, which `compiler` makes in its process.

outlines_core's `Index` of an expression alone (0.2.14) loses texts that go on where a
shorter one ends ("1.5" of `[0-9]+(\\.[0-9]+)?`), and takes time exponential in counted
repetitions, since it also searches from every byte.  Between two bytes that no answer
holds an expression has neither fault.
"""

import contextlib
import json
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from threading import Timer
from typing import Any, BinaryIO, cast, final

import numpy as np

from jrope.errors import RowError
from jrope.forms import compiler
from jrope.forms.regex import check_length, size

STATES = 2**15  # at most
SIZE = 2**16  # of an expression, see `size`
MEMORY, SECONDS = 2**30, 30.0  # for one expression


@final
@dataclass(frozen=True, eq=False)
class Automaton:
    """States, of which the first is where a text begins.

    Args:
      after: int32 [256, S + 1], where a byte leads from a state; S is a dead end.
      accepting: bool [S + 1], where a text may end.
    """

    after: np.ndarray
    accepting: np.ndarray

    @property
    def states(self) -> int:
        """S."""
        return len(self.accepting) - 1


@final
class Automata:
    """Makes automata in one process for all, which is begun anew where it was ended.

    Args:
      memory: bytes that the process may take, where the platform can limit them.
      seconds: for one expression.
    """

    def __init__(self, memory: int = MEMORY, seconds: float = SECONDS) -> None:
        self._memory, self._seconds = memory, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._end: Callable[[], object] = lambda: None

    def of(self, name: str, regex: str) -> Automaton:
        """The automaton of the texts that an expression matches as a whole.

        Raises:
          RowError: outlines_core cannot compile it, or not within the limits, it
            matches nothing, it is too long, it has too many states, or the package is
            not installed.
        """
        check_length(name, len(regex))
        if (got := size(regex)) > SIZE:
            what = f"it takes {got:,} characters, counting all repetitions"
            raise RowError(f"{name}: {what}, want {SIZE:,} at most", "too_long")
        head, body = self._answer(name, rf"\x00(?:{regex})\x00")
        if "error" in head:
            raise RowError(f"{name}: outlines_core cannot compile it: {head['error']}")
        if not (count := head["states"]):
            raise RowError(f"{name}: {compiler.NOTHING}")
        if count > STATES:
            raise RowError(
                f"{name}: it takes {count:,} states, want {STATES:,} at most",
                "too_long",
            )
        after = np.frombuffer(body, np.int32, 256 * (count + 1))
        accepting = np.frombuffer(body, bool, offset=after.nbytes)
        return Automaton(after.reshape(256, count + 1), accepting)

    def _answer(self, name: str, regex: str) -> tuple[dict[str, Any], bytes]:
        process = self._begun()
        late = Timer(self._seconds, process.kill)
        begin = time.monotonic()
        late.start()
        try:
            return _asked(process, regex)
        except BaseException as error:  # Ctrl-C, too, leaves half an answer
            self._end()
            if not isinstance(error, OSError | ValueError):
                raise
        finally:
            late.cancel()
        what = f"ended, as it does where it needs more than {self._memory:,} bytes"
        if time.monotonic() - begin >= self._seconds:
            what = f"took more than {self._seconds:g} s"
        hint = "give lower counts, and less that repeats inside of what repeats"
        raise RowError(f"{name}: outlines_core {what}: {hint}", "too_long")

    def _begun(self) -> subprocess.Popen[bytes]:
        """The process; a session of its own keeps Ctrl-C from it."""
        if self._process is None or self._process.poll() is not None:
            if find_spec("outlines_core") is None:
                why = "structured output needs the package outlines_core"
                hint = 'pip install "jrope[structured]"'
                raise RowError(f"{why}; {hint}", "unsupported")
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    compiler.__file__,
                    str(self._memory),
                    str(STATES),
                ],
                stdin=pipe,
                stdout=pipe,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            self._end = weakref.finalize(self, _end, self._process)
        return self._process


def _asked(
    process: subprocess.Popen[bytes], regex: str
) -> tuple[dict[str, Any], bytes]:
    """The answer to a line; a ValueError where it is cut short."""
    given, taken = cast(BinaryIO, process.stdin), cast(BinaryIO, process.stdout)
    given.write(json.dumps(regex).encode() + b"\n")
    given.flush()
    head = json.loads(taken.readline())
    body = taken.read(head["bytes"])
    if len(body) < head["bytes"]:
        raise ValueError
    return head, body


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with contextlib.suppress(OSError):  # what was not written yet
        process.communicate()
