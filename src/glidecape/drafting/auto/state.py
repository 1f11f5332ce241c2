"""What `auto` knows of its rows, and of the round in progress."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ..lookup import NgramIndex
from .acceptance import OnlineLogistic, copied_features
from .offer import Level, Offer
from .rate import Depths
from .timing import COPIES, PLAIN, STEPS, WHOLE

NGRAM = 3  # longest n-gram that is looked for; a match may be longer
GREEDY, SAMPLED = 0, 1  # kinds of law
NEAR = 0.15  # of a row's newest round in the mean of how well it went
SELDOM = 4  # of so many copies that were not proposed, one is learned from


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

    def learn_copies(
        self,
        model: OnlineLogistic,
        kind: int,
        copy: tuple[int, list[int]],
        first: float,
        true: list[int],
        offered: bool,
    ) -> None:
        """Learn from copied tokens: those that the target chose itself, and the first that it did not.

        Args:
            copy: length of the match, and what followed it; first: the expected probability of the first token.
            true: what the target chose; offered: copies were proposed, or at least weighed.
        """
        match, words = copy
        if words:
            self.copied += NEAR * (float(words[0] == true[0]) - first - self.copied)
        self.seen += 1
        # Copies that are not worth verifying are learned from, too, if rarely: each costs time.
        if not words or not (offered or self.seen % SELDOM == 0):
            return
        same = next((j for j, (a, b) in enumerate(zip(words, true, strict=False)) if a != b), None)
        known = min(len(words), len(true)) if same is None else same + 1
        y = np.ones(known)
        y[-1] = float(same is None)
        model.learn(kind, copied_features(match, known, self.copied), y)

    def learn_levels(
        self, model: OnlineLogistic, depths: Depths, kind: int, i: int, levels: list[Level], true: list[int]
    ) -> None:
        """Learn from the nodes that the target reached: those above the first that it did not take, and that one.

        Args:
            i: of this row among those that were drafted for; true: what the target chose.
        """
        accepted, missed = 0, False
        for level, token in zip(levels, true, strict=False):
            hits = (level.tokens[i] == token).astype(float)
            model.learn(kind, level.x[i], hits)
            self.drafted += NEAR * (float(hits[0] - level.p[i, 0]) - self.drafted)
            missed = not hits[0]
            if missed:
                break
            accepted += 1
        if levels:
            depths.note(kind, accepted, missed)


@dataclass
class Plan:
    """A round in progress: what was looked at, to be learned from when its outcome is known.

    Attributes:
        kinds: of law, of each row.
        copies: of each row, the length of the match and the tokens that followed it; `first`: the probability of the first.
        places: of each row, the rate that it counts for: by its law, and by whether copied tokens are likely.
        promised: of each row whose draft ran, the nodes that were expected to be accepted.
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

    def gain(self, rate: float) -> float:
        """Tokens that the chosen nodes are expected to bring beyond a plain round and their cost, at a rate of all rows."""
        nodes = zip(self.offers, self.kept, strict=True)
        return sum(offer.reach[node] for offer, kept in nodes for node in kept) - rate * (self.cost - 1.0)

    @property
    def sort(self) -> str:
        """The sort of this round, for `Timing`."""
        return WHOLE if self.chain else STEPS if self.levels else PLAIN if self.empty else COPIES


class AutoRows:
    """The rows of `auto`, beside the draft's own state."""

    def __init__(self, rows: int) -> None:
        self.rows = [RowState() for _ in range(rows)]
        self.plan: Plan | None = None

    def exchange(self, one: int, other: int) -> None:
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]

    def copy(self, source: int, goal: int, length: int) -> None:
        self.rows[goal] = RowState()
