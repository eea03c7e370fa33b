"""Structures on the device, where decoding looks up what tokens may come next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jrope.forms.structure import MAY_STOP, MUST_STOP, Structure
from jrope.sharding.axes import ONE, Axes, entry
from jrope.sharding.meshes import Layout
from jrope.sharding.vocabulary import pick

ENTRIES = 2**20  # at first, of what is held; it grows by 4
_Arrays: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Rules:
    """Some structures, one after the other, and which of them the rows follow."""

    table: jax.Array  # int32 [N], tables of `Structure`
    classes: jax.Array  # int16 [G, V], theirs
    starts: jax.Array  # int32 [G], where each table begins
    which: jax.Array  # int32 [B], each row's; 0 allows everything
    states: jax.Array  # int32 [B], each row's, from where its table begins


def rules_specs(layout: Layout) -> Any:
    """How `Rules` are split."""
    whole: Any = PartitionSpec()
    rows: Any = layout.rows()
    classes: Any = PartitionSpec(None, entry(layout.axes.tensor))
    return Rules(table=whole, classes=classes, starts=whole, which=rows, states=rows)


def allowed(
    rules: Rules, states: jax.Array, stop_ids: jax.Array, axes: Axes = ONE
) -> jax.Array:
    """Whether each row may draw each token, bool [B, V]; stop ids where it may end."""
    at = rules.starts[rules.which] + states
    classes = rules.classes[rules.which].astype(jnp.int32)
    ways = rules.table[at[:, None] + classes]
    may_stop = rules.table[at] >= MAY_STOP
    rows = jnp.arange(at.shape[0], dtype=jnp.int32)[:, None]
    ids = axes.local_ids(stop_ids, classes.shape[1])
    ids = jnp.where(stop_ids < 0, classes.shape[1], ids)
    return (ways >= 0).at[rows, ids].set(may_stop[:, None], mode="drop")


def after(
    rules: Rules, states: jax.Array, tokens: jax.Array, axes: Axes = ONE
) -> tuple[jax.Array, jax.Array]:
    """The states [B] behind one more token each, and whether nothing can follow."""
    starts = rules.starts[rules.which]
    classes = pick(rules.classes[rules.which].astype(jnp.int32), tokens, axes)
    ways = rules.table[starts + states + classes]
    states = jnp.where(ways < 0, states, ways)
    return states, rules.table[starts + states] == MUST_STOP


def no_rules(slots: int, vocabulary: int, entries: int) -> Rules:
    """Of the shapes that `Held` gives, for rows without structures."""
    shapes: dict[str, Any] = {
        "table": np.zeros(entries, np.int32),
        "classes": np.zeros((slots + 1, vocabulary), np.int16),
        "starts": np.zeros(slots + 1, np.int32),
        "which": np.zeros(slots, np.int32),
        "states": np.zeros(slots, np.int32),
    }
    return Rules(**shapes)


@final
class Held:
    """What the device holds of structures, to be used again by the next rows.

    Args:
      vocabulary: tokens.
      slots: rows at once.
      layout: where the model stands; None: on no mesh.
    """

    def __init__(
        self, vocabulary: int, slots: int, layout: Layout | None = None
    ) -> None:
        free = np.array([[MAY_STOP, 0]], np.int32)
        self._free = Structure(free, np.ones(vocabulary, np.int16))
        self._empty, self._entries = no_rules(slots, vocabulary, ENTRIES), ENTRIES
        self._layout = layout
        self._numbers: dict[Structure, int] = {}
        self._arrays: _Arrays | None = None

    def rules(self, rows: Sequence[tuple[Structure | None, int]]) -> Rules:
        """The rules for rows with these structures in these states; None: all free."""
        wanted = {s: None for s, _ in rows if s is not None}
        if self._arrays is None or not wanted.keys() <= self._numbers.keys():
            self._arrays = self._placed([*wanted])
        table, classes, starts = self._arrays
        which = [0 if s is None else self._numbers[s] for s, _ in rows]
        own: dict[str, Any] = {
            "which": np.array(which, np.int32),
            "states": np.array([state for _, state in rows], np.int32),
        }
        return Rules(table=table, classes=classes, starts=starts, **own)

    def _placed(self, wanted: list[Structure]) -> _Arrays:
        """Arrays with these structures, and the earlier ones if there is room."""
        every = [*dict.fromkeys([self._free, *self._numbers, *wanted])]
        if self._size(every) > self._entries or len(every) > len(self._empty.starts):
            every = [self._free, *wanted]
        while self._size(every) > self._entries:
            self._entries *= 4
        self._numbers = {structure: i for i, structure in enumerate(every)}
        table = np.zeros(self._entries, np.int32)
        classes, starts = np.array(self._empty.classes), np.array(self._empty.starts)
        at = 0
        for i, structure in enumerate(every):
            size = structure.table.size
            table[at : at + size] = structure.table.ravel()
            classes[i], starts[i], at = structure.classes, at, at + size
        arrays = jnp.asarray(table), jnp.asarray(classes), jnp.asarray(starts)
        if self._layout is None:
            return arrays
        specs = rules_specs(self._layout)
        own = specs.table, specs.classes, specs.starts
        return self._layout.place(arrays, own)

    def _size(self, structures: Sequence[Structure]) -> int:
        return sum(structure.table.size for structure in structures)
