"""`Pace`: how much of a new prompt is read between two rounds of the rows that are decoding."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

LEAST = 16  # tokens of a chunk; fewer are hardly faster to read


class Pace:
    """Chooses chunks that take about as long as a round, from the times of the last ones.

    So the rows that are decoding wait for at most about one round more. A round ends with a wait for the device, a chunk need
    not: so a chunk's time is that of the chunk and the round after it, less a usual round.

    Args:
        most: tokens of a chunk at most.

    Attributes:
        tokens: of the next chunk, all its rows together.
        rounds: seconds of the last rounds without a chunk before them.
        last: seconds of the last round; None where a chunk was before it.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.most, self.clock, self.tokens = most, clock, 2 * LEAST
        self.rounds: deque[float] = deque(maxlen=31)
        self.last: float | None = None
        self._chunk: tuple[int, float] | None = None  # its tokens, and when it began

    def chunk(self, tokens: int) -> None:
        """A chunk of so many tokens begins, all its rows together."""
        self._chunk = tokens, self.clock()

    @contextmanager
    def round(self) -> Iterator[None]:
        """A round."""
        began = self.clock()
        yield
        self.last = None if self._chunk is not None else self.clock() - began
        if self.last is not None:
            self.rounds.append(self.last)
        elif self.rounds and self._chunk is not None:
            tokens, began = self._chunk
            self._learn(tokens, self.clock() - began - median(self.rounds))
        self._chunk = None

    def _learn(self, tokens: int, seconds: float) -> None:
        limit = median(self.rounds)
        if seconds > limit:
            self.tokens = max(LEAST, int(min(tokens, self.tokens) * max(0.5, limit / seconds)))
        elif seconds < limit / 2 and tokens > self.tokens / 2:
            self.tokens = min(self.most, 2 * self.tokens)
