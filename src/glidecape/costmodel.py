"""What a round costs, in units of a plain target step: a start, c a drafted depth, v(n) the verification of n nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class RoundCosts:
    """Times over a plain target step.

    Attributes:
        draft: c, of one more depth drafted.
        sizes, verification: v(n) at these numbers of nodes, the root counted; v(1) is 1. Between them it is linear, beyond
            the last it goes on with the last slope.
        start: of a round's drafting, whatever its length; nothing where nothing is drafted.

    >>> RoundCosts(0.1, (1, 3), (1.0, 1.4), start=0.25).of(2, 1)
    1.65
    """

    draft: float
    sizes: tuple[int, ...] = (1,)
    verification: tuple[float, ...] = (1.0,)
    start: float = 0.0

    @classmethod
    def linear(cls, draft: float, node: float, start: float = 0.0) -> RoundCosts:
        """Costs where each node to verify takes `node` more."""
        return cls(draft, (1, 2), (1.0, 1.0 + node), start)

    def verify(self, nodes: int) -> float:
        """v(nodes), the root counted."""
        points = list(zip(self.sizes, self.verification, strict=True))
        if len(points) == 1 or nodes <= points[0][0]:
            return points[0][1]
        (low, at_low), (high, at_high) = next((pair for pair in pairwise(points) if nodes <= pair[1][0]), points[-2:])
        return at_low + (at_high - at_low) * (nodes - low) / (high - low)

    def of(self, depths: int, nodes: int) -> float:
        """A round that drafts `depths` depths and verifies `nodes` nodes and the root."""
        return (self.start if depths else 0.0) + self.draft * depths + self.verify(1 + nodes)


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and value at 0 of the straight line through two points, or through the origin if they are one; neither is
    negative.

    >>> line((1, 3), (0.5, 1.5)), line((2, 2), (1.0, 1.0))
    ((0.5, 0.0), (0.5, 0.0))
    """
    slope = max(0.0, (y[1] - y[0]) / (x[1] - x[0]) if x[1] > x[0] else y[1] / x[1])
    return slope, max(0.0, y[0] - slope * x[0])
