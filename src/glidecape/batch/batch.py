"""`Batch`: the rows that are decoded together, the target's cache, and the drafter's own state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.cache import KVCache
from ..core.noise import Noise, gumbel
from ..core.transfer import to_device
from .laws import Laws
from .prefixes import LEAST, Held, Prefixes, shared
from .row import Row


class Batch:
    """Rows in flight. Row i is in row slot i of every cache, so the rows are always in the first slots.

    Rows join and leave between rounds: `admit` copies nothing but a prefix that is there already, `release` moves the last row
    into the gap.

    Attributes:
        slots: all rows.
        rows: the rows in use, neighbours in `slots`, the first of them `slots[first]`: what a round is about.
        cache: the target's, of the rows in use. Invariant of rows that were read:
            `cache.host_lengths[i] == len(rows[i].tokens) - 1`; the root is the token not in the cache.
        draft: the drafter's state, slot by slot; only the drafter looks inside.
        prefixes: what rows that ended left in the slots after the last row.
    """

    def __init__(self, cache: KVCache, draft: Any = None, noise: Noise = gumbel) -> None:
        self.slots: list[Row] = []
        self.prefixes = Prefixes()
        self.cache, self.draft, self.noise = cache, draft, noise
        self._changed()

    def use(self, first: int, last: int) -> None:
        """Run the rows in slots `first` to `last` - 1 from now on."""
        self.first, self.last, self.rows = first, last, self.slots[first:last]
        self.cache.use(first, last)

    @property
    def laws(self) -> Laws:
        """The laws of the rows in use, made anew after a row joined or left."""
        window = self.first, self.last
        if window not in self._laws:
            self._laws[window] = Laws(self.rows, self.cache.device, self.noise)
        return self._laws[window]

    @property
    def roots(self) -> Tensor:
        """Root tokens, `(rows,)`."""
        return to_device([row.tokens[-1] for row in self.rows], self.cache.device)

    @property
    def root_positions(self) -> Tensor:
        """Absolute positions of the roots, `(rows,)`: the committed lengths."""
        return self.cache.lengths

    def admit(self, row: Row) -> int:
        """Give a row the next slot, with the longest prefix of it that some slot holds (`prefixes`); returns its number."""
        slot = len(self.slots)
        source, row.reused = self.find(row)
        place = self.prefixes.place(range(slot, self.cache.slots), source, row.reused)
        if place != slot:
            self._exchange(slot, place)
            source = {slot: place, place: slot}.get(source, source)
        self.prefixes.left.pop(slot, None)
        self._copy(source, slot, row.reused)
        self.slots.append(row)
        self._changed()
        return slot

    def find(self, row: Row) -> tuple[int, int]:
        """The slot that holds most of a row's first tokens, and how many."""
        if row.salt is None:
            return -1, 0
        running = {
            slot: Held(one.tokens[: self.cache.length(slot)], one.salt)
            for slot, one in enumerate(self.slots)
            if one.salt is not None
        }
        return self.prefixes.find(row, running)

    def worth_waiting(self, row: Row, first: int) -> bool:
        """Will a row in the slots from `first` on, which are being read, soon hold much more of a new row's first tokens than
        any slot does now? Then most of them need not be read twice."""
        if row.salt is None:
            return False
        here = self.find(row)[1]
        alike = (one for one in self.slots[first:] if one.salt == row.salt)
        coming = max((shared(row.tokens[:-2], one.tokens[:-1]) for one in alike), default=0)
        return coming - here >= max(LEAST, (len(row.tokens) - here) // 2)

    def release(self, slot: int, ready: int | None = None) -> None:
        """Let a row go; the last row takes its slot.

        Args:
            ready: the first so many rows are to stay the first ones: the last of them takes the slot of one of them, and the
                last row of all takes its.
        """
        if not self.prefixes.leave(slot, self.slots[slot], self.cache.length(slot)):
            self._copy(slot, slot, 0)
        for last in (ready or 0) - 1, len(self.slots) - 1:
            if slot < last:
                self.slots[slot] = self.slots[last]
                self._exchange(last, slot)
                slot = last
        self.slots.pop()
        self._changed()

    def _exchange(self, one: int, other: int) -> None:
        self.prefixes.exchange(one, other)
        self.cache.exchange(one, other)
        if self.draft is not None:
            self.draft.exchange(one, other)

    def _copy(self, source: int, goal: int, length: int) -> None:
        self.cache.copy(source, goal, length)
        if self.draft is not None:
            self.draft.copy(source, goal, length)

    def _changed(self) -> None:
        """All rows are in use, and none has laws yet."""
        self._laws: dict[tuple[int, int], Laws] = {}
        self.use(0, len(self.slots))

    @property
    def device(self) -> torch.device:
        return self.cache.device
