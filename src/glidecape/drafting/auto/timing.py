"""What rounds of a batch take in truth, over their price: that was measured in another process, on rounds that look at nothing.

Medians are kept, because a round that another program disturbed takes ten times as long.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from statistics import median
from time import perf_counter

PLAIN, COPIES, WHOLE, STEPS = "plain", "copies", "whole chain", "steps"  # sorts of rounds
WINDOW = 9  # rounds of a sort whose median counts
ENOUGH = 3  # rounds of a sort that must have been timed
COLD = 2  # rounds of a sort that do not count after those of another: they find other weights in the CPU's cache
NEAR = 32  # rounds that are compared with plain ones after these: later the machine may run at another speed
MEMORY = 256  # rounds of a place after which half of a correction is forgotten
MOST, LEAST = math.log(2.0), math.log(0.75)

Place = tuple[int, int]  # kind of law and number of rows


class Timing:
    """By sort of round and by place, how much longer rounds take than priced, over what plain rounds take there.

    One row is not timed: prices are right there, and a machine of changing speed would spoil them.

    Only ratios count, so that a machine that slows down as a whole changes nothing. A correction fades while its sort is not
    run, and while no plain round is: then the sort is tried again.

    >>> timing, now = Timing(lambda: now), 0.0
    >>> def rounds(sort, cost, seconds, times):
    ...     global now
    ...     for _ in range(times):
    ...         timing.begin()
    ...         now += seconds
    ...         timing.note((0, 4), sort, cost * timing.of((0, 4), sort))
    >>> rounds(PLAIN, 1.0, 0.5, 8); rounds(WHOLE, 2.0, 1.5, 16)
    >>> round(timing.of((0, 4), WHOLE), 2), timing.of((0, 4), COPIES)
    (1.5, 1.0)
    >>> rounds(PLAIN, 1.0, 0.5, 2 * MEMORY)
    >>> round(timing.of((0, 4), WHOLE), 2)
    1.11
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.clock = clock
        self._began: float | None = None
        self._places: dict[Place, _Place] = {}
        self._now: tuple[Place, str] | None = None
        self._alike = 0  # rounds in a row at this place and of this sort

    def begin(self) -> None:
        """A round begins."""
        self._began = self.clock()

    def note(self, place: Place, sort: str, cost: float) -> None:
        """The round ends. `cost`: what it was expected to take, corrected, in plain rounds."""
        began, self._began = self._began, None
        self._alike = self._alike + 1 if self._now == (place, sort) else 1
        self._now = place, sort
        if began is None or place[1] == 1:
            return
        self._places.setdefault(place, _Place()).note(sort, self.clock() - began, cost, self._alike > COLD)

    def wants_plain(self, place: Place) -> bool:
        """Is it unknown how long plain rounds take there now?"""
        there = self._places.get(place)
        return place[1] > 1 and (there is None or len(there.plain) < ENOUGH or there.waited > MEMORY)

    def of(self, place: Place, sort: str) -> float:
        """A round of this sort takes so many times its price."""
        there = self._places.get(place)
        return 1.0 if there is None else math.exp(there.errors.get(sort, 0.0))


class _Place:
    """Seconds of plain rounds, and the logarithm of each sort's correction, of one kind of law and number of rows.

    Attributes:
        waited: rounds since the last plain one that counted.
        found: logarithms of seconds over their price, by sort.
    """

    def __init__(self) -> None:
        self.plain: deque[float] = deque(maxlen=WINDOW)
        self.waited = 0
        self.found: dict[str, deque[float]] = {}
        self.errors: dict[str, float] = {}

    def note(self, sort: str, seconds: float, cost: float, warm: bool) -> None:
        compared = len(self.plain) >= ENOUGH and self.waited < NEAR
        for other in self.errors:
            if other != sort or not compared:
                self.errors[other] *= 0.5 ** (1 / MEMORY)
        self.waited += 1
        # Copies come in between, and cost what they cost there.
        if not warm and sort != COPIES:
            return
        if sort == PLAIN:
            if self.waited > NEAR:
                self.plain.clear()
            self.plain.append(seconds)
            self.waited = 0
        elif compared:
            found = self.found.setdefault(sort, deque(maxlen=WINDOW))
            found.append(
                self.errors.get(sort, 0.0) + math.log(max(1e-9, seconds) / max(1e-9, median(self.plain) * cost))
            )
            if len(found) >= ENOUGH:
                self.errors[sort] = max(LEAST, min(MOST, median(found)))
