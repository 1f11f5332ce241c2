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
    """Rows in flight. Row i is in row slot i of every cache, so the rows are always the first slots.

    Rows join and leave between rounds: `admit` and `replace` copy nothing, `release` moves the last row into the gap.

    Attributes:
        rows: the rows.
        cache: the target's. Invariant of rows that were read: `cache.host_lengths[i] == len(rows[i].tokens) - 1`; the root is
            the token not in the cache.
        draft: the drafter's state, row by row; only the drafter looks inside.
    """

    def __init__(self, cache: KVCache, draft: Any = None, noise: Noise = gumbel) -> None:
        self.rows: list[Row] = []
        self.cache, self.draft, self.noise = cache, draft, noise
        self._laws: Laws | None = None
        cache.use(0, 0)

    @property
    def laws(self) -> Laws:
        """The laws of the rows, made anew after a row joined or left."""
        if self._laws is None:
            self._laws = Laws(list(self.rows), self.cache.device, self.noise)
        return self._laws

    @property
    def roots(self) -> Tensor:
        """Root tokens, `(rows,)`."""
        return to_device([row.tokens[-1] for row in self.rows], self.cache.device)

    @property
    def root_positions(self) -> Tensor:
        """Absolute positions of the roots, `(rows,)`: the committed lengths."""
        return self.cache.lengths

    def span(self, first: int, last: int) -> list[Row]:
        """Run the rows `first` to `last` - 1 from now on; returns them."""
        self.cache.use(first, last)
        return self.rows[first:last]

    def admit(self, row: Row) -> int:
        """Give a row the next slot; returns its number."""
        self.rows.append(row)
        self._changed(len(self.rows) - 1)
        return len(self.rows) - 1

    def replace(self, slot: int, row: Row) -> None:
        """Give a row the slot of one that ended."""
        self.rows[slot] = row
        self._changed(slot)

    def release(self, slot: int) -> None:
        """Let a row go; the last row takes its slot."""
        last = self.rows.pop()
        if slot < len(self.rows):
            self.rows[slot] = last
            self.cache.move(len(self.rows), slot)
            if self.draft is not None:
                self.draft.move(len(self.rows), slot)
        self._laws = None
        self.cache.use(0, len(self.rows))

    def _changed(self, slot: int) -> None:
        self.cache.clear(slot)
        if self.draft is not None:
            self.draft.clear(slot)
        self._laws = None
        self.cache.use(0, len(self.rows))

    @property
    def device(self) -> torch.device:
        return self.cache.device
