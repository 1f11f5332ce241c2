"""Prefix reuse: which row slot already holds the first tokens of a new row, and which free slot the row is to take.

A row that ends leaves its tokens in its slot. A new row that begins like them, or like a row in flight, takes the common prefix
from there instead of reading it. The keys and values of a token depend on the tokens before it alone, so they are those that
the row would make itself. So are those of every draft: of its tokens, and of what the target made of them. One of several
layers keeps them of the lag at which a token was drafted, as it does within an answer; what it proposes may differ by that, but
no token that is emitted does, as long as every emitted token is the target's choice (greedy, or with shared noise).
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from .row import Row

LEAST = 16  # tokens of a prefix; fewer are read as fast


@dataclass(frozen=True)
class Held:
    """Tokens that a row slot holds.

    Attributes:
        salt: only rows with the same one may take them.
        when: higher for what was left later.
    """

    tokens: Sequence[int]
    salt: str
    when: int = 0


@dataclass
class Prefixes:
    """What rows that ended left in free row slots.

    Attributes:
        left: by the number of the slot.
    """

    left: dict[int, Held] = field(default_factory=dict)
    _clock: itertools.count[int] = field(default_factory=itertools.count)

    def leave(self, slot: int, row: Row, length: int) -> bool:
        """A row ends, with `length` tokens in the cache; False where nobody may take them."""
        if row.salt is None or row.finish == "error" or length < LEAST:
            return False
        self.left[slot] = Held(row.tokens[:length], row.salt, next(self._clock))
        return True

    def find(self, row: Row, running: dict[int, Held]) -> tuple[int, int]:
        """The slot that holds most of a row's first tokens, and how many; (-1, 0) for none.

        The root is not in the cache, and one token before it is always read, by which the draft catches up.

        Args:
            running: what the slots of rows in flight hold.
        """
        every = self.left | running
        known = [(shared(row.tokens[:-2], held.tokens), slot) for slot, held in every.items() if held.salt == row.salt]
        length, slot = max(known, default=(0, -1))
        return (slot, length) if length >= LEAST else (-1, 0)

    def place(self, free: range, source: int, length: int) -> int:
        """The free slot whose tokens a new row overwrites: those that it goes on with, else none, else the oldest ones.

        Args:
            source, length: where the row's first tokens are, and how many.
        """
        full = all(slot in self.left for slot in free)
        held = self.left.get(source)
        # Where something must go, it is the end of a text that begins alike rather than all of another text.
        if held is not None and (length == len(held.tokens) or (full and 2 * length >= len(held.tokens))):
            return source
        others = [slot for slot in free if slot != source] or free
        return min(others, key=lambda slot: self.left[slot].when if slot in self.left else -1)

    def exchange(self, one: int, other: int) -> None:
        """Two slots change places."""
        moved = {other: self.left.pop(one, None), one: self.left.pop(other, None)}
        self.left |= {slot: held for slot, held in moved.items() if held is not None}


def shared(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the longest common prefix.

    >>> shared([1, 2, 3], [1, 2, 4, 5])
    2
    """
    # Slices are compared faster than tokens one by one.
    most = min(len(one), len(other))
    return bisect_left(range(1, most + 1), True, key=lambda n: one[:n] != other[:n])
