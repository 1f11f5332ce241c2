"""`Pace`: how much of a new prompt is read between two rounds of the rows that are decoding."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch

LEAST = 16  # tokens of a chunk; fewer are hardly faster to read
ROOM = 1.5  # rounds that a chunk may take: rows that are decoding wait for it between two tokens
ROUNDS = 9  # that are remembered: as newcomers join, rounds become longer, and their chunks may, too


class Pace:
    """Chooses chunks that take about as long as one and a half rounds, from the times of the last ones.

    So the rows that are decoding wait for hardly ever more than two rounds, and newcomers get more than half of the time.

    Args:
        most: tokens of a chunk at most.
        device: that computes; a chunk's time is known when it has done so.

    Attributes:
        tokens: of the next chunk, all its rows together.
        rounds: seconds of the last rounds.
        last: seconds of the last round; None where a chunk was before it.
    """

    def __init__(self, most: int, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.most, self.device, self.clock, self.tokens = most, device, clock, 2 * LEAST
        self.rounds: deque[float] = deque(maxlen=ROUNDS)
        self.last: float | None = None
        self._read = False

    @contextmanager
    def chunk(self, tokens: int) -> Iterator[None]:
        """A chunk of so many tokens, all its rows together."""
        began = self.clock()
        yield
        if self.device.type == "cuda" and torch.cuda.is_available():  # tests have a device that is not there
            torch.cuda.synchronize(self.device)
        self._read = True
        if self.rounds:
            self._learn(tokens, self.clock() - began, ROOM * median(self.rounds))

    @contextmanager
    def round(self) -> Iterator[None]:
        """A round, which ends with a wait for the device anyway."""
        began = self.clock()
        yield
        took = self.clock() - began
        self.rounds.append(took)
        self.last, self._read = None if self._read else took, False

    def _learn(self, tokens: int, seconds: float, limit: float) -> None:
        """The next chunk has as many tokens as fit into the limit at this one's pace, if it was about as large as planned."""
        fits = int(tokens * min(2.0, max(0.5, limit / max(seconds, 1e-9))))
        if fits < self.tokens or tokens > self.tokens / 2:
            self.tokens = max(LEAST, min(self.most, fits))
