"""Are the probabilities that `auto` goes by true? The nodes that it offered, by predicted probability, and what became of them.

A node counts as reached if all its ancestors were accepted. Only then is it known whether the target takes it, and only then is
its probability, which is given that its parent was accepted, put to the test.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .offer import Offer

BINS = 10


@dataclass(frozen=True)
class Offered:
    """One row's round: what could have been offered, the nodes that were, and the tokens that the target chose from the root
    on, the bonus token last."""

    offer: Offer
    kept: Sequence[int]
    chosen: Sequence[int]


@dataclass
class Bin:
    """The offered nodes of a tenth of [0, 1]: all of them; those reached, the sum of their predicted probabilities, and
    how many were accepted."""

    offered: int = 0
    reached: int = 0
    predicted: float = 0.0
    accepted: int = 0


def reliability(rounds: Iterable[Offered]) -> list[Bin]:
    """The bins of these rounds, the least probable first.

    >>> offer = Offer()
    >>> first = offer.add(0, 7, 0.95)
    >>> kept = [first, offer.add(0, 8, 0.04), offer.add(first, 9, 0.57)]
    >>> found = reliability([Offered(offer, kept, [7, 5])])
    >>> [(n, one.reached, round(one.predicted, 2), one.accepted) for n, one in enumerate(found) if one.offered]
    [(0, 1, 0.04, 0), (6, 1, 0.6, 0), (9, 1, 0.95, 1)]
    """
    bins = [Bin() for _ in range(BINS)]
    for one in rounds:
        offer, depth_of = one.offer, {0: 0}  # of the accepted nodes
        for node in one.kept:  # parents before their children
            above = offer.parents[node]
            p = offer.reach[node] / max(offer.reach[above], 1e-12)
            own = bins[min(int(BINS * p), BINS - 1)]
            own.offered += 1
            depth = depth_of.get(above)
            if depth is None or depth >= len(one.chosen):
                continue
            own.reached, own.predicted = own.reached + 1, own.predicted + p
            if one.chosen[depth] == offer.tokens[node]:
                own.accepted += 1
                depth_of[node] = depth + 1
    return bins


def calibration_error(bins: Iterable[Bin]) -> float:
    """Expected calibration error: mean distance of predicted and observed frequency over the bins, weighted by the nodes
    reached.

    >>> calibration_error([Bin(9, 4, 1.0, 2), Bin(8, 6, 5.0, 5)])
    0.1
    """
    bins = list(bins)
    distance = sum(abs(one.predicted - one.accepted) for one in bins)
    return distance / max(1, sum(one.reached for one in bins))
