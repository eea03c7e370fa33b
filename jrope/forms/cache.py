"""The forms that rows ask for, as tables; rows with equal forms share one."""

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from typing import Any, TypeAlias, final

from jrope.errors import RowError
from jrope.forms.automaton import Automata
from jrope.forms.request import NAMES, asks, read_form
from jrope.forms.structure import Structure, Vocabulary, make_structure

_KEPT = 2**28  # bytes of tables
Spell: TypeAlias = Callable[[], Sequence[bytes]]
_Key: TypeAlias = tuple[bytes, tuple[int, ...]]


@final
class Forms:
    """Makes forms into tables, each once, as long as it keeps them.

    Args:
      automata: that make expressions into automata.
    """

    def __init__(self, automata: Automata | None = None) -> None:
        self._automata = automata or Automata()
        self._vocabulary: Vocabulary | None = None
        self._made = OrderedDict[_Key, Structure | RowError | None]()
        self._bytes = 0

    def of(
        self, given: Mapping[str, Any], stop_ids: Sequence[int], spell: Spell
    ) -> Structure | None:
        """The table of the form that a row asks for; None: any text.

        Args:
          given: the row's fields, without nulls.
          stop_ids: which end an answer, and so are never inside it.
          spell: the bytes of all tokens, none where one is never in an answer; called
            with the first form, for all.

        Raises:
          RowError: it asks for none that is served, or no answer has this form.
        """
        if not asks(given):
            return None
        text = json.dumps([given.get(name) for name in NAMES], default=repr)
        if self._vocabulary is None:
            self._vocabulary = Vocabulary(spell())
        ends = tuple(sorted(id for id in {*stop_ids} if self._vocabulary.ends[id]))
        key = blake2b(text.encode()).digest(), ends
        if key not in self._made:
            self._keep(key, self._table(given, self._vocabulary, ends))
        self._made.move_to_end(key)
        found = self._made[key]
        if isinstance(found, RowError):
            raise RowError(str(found), found.code)
        return found

    def _table(
        self, given: Mapping[str, Any], vocabulary: Vocabulary, ends: Sequence[int]
    ) -> Structure | RowError | None:
        try:
            if (named := read_form(given, self._automata)) is None:
                return None
            made = self._automata.of(*named)
            return make_structure(named[0], made, vocabulary, ends)
        except RowError as error:
            return error

    def _keep(self, key: _Key, found: Structure | RowError | None) -> None:
        self._made[key] = found
        self._bytes += _size(found)
        while self._bytes > _KEPT and len(self._made) > 1:
            _, old = self._made.popitem(last=False)
            self._bytes -= _size(old)


def _size(found: Structure | RowError | None) -> int:
    if not isinstance(found, Structure):
        return 1024
    return found.table.nbytes + found.classes.nbytes
