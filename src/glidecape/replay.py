"""Stop policies replayed: the rounds that any draft length would have made, from a record of one draft at every token.

The output does not depend on the draft, greedily and given shared noise. So how much of each draft is accepted is known at
the end of a text, and with it the rounds of every policy: each begins where the one before ended. This is exact where a
draft from a token does not depend on the policy either: for draft LMs, and for GliDe of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .costmodel import RoundCosts


@dataclass(frozen=True)
class Recorded:
    """A draft made to its end at one token.

    Attributes:
        uncertainty: sqrt(0.15 H) after each depth; the last one may be left out.
        nodes: nodes down to each depth, the root excluded.
        accepted: depths that are accepted.
    """

    uncertainty: tuple[float, ...]
    nodes: tuple[int, ...]
    accepted: int

    def length(self, threshold: float) -> int:
        """Depths that SVIP would have drafted: the uncertain one is kept."""
        above = (depth for depth, u in enumerate(self.uncertainty, 1) if u > threshold)
        return next(above, len(self.nodes))


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
    """What rounds come to under a cost model: `speedup` is tokens for the cost of a plain step, the others are means a
    round."""

    speedup: float
    acceptance_length: float
    depths: float
    nodes: float
    accepted: float


def replay(text: Sequence[Recorded], length: Callable[[Recorded], int]) -> list[Round]:
    """The rounds of a policy over a text, from the drafts at all its tokens.

    Args:
        length: depths that the policy drafts; at least one of them is.

    >>> text = [Recorded((), (1, 2), accepted=1), Recorded((), (1, 2), 2), Recorded((), (1,), 0)]
    >>> [(one.nodes, one.emitted) for one in replay(text, lambda draft: 2)]
    [((1, 2), 2), ((1,), 1)]
    """
    rounds, at = [], 0
    while at < len(text):
        nodes = text[at].nodes[: max(1, length(text[at]))]
        accepted = min(text[at].accepted, len(nodes))
        rounds.append(Round(nodes, accepted, min(accepted + 1, len(text) - at)))
        at += accepted + 1
    return rounds


def expected(rounds: Sequence[Round], costs: RoundCosts) -> Expected:
    """Tokens for their cost.

    >>> costs = RoundCosts(0.1, (1, 2), (1.0, 1.1))
    >>> one = Round((1, 2, 3), accepted=1, emitted=2)
    >>> [round(expected(r, costs).speedup, 3) for r in ([one], [one.as_oracle()])]
    [1.25, 1.667]
    """
    count, emitted = len(rounds), sum(r.emitted for r in rounds)
    return Expected(
        emitted / sum(r.cost(costs) for r in rounds),
        emitted / count,
        sum(len(r.nodes) for r in rounds) / count,
        sum(r.nodes[-1] for r in rounds if r.nodes) / count,
        sum(r.accepted for r in rounds) / count,
    )
