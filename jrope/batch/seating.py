"""The slots of a run as the host knows them."""

from collections.abc import Container, Sequence
from typing import final

import numpy as np

from jrope.batch.packing import Shapes
from jrope.batch.prefix import Prefix
from jrope.batch.seats import Seat

KEEP = 4  # parts of the slots, that hold prefixes at most


@final
class Seating:
    """Rows in their slots, and prefixes that others take theirs from.

    Args:
      slots: how many.
      shapes: of prompts, which say how many groups of devices have them.
    """

    def __init__(self, slots: int, shapes: Shapes) -> None:
        self.seats: list[Seat | None] = [None] * slots
        self.kept = dict[Prefix, int]()  # the slots that hold them, used last come last
        self.ended = list[Seat]()  # but not given yet
        self.own = slots // shapes.groups  # slots of a group
        self._count = shapes.groups

    def __len__(self) -> int:
        return len(self.seats)

    def rows(self) -> list[Seat]:
        """The rows in the slots."""
        return [seat for seat in self.every() if seat.keeps is None]

    def every(self) -> list[Seat]:
        """What the slots hold: rows, and prefixes of others."""
        return [seat for seat in self.seats if seat is not None]

    def free(self) -> list[int]:
        """The slots that hold nothing."""
        return [slot for slot, seat in enumerate(self.seats) if seat is None]

    def groups(self, slots: Sequence[int]) -> list[list[int]]:
        """These slots, by the group of devices that has them."""
        count = range(self._count)
        return [[slot for slot in slots if slot // self.own == i] for i in count]

    def put(self, seat: Seat, slot: int) -> Seat:
        """Give a row, or a prefix, a slot."""
        self.seats[slot] = seat
        seat.slot = seat.source = slot
        return seat

    def keep(self, prefix: Prefix, slot: int) -> None:
        """Note who holds a prefix; of too many, that used longest ago goes."""
        if len(self.kept) >= max(len(self) // KEEP, 1):
            del self.kept[next(iter(self.kept))]  # its slot is free after `let_go`
        self.kept[prefix] = slot

    def use(self, prefix: Prefix) -> int:
        """The slot that holds a prefix, which is the one used last from now on."""
        slot = self.kept[prefix] = self.kept.pop(prefix)
        return slot

    def let_go(self, wanted: Container[Prefix]) -> None:
        """Free the slots of prefixes that no row is to take any more."""
        self.kept = {x: slot for x, slot in self.kept.items() if x in wanted}
        for seat in self.every():
            if seat.keeps is not None and self.kept.get(seat.keeps) != seat.slot:
                self.seats[seat.slot] = None

    def leave(self, seat: Seat) -> None:
        """A row has ended."""
        self.seats[seat.slot] = None
        self.ended.append(seat)

    def text(self, capacity: int) -> np.ndarray:
        """Prompts and new tokens, which guesses are looked up in: int32 [B, S]."""
        text = np.zeros((len(self), capacity), np.int32)
        for seat in self.rows():
            own = np.concatenate([seat.work.prompt, seat.tokens[: seat.count]])
            text[seat.slot, : len(own)] = own
        return text
