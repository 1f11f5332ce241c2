"""What a round costs, in units of a plain target step: a start, c a drafted depth, v(n) the verification of n nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RoundCosts:
    """Times over a plain target step.

    Attributes:
        draft: c, of one more depth drafted.
        sizes, verification: v(n) at these numbers of nodes, the root counted; v(1) is 1. Between them it is linear, beyond
            the last it goes on with the last slope.
        start: of a round's drafting, whatever its length; nothing where nothing is drafted.
        whole: of drafting `length` depths by one program that ranks several tokens at each; 0 where there is none.
        chains: lengths of chains that one program drafts, and what drafting and verifying each takes.

    >>> RoundCosts(0.1, (1, 3), (1.0, 1.4), start=0.25).of(2, 1)
    1.65
    """

    draft: float
    sizes: tuple[int, ...] = (1,)
    verification: tuple[float, ...] = (1.0,)
    start: float = 0.0
    length: int = 0
    whole: float = 0.0
    chains: tuple[tuple[int, float], ...] = ()

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

    def of_rows(self, times: int) -> RoundCosts:
        """Costs of so many times the rows, from those of one: a forward takes as long as one of so many nodes in one row.

        What drafting takes stays the same part of a plain step.
        """
        plain = self.verify(times)
        ratios = tuple(self.verify(times * size) / plain for size in self.sizes)
        more = [ratio - own for ratio, own in zip(ratios, self.verification, strict=True)]
        chains = ((n, cost + float(np.interp(1 + n, self.sizes, more))) for n, cost in self.chains)
        return replace(self, verification=ratios, chains=tuple(chains))

    def slower(self, steps: float, chains: float) -> RoundCosts:
        """Costs where a round that drafts step by step takes so many times as long, and one of a whole chain.

        >>> RoundCosts(0.25, (1, 2), (1.0, 1.5), chains=((3, 1.0),)).slower(2.0, 1.5)
        RoundCosts(draft=0.5, sizes=(1, 2), verification=(1.0, 2.0), start=1.0, length=0, whole=0.0, chains=((3, 2.0),))
        """
        if steps == chains == 1.0:
            return self
        return replace(
            self,
            draft=steps * self.draft,
            verification=tuple(1.0 + steps * (one - 1.0) for one in self.verification),
            start=max(0.0, steps * (1.0 + self.start) - 1.0),
            whole=max(0.0, steps * (1.0 + self.whole) - 1.0) if self.length else 0.0,
            chains=tuple((n, max(0.0, chains * (1.0 + cost) - 1.0)) for n, cost in self.chains),
        )

    def of(self, depths: int, nodes: int) -> float:
        """A round that drafts `depths` depths and verifies `nodes` nodes and the root."""
        return (self.start if depths else 0.0) + self.draft * depths + self.verify(1 + nodes)


@dataclass(frozen=True)
class Prices:
    """Seconds that the parts of a round take on a machine, by rows and by tokens before them.

    Attributes:
        rows, contexts: where they were measured, ascending.
        sizes: nodes a row, the root counted; the first is 1.
        verify: `[rows][contexts][sizes]`, all of a round but drafting.
        draft, start: `[rows][contexts]`, one more depth drafted, and what drafting takes besides, however deep.
        length, whole: `[rows][contexts]`, so many depths drafted by one program; 0 and none where there is no such program.
        lengths, chains: `[lengths][rows][contexts]`, so many depths drafted by one program and verified as one chain.
        share: of the time it took to measure this, in which the measuring thread ran; less than 1 where others ran, too.

    >>> prices = Prices((1, 4), (100,), (1, 5), (((1.0, 1.4),), ((1.6, 3.2),)), ((0.1,), (0.4,)), ((0.0,), (0.0,)))
    >>> costs = prices.at(4, 900)
    >>> costs.draft, costs.verify(5), round(prices.at(2, 100).verify(5), 3)
    (0.25, 2.0, 1.667)
    """

    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    sizes: tuple[int, ...]
    verify: tuple[tuple[tuple[float, ...], ...], ...]
    draft: tuple[tuple[float, ...], ...]
    start: tuple[tuple[float, ...], ...]
    length: int = 0
    whole: tuple[tuple[float, ...], ...] = ()
    lengths: tuple[int, ...] = ()
    chains: tuple[tuple[tuple[float, ...], ...], ...] = ()
    share: float = 1.0

    @classmethod
    def guess(cls, draft: float) -> Prices:
        """Where nothing was measured: a depth takes this share of a plain step, a node a thirtieth."""
        return cls((1,), (1,), (1, 31), (((1.0, 2.0),),), ((draft,),), ((0.1,),))

    @classmethod
    def of_json(cls, found: Any) -> Prices:
        """What `dataclasses.asdict` made of one.

        Raises:
            ValueError, TypeError, KeyError: it is something else.
        """
        of_rows, of_contexts, of_sizes, of_lengths = (
            tuple(int(n) for n in found[name]) for name in ("rows", "contexts", "sizes", "lengths")
        )
        verify, draft, start = (np.array(found[name], dtype=float) for name in ("verify", "draft", "start"))
        length = int(found["length"])
        whole, chains = (np.array(found[name], dtype=float) for name in ("whole", "chains"))
        shape = len(of_rows), len(of_contexts)
        of_cells = [draft, start, *([whole] if length else []), *chains]
        if (
            verify.shape != (*shape, len(of_sizes))
            or any(one.shape != shape for one in of_cells)
            or (whole.size and not length)
            or len(chains) != len(of_lengths)
            or of_sizes[:1] != (1,)
        ):
            raise ValueError("prices of another shape")
        if not (np.isfinite(verify).all() and (verify > 0).all() and all((one >= 0).all() for one in of_cells)):
            raise ValueError("prices that are no times")
        nested, *tables = (_frozen(one.tolist()) for one in (verify, draft, start, whole, chains))
        drafted, begun, wholes, of_chains = tables
        points = of_rows, of_contexts, of_sizes
        share = float(found["share"])
        return cls(*points, nested, drafted, begun, length, wholes, of_lengths, of_chains, share)

    def at(self, rows: int, context: int) -> RoundCosts:
        """Costs of a round of so many rows and tokens before them, over a plain step of it: linear between what was measured,
        and on with the last slope beyond it; before it, as at the first. Where one number of rows was measured, the nodes of
        more rows cost as much as so many more nodes of these.

        >>> one = Prices((1,), (9,), (1, 5), (((1.0, 1.4),),), ((0.1,),), ((0.0,),)).at(4, 9)
        >>> round(one.verify(5), 3)  # 20 nodes over 4
        2.231
        """
        (low, high, between), (near, far, on) = _place(self.rows, rows), _place(self.contexts, context)

        def mean(table: Sequence[Sequence[float]]) -> float:
            first, second = ((1 - on) * table[row][near] + on * table[row][far] for row in (low, high))
            return (1 - between) * first + between * second

        times = [mean([[one[k] for one in row] for row in self.verify]) for k in range(len(self.sizes))]
        step = max(1e-9, times[0])
        ratios = tuple(max(1e-9, time) / step for time in times)
        draft, start = (max(0.0, mean(one)) / step for one in (self.draft, self.start))
        whole = max(0.0, mean(self.whole)) / step if self.length else 0.0
        chains = [(length, max(0.0, mean(one)) / step) for length, one in zip(self.lengths, self.chains, strict=True)]
        costs = RoundCosts(draft, self.sizes, ratios, start, self.length, whole, tuple(chains))
        return costs.of_rows(rows // self.rows[0]) if len(self.rows) == 1 and rows > self.rows[0] else costs

    def plain(self, rows: int, context: int) -> float:
        """Seconds of a plain round of so many rows and tokens before them.

        >>> Prices((1, 5), (9,), (1,), (((0.25,),), ((0.75,),)), ((0.0,),) * 2, ((0.0,),) * 2).plain(3, 9)
        0.5
        """
        (low, high, between), (near, far, on) = _place(self.rows, rows), _place(self.contexts, context)
        first, second = ((1 - on) * self.verify[row][near][0] + on * self.verify[row][far][0] for row in (low, high))
        return max(1e-9, (1 - between) * first + between * second)


def _frozen(nested: Any) -> Any:
    """Lists of lists as tuples of tuples."""
    return tuple(map(_frozen, nested)) if isinstance(nested, list) else nested


def _place(points: Sequence[int], at: int) -> tuple[int, int, float]:
    """The two points to take a mean of, and the share of the second; above 1 beyond the last."""
    if len(points) == 1 or at <= points[0]:
        return 0, 0, 0.0
    high = next((k for k, point in enumerate(points) if at <= point), len(points) - 1)
    return high - 1, high, (at - points[high - 1]) / (points[high] - points[high - 1])


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and value at 0 of the straight line through two points, or through the origin if they are one; neither is
    negative.

    >>> line((1, 3), (0.5, 1.5)), line((2, 2), (1.0, 1.0))
    ((0.5, 0.0), (0.5, 0.0))
    """
    slope = max(0.0, (y[1] - y[0]) / (x[1] - x[0]) if x[1] > x[0] else y[1] / x[1])
    return slope, max(0.0, y[0] - slope * x[0])


def chain_speedup(costs: RoundCosts, acceptance: Sequence[float]) -> float:
    """Tokens of a chain for their cost, over plain decoding.

    Args:
        acceptance: at each depth the chance that a node is accepted, given that the one above was; as many as are drafted.

    >>> chain_speedup(RoundCosts(0.25), [0.5, 0.5])
    1.1666666666666667
    """
    tokens = 1.0 + float(np.cumprod(acceptance).sum())
    return tokens / costs.of(len(acceptance), len(acceptance))


def best_length(costs: RoundCosts, acceptance: Sequence[float]) -> tuple[int, float]:
    """The length of a chain that is fastest, and its speed-up; 0 where none is faster than plain decoding.

    >>> best_length(RoundCosts.linear(0.1, 0.05), [0.6] * 8), best_length(RoundCosts(0.9), [0.5])
    ((2, 1.5076923076923077), (0, 1.0))
    """
    found = [(chain_speedup(costs, acceptance[:length]), -length) for length in range(len(acceptance) + 1)]
    speedup, length = max(found)
    return -length, speedup
