"""How much other programs disturb a measurement: the share of its time in which the measuring thread had a processor."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

LEAST_SHARE = (
    0.85  # of a measurement that counts; 0.99 on an idle machine, 0.6 beside one busy thread for each processor
)


class Share:
    """The share of the time inside `counting` in which this thread ran, over all its blocks."""

    def __init__(self) -> None:
        self.whole = self.own = 0.0
        self.began: float | None = None

    @contextmanager
    def counting(self) -> Iterator[None]:
        self.began, own = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            self.whole, self.began = self.so_far, None
            self.own += time.thread_time() - own

    @property
    def so_far(self) -> float:
        """Seconds since the block began, and those of the blocks before."""
        return self.whole + (0.0 if self.began is None else time.perf_counter() - self.began)

    @property
    def value(self) -> float:
        """From 0 to 1; 1 where nothing was measured."""
        return round(min(1.0, self.own / self.whole), 3) if self.whole else 1.0
