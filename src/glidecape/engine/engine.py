"""`Engine`: rows join as slots become free, prompts are read in chunks, and rounds are run until all rows have ended."""

from __future__ import annotations

from collections import deque

import torch

from ..batch.batch import Batch
from ..batch.row import Emitted, Row
from ..core.noise import Noise, gumbel
from ..core.stats import RoundStats, Stats
from ..drafting.drafter import Drafter
from ..errors import InputError
from ..target.target import Target, read_chunk
from .round import run_round, seconds


class Engine:
    """Decodes rows in a fixed number of row slots.

    Args:
        rows: row slots: most rows that are decoded together.
        tokens: most tokens of a row, prompt and output together.
        new_tokens: most tokens that a row emits.
        noise: shared noise.
        limit_bytes: refuse a target cache that would take more.

    Raises:
        InputError: the cache would take more than `limit_bytes`.

    A row's tokens do not depend on the rows beside it, nor on when it joined.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        rows: int,
        tokens: int,
        new_tokens: int,
        noise: Noise = gumbel,
        limit_bytes: int | None = None,
    ) -> None:
        self.target, self.drafter, self.slots, self.tokens = target, drafter, rows, tokens
        # Room for a proposal after the longest row, and for the padding of ragged catch-ups.
        capacity = tokens + 2 * drafter.budget(new_tokens) + 2
        cache = target.new_cache(rows, capacity, limit_bytes, drafter.reads_hidden)
        self.batch = Batch(cache, drafter.begin(rows, capacity), noise)
        self.waiting: deque[Row] = deque()

    @property
    def idle(self) -> bool:
        """Is there nothing to do?"""
        return not self.waiting and not self.batch.rows

    def submit(self, row: Row) -> None:
        """Let a row wait for a free slot; it is decoded by the calls of `step` that follow.

        Raises:
            InputError: it is too long for a slot.
        """
        if len(row.tokens) + row.params.max_new_tokens > self.tokens:
            raise InputError(
                f"prompt {row.index} with max_new_tokens {row.params.max_new_tokens} takes "
                f"{len(row.tokens) + row.params.max_new_tokens} tokens, and a row slot has {self.tokens}"
            )
        self.waiting.append(row)

    @torch.no_grad()
    def step(self, stats: Stats | None = None) -> list[Emitted]:
        """Read a chunk of a prompt, or run a round; rows that ended leave, and waiting ones take their slots."""
        started = seconds(self.batch, stats)
        ended = self._end_empty_rows()
        self._fill_slots()
        reads = self.read_prompts()
        if stats is not None:
            stats.prefill_s += seconds(self.batch, stats) - started
        if reads or not self.batch.rows:
            return ended
        return ended + run_round(self.target, self.drafter, self.batch, stats)

    def _end_empty_rows(self) -> list[Emitted]:
        """End the waiting rows that may not emit anything: their prompts need not be read."""
        empty = [row for row in self.waiting if row.budget == 0]
        for row in empty:
            row.finish = "length"
            self.waiting.remove(row)
        return [Emitted(row.index, [], [], RoundStats(0, 0, 0, 0), "length") for row in empty]

    def _fill_slots(self) -> None:
        rows = self.batch.rows
        for slot in reversed([i for i, row in enumerate(rows) if row.finish is not None]):
            if self.waiting:
                self.batch.replace(slot, self.waiting.popleft())
            else:
                self.batch.release(slot)
        while self.waiting and len(rows) < self.slots:
            self.batch.admit(self.waiting.popleft())

    def read_prompts(self) -> bool:
        """Read a chunk of the first rows, side by side, whose prompts were not read yet; False if all were."""
        lengths, rows = self.batch.cache.host_lengths, self.batch.rows
        unread = [n < len(row.tokens) - 1 for n, row in zip(lengths, rows, strict=True)]
        if True not in unread:
            return False
        first = unread.index(True)
        last = first + [*unread[first:], False].index(False)
        span = self.batch.span(first, last)
        read_chunk(self.target, [row.tokens for row in span], self.batch.cache)
        self.drafter.read(self.batch, first, last)
        self.batch.cache.use(0, len(rows))
        return True
