"""`PricedDrafter`: a method whose drafts are as long as they pay, and left out where they do not.

Drafts that pay for one row may lose for sixteen, since a forward's cost grows with the nodes of all its rows. Each round gets
the length that brings most tokens for its cost, by the measured prices of whole rounds of each length (`costmodel.Prices`) at
its number of rows, and by the acceptance of the rounds before. Plain decoding is length 0.

Lossless: a length depends on earlier rounds only.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..batch.batch import Batch
from ..batch.row import Outcome
from ..core.tree import TokenTree
from ..costmodel import Prices
from .drafter import DrafterWrapper, ModelDrafter, NoDraft
from .lookup import LookupDrafter

FIRST = 0.7  # acceptance before anything was seen
NEAR = 1 / 64  # of a row's newest round in the mean acceptance of its kind
PROBE = 64  # rounds without drafts, after which one has some: a text may have become easier
SPAN = 256  # tokens of a context; within them prices are the same
GREEDY, SAMPLED = 0, 1


class PricedDrafter(DrafterWrapper):
    """Drafts as another drafter does, up to the length that pays.

    Args:
        prices: what rounds cost on this machine, greedily and sampled, a size being a depth and the root; none: the whole
            length, until `set_prices` is called.

    Attributes:
        length: depths of the last round, most; 0: it was plain.
        longest: depths of any round, most.
    """

    inner: ModelDrafter | LookupDrafter

    def __init__(self, inner: ModelDrafter | LookupDrafter, prices: Sequence[Prices] = ()) -> None:
        super().__init__(inner)
        self.length = self.longest = inner.limit
        # By kind of law and depth: the chance that a row whose draft was accepted so far has another token accepted.
        self.accepts = [[FIRST] * self.longest for _ in (GREEDY, SAMPLED)]
        self._waited, self._plain = 0, NoDraft()
        self.set_prices(prices)

    def __repr__(self) -> str:
        inner = repr(self.inner) if isinstance(self.inner, ModelDrafter) else type(self.inner).__name__
        return f"PricedDrafter({inner}, {self.longest} depths, {self.inner.budget(1 + self.longest)} nodes)"

    def set_prices(self, prices: Sequence[Prices]) -> None:
        """Take measured prices from now on, greedily and sampled."""
        self.prices = list(prices)
        self._costs: dict[tuple[int, int, int], list[float]] = {}

    def propose(self, batch: Batch) -> TokenTree:
        self.length = self.inner.limit = self._length(batch)
        return self.inner.propose(batch) if self.length else self._plain.propose(batch)

    def commit(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        if not self.length:
            return
        self.inner.commit(batch, outcomes)
        for row, outcome in zip(batch.rows, outcomes, strict=True):
            own, taken = self.accepts[GREEDY if row.params.greedy else SAMPLED], len(outcome.path) - 1
            # A row that ended may have been cut, which says nothing of the draft.
            missed = int(row.finish is None and taken < self.length)
            for depth in range(taken + missed):
                own[depth] += NEAR * (float(depth < taken) - own[depth])

    def _length(self, batch: Batch) -> int:
        """Depths of this round."""
        if not self.prices:
            return self.longest
        best, rate = self.best(
            [GREEDY if row.params.greedy else SAMPLED for row in batch.rows], batch.cache.longest // SPAN
        )
        self._waited = 0 if rate > 1 else self._waited + 1
        if rate > 1 or self._waited >= PROBE:
            self._waited = 0
            return best
        return 0

    def best(self, kinds: Sequence[int], span: int) -> tuple[int, float]:
        """The length, at least 1, that is fastest for rows of these kinds, and its tokens a second over plain decoding's.

        Args:
            span: tokens before the longest row, over `SPAN`.
        """
        costs, tokens, best, most = self._costs_of(max(kinds), len(kinds), span), 1.0, 1, 0.0
        share = [1 - sum(kinds) / len(kinds), sum(kinds) / len(kinds)]  # of the rows, of those that get so deep
        for length in range(1, self.longest + 1):
            share = [part * own[length - 1] for part, own in zip(share, self.accepts, strict=True)]
            tokens += sum(share)
            if tokens / costs[length] > most:
                best, most = length, tokens / costs[length]
        return best, most

    def _costs_of(self, kind: int, rows: int, span: int) -> list[float]:
        """Costs of a round by its length, over a plain one."""
        key = kind, rows, span
        if key not in self._costs:
            costs = self.prices[kind].at(rows, span * SPAN + SPAN // 2)
            self._costs[key] = [costs.verify(1 + length) for length in range(self.longest + 1)]
        return self._costs[key]
