"""`SteadyEngine`: an engine for the requests of strangers, in which a failure ends no other row than its own."""

from __future__ import annotations

import itertools

import torch

from ..batch.prefixes import Prefixes
from ..batch.row import Emitted, Row
from ..core.stats import Stats
from ..drafting.drafter import NoDraft
from .engine import Engine
from .pace import LEAST
from .round import run_round

CALM = 64  # rounds without running out of memory, after which twice as many rows share a forward again


class SteadyEngine(Engine):
    """An `Engine` that runs what failed again for half of its rows, down to the row that fails by itself.

    Such a row is decoded without drafts from then on; one that fails without drafts, too, ends with `finish` "error". After the
    device ran out of memory fewer rows share a forward for a while. Rows with `drafts` False are always decoded plainly.

    Attributes:
        failed: rows that ended with an error, and the error; whoever reads it empties it.
        draft_failures: rows whose drafts failed.
        out_of_memory: how often the device ran out of memory.
        width: rows that share a forward, at most.
    """

    failed: list[tuple[Row, Exception]]
    width: int

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.failed, self.draft_failures, self.out_of_memory = [], 0, 0
        self.width, self._calm = self.slots, 0
        self._plain = NoDraft()

    def restart(self) -> list[Row]:
        """Let all rows go; returns them. For an error that no row is known to be the reason of."""
        rows = [*self.batch.slots, *self.waiting]
        self.waiting.clear()
        while self.batch.slots:
            self.batch.release(len(self.batch.slots) - 1)
        self.batch.prefixes = Prefixes()
        self.ready = 0
        return rows

    def _round(self, first: int, last: int, stats: Stats | None) -> list[Emitted]:
        self._calm += 1
        if self._calm >= CALM and self.width < self.slots:
            self.width, self._calm = min(self.slots, 2 * self.width), 0
        events = []
        for _, run in itertools.groupby(range(first, last), lambda slot: self.batch.slots[slot].drafts):
            slots = list(run)
            for start in range(slots[0], slots[-1] + 1, self.width):
                events += self._try(start, min(start + self.width, slots[-1] + 1), stats)
        return events

    def _try(self, first: int, last: int, stats: Stats | None, plain: bool = False) -> list[Emitted]:
        rows = self.batch.slots[first:last]
        known = [len(row.tokens) for row in rows]
        self.batch.use(first, last)
        plain = plain or not rows[0].drafts
        try:
            return run_round(self.target, self._plain if plain else self.drafter, self.batch, stats)
        except Exception as error:
            self._undo(first, last, known)
            full = self._is_memory(error)
            if last - first > 1:
                middle = (first + last) // 2
                self.width = min(self.width, last - middle) if full else self.width
                return self._try(first, middle, stats, plain) + self._try(middle, last, stats, plain)
            if plain:
                return self._fail(rows[0], error)
        events = self._try(first, last, stats, plain=True)
        if not full and rows[0].finish != "error":
            self._without_drafts(rows[0])
        return events

    def _without_drafts(self, row: Row) -> None:
        self.draft_failures += row.drafts
        row.drafts = False

    def _undo(self, first: int, last: int, known: list[int]) -> None:
        """Bring rows back to what they were before a round that failed somewhere."""
        for slot, count in zip(range(first, last), known, strict=True):
            row = self.batch.slots[slot]
            row.rewind(count)
            self.batch.use(slot, slot + 1)
            self.batch.cache.truncate([count - 1])
            if self.batch.draft is not None and row.drafts:
                self.batch.draft.copy(slot, slot, 0)
                self._catch_up(row)

    def _catch_up(self, row: Row) -> None:
        """Let the drafter read the row in use."""
        try:
            self.drafter.read(self.batch)
        except Exception as error:
            if not self._is_memory(error):
                self._without_drafts(row)

    def _read(self, first: int, last: int, chunk: int) -> None:
        rows = self.batch.slots[first:last]
        try:
            return super()._read(first, last, chunk)
        except Exception as error:
            if last - first > 1:
                for slot in range(first, last):
                    self._read(slot, slot + 1, chunk)
            elif self._is_memory(error) and chunk > LEAST:
                self.pace.tokens = min(self.pace.tokens, chunk // 2)
                self._read(first, last, chunk // 2)
            elif rows[0].drafts:
                self._without_drafts(rows[0])
                self._read(first, last, chunk)
            else:
                self._fail(rows[0], error)

    def _is_memory(self, error: Exception) -> bool:
        """Did the device run out of memory? Then give back what can be given back."""
        told = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if told:
            self.out_of_memory, self._calm = self.out_of_memory + 1, 0
            if self.batch.device.type == "cuda":
                torch.cuda.empty_cache()
        return told

    def _fail(self, row: Row, error: Exception) -> list[Emitted]:
        row.finish = "error"
        self.failed.append((row, error))
        return []
