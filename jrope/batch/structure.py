"""The form of an answer as a table of states and classes of tokens.

Tokens that lead to the same states from every state are one class: a table has a column
for each, however many tokens there are.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from jrope.batch.automaton import Automaton, automaton, reached
from jrope.batch.fields import RowError

ENTRIES = 2**22  # of a table, and of what it is made from, at most
GO_ON, MAY_STOP, MUST_STOP = 0, 1, 2
_KEPT = 256  # tables, for rows like those that had them


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
class Structures:
    """Makes expressions into tables, each once.

    Args:
      tokens: the bytes of each token; none where it is never in an answer.
    """

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self._tokens = tokens
        self._made = OrderedDict[tuple[str, tuple[int, ...]], Structure | RowError]()

    def of(self, name: str, regex: str, stop_ids: Sequence[int]) -> Structure:
        """The table of the answers that an expression matches as a whole.

        Args:
          name: what errors call it.
          regex: as `automaton` takes it.
          stop_ids: which end an answer, and so are never inside it.

        Raises:
          RowError: no answer has this form, or the table is too large.
        """
        out = tuple(sorted(id for id in {*stop_ids} if self._tokens[id]))
        found = self._made.get((regex, out))
        if found is None:
            tokens = [*self._tokens]
            for id in out:
                tokens[id] = b""
            try:
                found = make_structure(name, automaton(name, regex), tokens)
            except RowError as error:
                found = error
            self._made[regex, out] = found
            if len(self._made) > _KEPT:
                self._made.popitem(last=False)
        self._made.move_to_end((regex, out))
        if isinstance(found, RowError):
            raise RowError(str(found), found.code)
        return found


def make_structure(name: str, made: Automaton, tokens: Sequence[bytes]) -> Structure:
    """The table of an automaton for tokens, without states that lead to no end."""
    ways, which = _ways(name, made, tokens)
    used, classes = np.unique(which, return_inverse=True)
    table = np.stack([ways[i] for i in used], axis=1)
    states = _alive(table, made)
    if not states:
        tokens_ = "the vocabulary's tokens, without those that end the row"
        raise RowError(f"{name}: no text of {tokens_}, has this form")
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
    name: str, made: Automaton, tokens: Sequence[bytes]
) -> tuple[list[np.ndarray], np.ndarray]:
    """Where tokens lead from all states, [S + 1] a class; and each token's class.

    A token leads where its bytes do, one after the other.  Each pair of a class and a
    byte is computed once: most tokens only follow what others have found.
    """
    nowhere = np.full(made.states + 1, made.states, np.int32)
    ways = [nowhere, np.arange(made.states + 1, dtype=np.int32)]  # of no bytes
    known, after = {way.tobytes(): i for i, way in enumerate(ways)}, dict[int, int]()
    which = np.zeros(len(tokens), np.int32)
    for id, token in enumerate(tokens):
        way = 1 if token else 0
        for byte in token:
            step = way << 8 | byte
            if step not in after:
                leads = made.after[byte][ways[way]]
                after[step] = known.setdefault(leads.tobytes(), len(ways))
                if after[step] == len(ways):
                    ways.append(leads)
                    _check_size(name, made.states, len(ways))
            way = after[step]
        which[id] = way
    return ways, which


def _check_size(name: str, states: int, classes: int) -> None:
    if states * classes > ENTRIES or classes > np.iinfo(np.int16).max - 1:
        got = f"{states:,} states and more than {classes:,} classes of tokens"
        wanted = f"{ENTRIES:,} pairs of them at most"
        raise RowError(f"{name}: it takes {got}, want {wanted}", "too_long")


def _alive(table: np.ndarray, made: Automaton) -> list[int]:
    """The states that answers come to and end from, the first one first; or none."""
    size = np.int64(len(table))
    codes = np.unique(np.arange(size)[:, None] * size + table)
    pairs = np.stack(np.divmod(codes, size), axis=1)
    pairs = pairs[(pairs < made.states).all(axis=1)]
    ends = np.flatnonzero(made.accepting)
    ending = {*reached(ends.tolist(), map(tuple, pairs[:, ::-1].tolist()))}
    inside = [(s, t) for s, t in pairs.tolist() if s in ending and t in ending]
    return reached([0], inside) if 0 in ending else []
