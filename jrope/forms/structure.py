"""The form of an answer as a table of states and classes of tokens.

Tokens that lead to the same states from every state are one class: a table has a column
for each, however many tokens there are.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import final

import numpy as np

from jrope.errors import RowError
from jrope.forms.automaton import Automaton

ENTRIES = 2**22  # of a table, and of what it is made from, at most
GO_ON, MAY_STOP, MUST_STOP = 0, 1, 2


@final
@dataclass(frozen=True, eq=False)
class Structure:
    """The form of an answer, told token by token.

    Args:
      table: int32 [S, 1 + K], a row for each state; an answer begins in the first.
        [s, 0] says whether it may end there: GO_ON, MAY_STOP, MUST_STOP.  [s, k] is
        where tokens of class k lead: that state's place in the flat table, or -1.
      classes: int16 [V], from 1 to K, of all tokens.
    """

    table: np.ndarray
    classes: np.ndarray

    def is_over(self, tokens: Sequence[int]) -> bool:
        """Whether nothing can follow these tokens."""
        flat, state = self.table.ravel(), 0
        for token in tokens:
            after = int(flat[state + int(self.classes[token])])
            state = state if after < 0 else after
        return bool(flat[state] == MUST_STOP)


@final
class Vocabulary:
    """All tokens as a tree, in which those with the same first bytes share a path.

    Args:
      tokens: the bytes of each; none where it is never in an answer.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        places, long = {b"": 0}, {token for token in tokens if token}
        self.levels = list[tuple[np.ndarray, np.ndarray]]()
        """Of all paths of 1, 2, ... bytes: where each is, less its last, and that."""
        before, length = {b"": 0}, 1
        while long:
            paths = {token[:length]: i for i, token in enumerate(long)}
            paths = {path: i for i, path in enumerate(paths)}
            parents = np.array([before[path[:-1]] for path in paths], np.int32)
            self.levels.append((parents, np.array([path[-1] for path in paths])))
            places |= {path: len(places) + i for path, i in paths.items()}
            before, length = paths, length + 1
            long = {token for token in long if len(token) >= length}
        self.ends = np.array([places[token] for token in tokens], np.int32)
        """int32 [V], where each token is among all paths, the shorter ones first."""


def make_structure(
    name: str, made: Automaton, vocabulary: Vocabulary, without: Sequence[int] = ()
) -> Structure:
    """The table of an automaton for tokens, without states that lead to no end.

    Args:
      name: what errors call it.
      made: the automaton.
      vocabulary: the tokens.
      without: those that are in no answer, such as ids that end it.

    Raises:
      RowError: no answer has this form, or the table is too large.
    """
    ways, which = _ways(name, made, vocabulary)
    which[[*without]] = 0
    used, classes = np.unique(which, return_inverse=True)
    table = np.stack([ways[i] for i in used], axis=1)
    states = _alive(table, made.accepting)
    if not len(states):
        tokens = "the vocabulary's tokens, without those that end the row"
        raise RowError(f"{name}: no text of {tokens}, has this form")
    numbers = np.full(made.states + 1, -1, np.int32)
    numbers[states] = np.arange(len(states), dtype=np.int32)
    table, merged = np.unique(numbers[table[states]], axis=1, return_inverse=True)
    table = np.where(table < 0, table, table * (1 + table.shape[1]))
    stops = np.where(made.accepting[states], MAY_STOP, GO_ON)
    stops[(table < 0).all(axis=1)] = MUST_STOP
    if stops[0] == MUST_STOP:
        raise RowError(f"{name}: the empty text alone has this form")
    whole = np.column_stack([stops, table]).astype(np.int32)
    return Structure(whole, (merged[classes] + 1).astype(np.int16))


def _ways(
    name: str, made: Automaton, vocabulary: Vocabulary
) -> tuple[list[np.ndarray], np.ndarray]:
    """Where tokens lead from all states, [S + 1] a class; and each token's class.

    A token leads where its bytes do, one after the other.  Each pair of a class and a
    byte is computed once: most tokens only follow what others have found.
    """
    nowhere = np.full(made.states + 1, made.states, np.int32)
    ways = [nowhere, np.arange(made.states + 1, dtype=np.int32)]  # of no bytes
    known = {way.tobytes(): i for i, way in enumerate(ways)}

    @cache
    def number(key: int) -> int:
        """Of where one more byte leads."""
        leads = made.after[key & 255][ways[key >> 8]]
        found = known.setdefault(leads.tobytes(), len(ways))
        if found == len(ways):
            ways.append(leads)
            _check_size(name, made.states, len(ways))
        return found

    level = np.ones(1, np.int32)
    every = [np.zeros(1, np.int32)]  # a token of no bytes leads nowhere
    for parents, last in vocabulary.levels:
        keys, places = np.unique(level[parents] << 8 | last, return_inverse=True)
        level = np.array([*map(number, keys.tolist())], np.int32)[places]
        every.append(level)
    return ways, np.concatenate(every)[vocabulary.ends]


def _check_size(name: str, states: int, classes: int) -> None:
    if states * classes > ENTRIES or classes > np.iinfo(np.int16).max - 1:
        got = f"{states:,} states and more than {classes:,} classes of tokens"
        wanted = f"{ENTRIES:,} pairs of them at most"
        raise RowError(f"{name}: it takes {got}, want {wanted}", "too_long")


def _alive(table: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """The states that answers come to and end from, in order; none without the first.

    Args:
      table: int [S + 1, K], where classes lead; S is a dead end.
      accepting: bool [S + 1].
    """
    count = len(table) - 1
    codes = np.unique(np.arange(count, dtype=np.int64)[:, None] << 32 | table[:-1])
    pairs = np.stack([codes >> 32, codes & 0xFFFFFFFF], axis=1)
    pairs = pairs[pairs[:, 1] < count]
    ending = _reached(np.flatnonzero(accepting), pairs[:, ::-1], count)
    if not ending[0]:
        return np.zeros(0, np.int64)
    return np.flatnonzero(_reached([0], pairs[ending[pairs].all(axis=1)], count))


def _reached(starts: Iterable[int], pairs: np.ndarray, count: int) -> np.ndarray:
    """Where pairs (s, t) lead, from s to t, beginning with these; bool [count]."""
    pairs = pairs[np.argsort(pairs[:, 0], kind="stable")]
    places = np.searchsorted(pairs[:, 0], np.arange(count + 1))
    found, waiting = np.zeros(count, bool), [*starts]
    found[waiting] = True
    while waiting:
        state = waiting.pop()
        after = pairs[places[state] : places[state + 1], 1]
        after = after[~found[after]]
        found[after] = True
        waiting += after.tolist()
    return found
