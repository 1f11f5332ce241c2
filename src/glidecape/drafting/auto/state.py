"""What `auto` knows of its rows, and of the round in progress."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..lookup import NgramIndex
from .offer import Level, Offer

NGRAM = 3  # longest n-gram that is looked for; a match may be longer
GREEDY, SAMPLED = 0, 1  # kinds of law


@dataclass
class RowState:
    """What is known of one row.

    Attributes:
        index: where its n-grams occurred.
        drafted, copied: how much more was accepted lately than was expected.
        seen: rounds.
    """

    index: NgramIndex = field(default_factory=lambda: NgramIndex(NGRAM))
    drafted: float = 0.0
    copied: float = 0.0
    seen: int = 0


@dataclass
class Plan:
    """A round in progress: what was looked at, to be learned from when its outcome is known.

    Attributes:
        kinds: of law, of each row.
        copies: of each row, the length of the match and the tokens that followed it; `first`: the probability of the first.
        places: of each row, the rate that it counts for: by its law, and by whether copied tokens are likely.
        promised: of each row whose draft ran, the nodes that were expected to be accepted.
        asked: the row for which the draft ran without a proposal, -1 if it did for none; `asked_levels`: what it ranked.
        cost: in plain rounds; empty: nothing was proposed; chain: the runner's own chain was.
    """

    kinds: list[int]
    copies: list[tuple[int, list[int]]]
    levels: list[Level] = field(default_factory=list)
    cost: float = 0.0
    empty: bool = False
    chain: bool = False
    first: list[float] = field(default_factory=list)
    offers: list[Offer] = field(default_factory=list)
    kept: list[list[int]] = field(default_factory=list)
    promised: list[float] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    asked: int = -1
    asked_levels: list[Level] = field(default_factory=list)


class AutoRows:
    """The rows of `auto`, beside the draft's own state."""

    def __init__(self, rows: int) -> None:
        self.rows = [RowState() for _ in range(rows)]
        self.plan: Plan | None = None

    def exchange(self, one: int, other: int) -> None:
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]

    def copy(self, source: int, goal: int, length: int) -> None:
        self.rows[goal] = RowState()
