"""What rounds take in truth, over their price: prices were measured in another process, on rounds that look at nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from time import perf_counter

PLAIN, COPIES, WHOLE, STEPS = "plain", "copies", "whole chain", "steps"  # sorts of rounds
LEARNED = 1 / 4  # of a round's error in the correction of its sort
MEMORY = 256  # rounds of a place after which half of a correction is forgotten
LEAST_PLAIN = 3  # plain rounds that must have been timed before others are compared with them
CLIP = math.log(1.5)  # one round changes a correction by a part of this at most, because it may have been disturbed
MOST, LEAST = math.log(3.0), math.log(0.75)

Place = tuple[int, int]  # kind of law and number of rows


class Timing:
    """By sort of round and by place, how much longer rounds take than priced, over what plain rounds take there.

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
    (1.49, 1.0)
    >>> rounds(PLAIN, 1.0, 0.5, 2 * MEMORY)
    >>> round(timing.of((0, 4), WHOLE), 2)
    1.11
    """

    def __init__(self, clock: Callable[[], float] = perf_counter) -> None:
        self.clock = clock
        self._began: float | None = None
        self._places: dict[Place, _Place] = {}
        self._before: tuple[Place, str] | None = None

    def begin(self) -> None:
        """A round begins."""
        self._began = self.clock()

    def note(self, place: Place, sort: str | None, cost: float) -> None:
        """The round ends. `cost`: what it was expected to take, corrected, in plain rounds; `sort`: None: a round that is
        not timed."""
        began, self._began = self._began, None
        after, self._before = self._before, None if sort is None else (place, sort)
        if began is None or sort is None:
            return
        self._places.setdefault(place, _Place()).note(sort, self.clock() - began, cost, after == (place, sort))

    def wants_plain(self, place: Place) -> bool:
        """Is it unknown how long plain rounds take there now?"""
        there = self._places.get(place)
        return there is None or there.plains < LEAST_PLAIN or there.waited > MEMORY

    def of(self, place: Place, sort: str) -> float:
        """A round of this sort takes so many times its price."""
        there = self._places.get(place)
        return 1.0 if there is None else math.exp(there.errors.get(sort, 0.0))


class _Place:
    """Seconds of a plain round, and the logarithm of each sort's correction, of one kind of law and number of rows."""

    def __init__(self) -> None:
        self.plain_s, self.plains, self.waited = 0.0, 0, 0
        self.errors: dict[str, float] = {}

    def note(self, sort: str, seconds: float, cost: float, among_its_like: bool) -> None:
        for other in self.errors:
            if other != sort:
                self.errors[other] *= 0.5 ** (1 / MEMORY)
        self.waited += 1
        # The first round of its sort finds other weights in the CPU's cache, and the draft may have much to read.
        if not among_its_like and sort != COPIES:
            return
        if sort == PLAIN:
            self._plain(seconds)
        elif self.plains >= LEAST_PLAIN and self.waited <= MEMORY:
            error = math.log(max(1e-9, seconds) / (self.plain_s * max(1e-9, cost)))
            learned = self.errors.get(sort, 0.0) + LEARNED * max(-CLIP, min(CLIP, error))
            self.errors[sort] = max(LEAST, min(MOST, learned))
        elif sort in self.errors:
            self.errors[sort] *= 0.5 ** (1 / MEMORY)

    def _plain(self, seconds: float) -> None:
        self.waited, self.plains = 0, self.plains + 1
        if self.plains == 1:
            self.plain_s = seconds
        usual = max(self.plain_s / 1.5, min(1.5 * self.plain_s, seconds))
        self.plain_s += max(LEARNED / 2, 1 / self.plains) * (usual - self.plain_s)
