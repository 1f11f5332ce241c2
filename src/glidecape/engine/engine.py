"""`Engine`: rows join as slots become free, prompts are read in chunks, and rounds are run until all rows have ended."""

from __future__ import annotations

import itertools
from collections import deque
from contextlib import nullcontext

import torch

from ..batch.batch import Batch
from ..batch.row import Emitted, Row
from ..core.noise import Noise, gumbel
from ..core.stats import Stats
from ..drafting.drafter import Drafter
from ..errors import InputError
from ..target.target import Target, read_chunk
from .pace import Pace
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
        self.ready = 0  # rows whose prompts were read: the first so many of `batch.slots`
        self.pace = Pace(target.chunk, target.device)
        self._read_last = False  # was the last step a chunk?

    @property
    def idle(self) -> bool:
        """Is there nothing to do?"""
        return not self.waiting and not self.batch.slots

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

    def abort(self, row: Row) -> None:
        """Let a row end without another token: its slot is free at the next step."""
        row.finish = row.finish or "abort"
        self.waiting = deque(one for one in self.waiting if one is not row)

    @torch.no_grad()
    def step(self, stats: Stats | None = None) -> list[Emitted]:
        """Read a chunk of a prompt, or run a round, in turn; rows that ended leave, and waiting ones take their slots."""
        started = seconds(self.batch, stats)
        self._fill_slots()
        self._read_last = not (self._read_last and self.ready) and self.read_prompts(self.ready > 0)
        if stats is not None:
            stats.prefill_s += seconds(self.batch, stats) - started
        if self._read_last or not self.ready:
            return []
        with self.pace.round():
            return self._round(0, self.ready, stats)

    def _round(self, first: int, last: int, stats: Stats | None) -> list[Emitted]:
        self.batch.use(first, last)
        return run_round(self.target, self.drafter, self.batch, stats)

    def _fill_slots(self) -> None:
        batch = self.batch
        for slot in reversed([i for i, row in enumerate(batch.slots) if row.finish is not None]):
            batch.release(slot, self.ready)
            self.ready -= slot < self.ready
        newcomers = list(itertools.islice(self.waiting, self.slots - len(batch.slots)))
        # One that has little to read need not wait for one that has much.
        for row in sorted(newcomers, key=lambda one: len(one.tokens) - batch.find(one)[1]):
            # One that waits for a prefix keeps its place, and a slot stays free for it.
            if not batch.worth_waiting(row, self.ready):
                batch.admit(row)
                self.waiting = deque(one for one in self.waiting if one is not row)
        self._count_ready()

    def _unread(self, slot: int) -> int:
        """Tokens of the row in a slot that are still to be read."""
        return len(self.batch.slots[slot].tokens) - 1 - self.batch.cache.length(slot)

    def _count_ready(self) -> None:
        while self.ready < len(self.batch.slots) and not self._unread(self.ready):
            self.ready += 1

    def read_prompts(self, gently: bool = False) -> bool:
        """Read a chunk of the first prompts that were not read yet, side by side; False if all were.

        Args:
            gently: other rows are decoding, so that the chunk is to be small (`Pace`).
        """
        first, last, chunk, longest = self.ready, len(self.batch.slots), self.target.chunk, 0
        if first == last:
            self.batch.use(0, last)
            return False
        if gently:
            longest = self._unread(first)
            last, chunk = first + 1, min(chunk, self.pace.tokens)
            while last < len(self.batch.slots) and self._unread(last) > 0:
                longest = max(longest, self._unread(last))
                if longest * (last + 1 - first) > chunk:
                    break
                last += 1
        with self.pace.chunk(min(longest, chunk) * (last - first)) if gently else nullcontext():
            self._read(first, last, chunk)
        self._count_ready()
        return True

    def _read(self, first: int, last: int, chunk: int) -> None:
        self.batch.use(first, last)
        read_chunk(self.target, [row.tokens for row in self.batch.rows], self.batch.cache, chunk)
        if any(row.drafts for row in self.batch.rows):
            self.drafter.read(self.batch)
