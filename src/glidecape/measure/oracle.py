"""Draft lengths against the oracle that knows how many tokens will be accepted, all under one cost model.

The oracle drafts, at each root, exactly what will be accepted there, and nothing where nothing will be. Its rounds begin
where those of a draft that never stops early begin, because both emit the accepted tokens and one more; so they are known
from one decode with the longest drafts. That holds where the output is fixed: greedily, or given shared noise.

Where a draft step and its node together cost more than a plain step, drafting is not worth it at all and the oracle, which
drafts whatever will be accepted, is not the best there is.

Source: the oracle of the SVIP paper (EMNLP 2025), which counts tokens. Differs: here it has a cost, so the gap is in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..stats import RoundStats
from .costs import RoundCosts


@dataclass(frozen=True)
class Round:
    """One round: nodes down to each depth that was drafted (root excluded), accepted and emitted tokens."""

    nodes: tuple[int, ...]
    accepted: int
    emitted: int

    def cost(self, costs: RoundCosts) -> float:
        """Over a plain target step."""
        return costs.of(len(self.nodes), self.nodes[-1] if self.nodes else 0)

    def as_oracle(self) -> Round:
        """The same tokens, drafted down to the last accepted depth only."""
        return Round(self.nodes[: self.accepted], self.accepted, self.emitted)


@dataclass(frozen=True)
class Expected:
    """What rounds come to under a cost model; everything a round but `speedup`, tokens for the cost of a plain step."""

    speedup: float
    acceptance_length: float
    depths: float
    nodes: float


def joined(nodes: Sequence[tuple[int, ...]], rounds: Sequence[RoundStats]) -> list[Round]:
    """Rounds from the trees that were proposed and what became of them."""
    return [Round(n, r.accepted, r.emitted) for n, r in zip(nodes, rounds, strict=True)]


def expected(rounds: Sequence[Round], costs: RoundCosts) -> Expected:
    """Tokens for their cost.

    >>> costs = RoundCosts(0.1, (1, 2), (1.0, 1.1))
    >>> one = Round((1, 2, 3), accepted=1, emitted=2)
    >>> [round(expected(r, costs).speedup, 3) for r in ([one], [one.as_oracle()])]
    [1.25, 1.667]
    """
    cost = sum(r.cost(costs) for r in rounds)
    count = len(rounds)
    emitted = sum(r.emitted for r in rounds)
    drafted = sum(r.nodes[-1] for r in rounds if r.nodes)
    return Expected(emitted / cost, emitted / count, sum(len(r.nodes) for r in rounds) / count, drafted / count)


def oracle(longest: Sequence[Round], costs: RoundCosts) -> Expected:
    """What the oracle comes to, from rounds of drafts that never stopped early."""
    return expected([r.as_oracle() for r in longest], costs)


def distance(lengths: Sequence[int], accepted: Sequence[int]) -> float:
    """Mean of |drafted - accepted|: how far from the oracle's lengths, at the roots of the longest drafts.

    >>> distance([3, 3, 1], [3, 0, 2])
    1.3333333333333333
    """
    return sum(abs(a - b) for a, b in zip(lengths, accepted, strict=True)) / len(accepted)
