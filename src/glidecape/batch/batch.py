"""`Batch`: the rows that are decoded together, the target's cache, and the drafter's own state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.cache import KVCache
from ..core.noise import Noise, gumbel
from ..core.transfer import to_device
from .laws import Laws
from .row import Row


class Batch:
    """Rows in flight. Row i is in row slot i of every cache, so the rows are always in the first slots.

    Rows join and leave between rounds: `admit` copies nothing, `release` moves the last row into the gap.

    Attributes:
        slots: all rows.
        rows: the rows in use, neighbours in `slots`, the first of them `slots[first]`: what a round is about.
        cache: the target's, of the rows in use. Invariant of rows that were read:
            `cache.host_lengths[i] == len(rows[i].tokens) - 1`; the root is the token not in the cache.
        draft: the drafter's state, slot by slot; only the drafter looks inside.
    """

    def __init__(self, cache: KVCache, draft: Any = None, noise: Noise = gumbel) -> None:
        self.slots: list[Row] = []
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
        """Give a row the next slot; returns its number."""
        slot = len(self.slots)
        self.slots.append(row)
        self.cache.clear(slot)
        if self.draft is not None:
            self.draft.clear(slot)
        self._changed()
        return slot

    def release(self, slot: int, ready: int | None = None) -> None:
        """Let a row go; the last row takes its slot.

        Args:
            ready: the first so many rows are to stay the first ones: the last of them takes the slot of one of them, and the
                last row of all takes its.
        """
        for last in (ready or 0) - 1, len(self.slots) - 1:
            if slot < last:
                self.slots[slot] = self.slots[last]
                self.cache.move(last, slot)
                if self.draft is not None:
                    self.draft.move(last, slot)
                slot = last
        self.slots.pop()
        self._changed()

    def _changed(self) -> None:
        """All rows are in use, and none has laws yet."""
        self._laws: dict[tuple[int, int], Laws] = {}
        self.use(0, len(self.slots))

    @property
    def device(self) -> torch.device:
        return self.cache.device
