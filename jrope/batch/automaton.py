"""Regular expressions as automata over bytes, which outlines_core makes.

Its `Index` of an expression alone (0.2.14) loses texts that go on where a shorter one
ends ("1.5" of `[0-9]+(\\.[0-9]+)?`), and takes time exponential in counted repetitions,
since it also searches from every byte.  Between two bytes that no answer holds an
expression has neither fault.
"""

import importlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from jrope.batch.fields import RowError
from jrope.batch.regex import size

STATES = 2**15  # at most
SIZE = 2**16  # of an expression, see `size`


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


def automaton(name: str, regex: str) -> Automaton:
    """The automaton of the texts that an expression matches as a whole.

    Raises:
      RowError: outlines_core cannot compile it, it matches nothing, it is too long, it
        has too many states, or the package is not installed.
    """
    if (got := size(regex)) > SIZE:
        what = f"it takes {got:,} characters, counting all repetitions"
        raise RowError(f"{name}: {what}, want {SIZE:,} at most", "too_long")
    core = _outlines_core()
    letters = core.Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})
    try:
        index = core.Index(rf"\x00(?:{regex})\x00", letters)
    except ValueError as error:
        why = str(error).partition("\n")[0]
        why = "it matches nothing" if "incompatible with the regex" in why else why
        raise RowError(f"{name}: outlines_core cannot compile it: {why}") from None
    ways: dict[int, dict[int, int]] = index.get_transitions()
    final = index.get_final_states()
    pairs = ((s, t) for s, to in ways.items() for byte, t in to.items() if byte)
    order = reached([ways[index.get_initial_state()][0]], pairs)
    count = len(order)
    if count > STATES:
        raise RowError(
            f"{name}: it takes {count:,} states, want {STATES:,} at most", "too_long"
        )
    number = {state: i for i, state in enumerate(order)}
    after = np.full((256, count + 1), count, np.int32)
    accepting = np.zeros(count + 1, bool)
    for state, i in number.items():
        accepting[i] = ways[state].get(0) in final
        own = [(byte, number[to]) for byte, to in ways[state].items() if 0 < byte < 256]
        for byte, to in own:
            after[byte, i] = to
    return Automaton(after, accepting)


def reached(starts: Iterable[int], pairs: Iterable[tuple[int, int]]) -> list[int]:
    """Where pairs (s, t) lead, from s to t, beginning with these."""
    follow = defaultdict[int, list[int]](list)
    for one, other in dict.fromkeys(pairs):
        follow[one].append(other)
    found = dict.fromkeys(starts)
    waiting = [*found]
    while waiting:
        for state in follow[waiting.pop()]:
            if state not in found:
                found[state] = None
                waiting.append(state)
    return [*found]


def _outlines_core() -> Any:
    try:
        return importlib.import_module("outlines_core")
    except ImportError:
        why = "structured output needs the package outlines_core"
        hint = 'pip install "jrope[structured]"'
        raise RowError(f"{why}; {hint}", "unsupported") from None
