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

from ..core.stats import RoundStats
from ..costmodel import RoundCosts
from ..replay import Expected, Round, expected


def rounds_of(nodes: Sequence[tuple[int, ...]], rounds: Sequence[RoundStats]) -> list[Round]:
    """Rounds from the trees that were proposed and what became of them."""
    return [Round(n, r.accepted, r.emitted) for n, r in zip(nodes, rounds, strict=True)]


def oracle(longest: Sequence[Round], costs: RoundCosts) -> Expected:
    """What the oracle comes to, from rounds of drafts that never stopped early."""
    return expected([r.as_oracle() for r in longest], costs)


def distance(lengths: Sequence[int], accepted: Sequence[int]) -> float:
    """Mean of |drafted - accepted|: how far from the oracle's lengths, at the roots of the longest drafts.

    >>> distance([3, 3, 1], [3, 0, 2])
    1.3333333333333333
    """
    return sum(abs(a - b) for a, b in zip(lengths, accepted, strict=True)) / len(accepted)
