"""`auto`: each round proposes what raises expected tokens over expected time at the current rate.

Draft one depth more, verify siblings, take copied tokens instead of or beside the network's, or propose nothing: all are
priced alike. A node's gain is the probability that it is accepted (`acceptance`), its cost is measured (`costmodel.Prices`),
and the rate between the two is what decoding runs at (`rate`). There is no threshold to set.

Lossless: all nodes are point masses, given the shared noise, so that any of them may be left out. Under the residual rule a
drawn token may not be dropped for what comes after it; there the runner's own chain of fixed length is drafted.

Source: own; the choice of the m best nodes of a batch at measured cost is DSpark's (frontier.md). Differs: siblings, copies
and the draft's own steps are priced, too, and probabilities are learned online.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...batch.batch import Batch
from ...batch.row import Outcome, Row
from ...core.cache import KVCache
from ...core.transfer import to_device, to_host_together
from ...core.tree import TokenTree
from ...costmodel import Prices, RoundCosts
from ..drafter import DraftState, ModelDrafter
from ..law import DraftLaw, draft_law
from ..lookup import NgramIndex
from .acceptance import COPIED, DRAFTED, Array, OnlineLogistic, copied_features, drafted_features
from .offer import Offer, width_of
from .rate import Rate, Worth

NODES = 24  # verified in a round, most, the root not counted
DEPTH = 12  # drafted, most
RANKED = 5  # tokens after a node that are looked at
NGRAM = 3  # longest n-gram that is looked for; a match may be longer
LEAST = 0.02  # nodes that are less probable are never worth verifying
NEAR = 0.15  # of a row's newest round in the mean of how well it went
GREEDY, SAMPLED = 0, 1


@dataclass
class RowState:
    """What is known of one row.

    Attributes:
        index: where its n-grams occurred.
        drafted, copied: how much more was accepted lately than was expected.
    """

    index: NgramIndex = field(default_factory=lambda: NgramIndex(NGRAM))
    drafted: float = 0.0
    copied: float = 0.0


@dataclass
class Level:
    """The tokens that the draft ranked at one depth, `(batch, ranked)` each; `x`: their features."""

    tokens: Array
    log_q: Array
    p: Array
    x: Array


@dataclass
class Plan:
    """A round in progress: what was looked at, to be learned from when its outcome is known."""

    kinds: list[int]
    copies: list[tuple[int, list[int]]]
    levels: list[Level] = field(default_factory=list)
    cost: float = 0.0


class AutoRows:
    """The rows of `auto`, beside the draft's own state."""

    def __init__(self, rows: int) -> None:
        self.rows = [RowState() for _ in range(rows)]
        self.plan: Plan | None = None

    def exchange(self, one: int, other: int) -> None:
        self.rows[one], self.rows[other] = self.rows[other], self.rows[one]

    def copy(self, source: int, goal: int, length: int) -> None:
        self.rows[goal] = RowState()


class AutoDrafter:
    """Proposals by price, from a draft model, from copied tokens, or both.

    Args:
        runner: runs the draft model; None: there is none, and tokens are copied only.
        prices: what things cost on this machine, greedily and sampled; none: a guess, until `set_prices` is called.
        copying, siblings, calibrated, priced: False leaves that part out, for ablations.
    """

    def __init__(
        self,
        runner: ModelDrafter | None,
        prices: Sequence[Prices] = (),
        copying: bool = True,
        siblings: bool = True,
        calibrated: bool = True,
        priced: bool = True,
    ) -> None:
        self.runner, self.prices = runner, list(prices) or [Prices.guess(0.3)] * 2
        self.copying, self.ranked = copying, RANKED if siblings else 1
        self.calibrated, self.priced = calibrated, priced
        self.accepts, self.copies = OnlineLogistic(DRAFTED), OnlineLogistic(COPIED)
        self.rate, self.worth = Rate(2), Worth(2)
        self.forced: tuple[int, int] | None = None  # depths and nodes of every round, while costs are measured
        self._costs: dict[tuple[int, int, int], tuple[RoundCosts, Array]] = {}

    def __repr__(self) -> str:
        return f"AutoDrafter({'copies only' if self.runner is None else repr(self.runner.model)})"

    @property
    def reads_hidden(self) -> bool:
        return self.runner is not None and self.runner.reads_hidden

    def set_prices(self, prices: Sequence[Prices]) -> None:
        """Take measured prices from now on, greedily and sampled."""
        self.prices, self._costs = list(prices), {}

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """See `Drafter`."""
        return self.runner is not None and self.runner.model.compile(mode, say)

    def budget(self, tokens: int) -> int:
        return max(1 + NODES, 0 if self.runner is None else self.runner.budget(tokens))

    def begin(self, rows: int, capacity: int) -> Any:
        state = DraftState(KVCache([], rows, 0)) if self.runner is None else self.runner.begin(rows, capacity)
        state.around = AutoRows(rows)
        return state

    def read(self, batch: Batch) -> None:
        if self.runner is not None:
            self.runner.read(batch)

    # --- a proposal

    def propose(self, batch: Batch) -> TokenTree:
        rows, around = batch.rows, batch.draft.around
        if batch.laws.residual and self.runner is not None:
            around.plan = None
            return self.runner.propose(batch)
        own = around.rows[batch.first : batch.last]
        batch.draft.own.use(batch.first, batch.last)
        kinds = [GREEDY if row.params.greedy else SAMPLED for row in rows]
        costs, verify = self._costs_of(batch, max(kinds))
        rate = len(rows) * self.rate.of(kinds)
        plan = Plan(kinds, [self._copy(row, one) for row, one in zip(rows, own, strict=True)])
        around.plan = plan
        chances = [
            self._of(self.copies, kind, copied_features(match, len(words), one.copied)) if words else np.zeros(0)
            for kind, (match, words), one in zip(kinds, plan.copies, own, strict=True)
        ]
        missing = [1.0 - float(chance[0]) if len(chance) else 1.0 for chance in chances]
        runs = self.runner is not None and (self.forced is not None or self.worth.drafts(kinds, missing))
        if runs:
            self._draft(batch, plan, own, costs, rate)
        return self._chosen(batch, plan, chances, costs, verify, rate)

    def _draft(self, batch: Batch, plan: Plan, own: Sequence[RowState], costs: RoundCosts, rate: float) -> None:
        """Run the draft depth by depth, as long as another one is expected to bring more than it costs."""
        runner, cache, laws = self.runner, batch.draft.own, batch.laws
        assert runner is not None
        recent = np.array([one.drafted for one in own])
        caps = np.array([row.budget - 1 for row in batch.rows])
        tree = TokenTree(batch.roots, 1 + DEPTH)
        frontier = torch.zeros(tree.batch, 1, dtype=torch.long, device=batch.device)
        reach, most = np.ones(len(batch.rows)), min(DEPTH, runner.model.max_lag)
        step = runner.first_step(batch, cache)
        for depth in range(1, most + 1):
            law = draft_law(batch, tree, frontier, step, depth - 1, False)
            plan.levels.append(self._level(law, depth, plan.kinds, recent))
            reach = reach * plan.levels[-1].p[:, 0]
            if depth == most or not self._goes_on(depth, reach * (caps > depth), costs, rate):
                return
            words = law.first(1)[0][..., 0]
            if not laws.bare:  # constraints and penalties look at the path
                frontier = tree.add(frontier, words, torch.zeros_like(words, dtype=torch.float))
            step = runner.next_step(batch, cache, words, depth)

    def _goes_on(self, depth: int, reach: Array, costs: RoundCosts, rate: float) -> bool:
        if self.forced is not None:
            return depth < self.forced[0]
        node = (costs.verify(3 + depth) - costs.verify(1 + depth)) / 2
        # The next token is about as probable as this path's were on average.
        gain = float((reach * reach ** (1 / depth)).sum())
        return gain > rate * (costs.draft + node)

    def _level(self, law: DraftLaw, depth: int, kinds: list[int], recent: Array) -> Level:
        ranked = [one[:, 0] for one in law.first(max(2, self.ranked))]
        tokens, scores, log_q, entropy = to_host_together(*ranked, law.entropy)
        x = drafted_features(scores, log_q, entropy[:, 0], depth, recent)
        if len(set(kinds)) == 1:
            p = self.accepts.of(kinds[0], x)
        else:
            p = np.stack([self.accepts.of(kind, one) for kind, one in zip(kinds, x, strict=True)])
        if not self.calibrated:
            p = np.exp(log_q)
        # Only one token follows a node.
        p = np.minimum(p / np.maximum(1.0, p.sum(1, keepdims=True)), 0.999)
        return Level(tokens.astype(np.int64), log_q, p, x)

    def _of(self, model: OnlineLogistic, kind: int, x: Array) -> Array:
        return np.minimum(model.of(kind, x), 0.999)

    def _copy(self, row: Row, own: RowState) -> tuple[int, list[int]]:
        """Length of the match and what followed it, as far as the row may still emit it."""
        if not self.copying or row.budget < 2:
            return 0, []
        match, words = own.index.match(row.tokens, min(NODES, row.budget - 1))
        if words and row.grammar is not None:
            row.grammar.update(row.new_tokens)
            words = words[: row.grammar.follows(words)]
        return match, words

    def _costs_of(self, batch: Batch, kind: int) -> tuple[RoundCosts, Array]:
        """Costs of a round of this batch, over a plain step of it, and v(1), v(2), …"""
        key = kind, len(batch.rows), batch.cache.longest // 256
        if key not in self._costs:
            costs = self.prices[kind].at(len(batch.rows), batch.cache.longest)
            if not self.priced:
                costs = RoundCosts(0.0, (1, 2), (1.0, 1.0))
            self._costs[key] = costs, np.array([costs.verify(1 + n) for n in range(NODES + 1)])
        return self._costs[key]

    # --- the choice

    def _chosen(
        self, batch: Batch, plan: Plan, chances: list[Array], costs: RoundCosts, verify: Array, rate: float
    ) -> TokenTree:
        offers = [self._offer(i, row, plan, chances[i]) for i, row in enumerate(batch.rows)]
        orders = [offer.best() for offer in offers]
        reaches = [[offer.reach[node] for node in order] for offer, order in zip(offers, orders, strict=True)]
        width = width_of(reaches, verify, rate) if self.forced is None else self.forced[1]
        kept = [offer.numbered(order[:width]) for offer, order in zip(offers, orders, strict=True)]
        width = max(map(len, kept))
        drafting = (costs.start + costs.draft * len(plan.levels)) if plan.levels else 0.0
        plan.cost = drafting + float(verify[width])
        if plan.levels and self.forced is None:
            extra = (plan.cost - 1.0) * rate / len(plan.kinds)
            for i, kind in enumerate(plan.kinds):
                gain = sum(offers[i].reach[node] for node in kept[i])
                self.worth.learn(kind, gain, extra)
        return _tree_of(batch, offers, kept, width, len(plan.levels), self.runner is not None)

    def _offer(self, i: int, row: Row, plan: Plan, chance: Array) -> Offer:
        offer, parent, cap = Offer(), 0, max(0, row.budget - 1)
        for level in plan.levels[:cap]:
            tokens, p, log_q = (one[i, : self.ranked].tolist() for one in (level.tokens, level.p, level.log_q))
            if log_q[0] == -math.inf:  # nothing may follow
                break
            above = offer.reach[parent]
            first = offer.add(parent, tokens[0], above * p[0], log_q[0])
            for k in range(1, len(tokens)):
                if above * p[k] >= LEAST and log_q[k] > -math.inf:
                    offer.add(parent, tokens[k], above * p[k], log_q[k])
            offer.chain.append(first)
            parent = first
        match, words = plan.copies[i]
        if match:
            offer.copy(words[:cap], chance.tolist()[:cap])
        return offer

    # --- what is learned

    def commit(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        around, plan = batch.draft.around, batch.draft.around.plan
        if self.runner is not None:
            self.runner.commit(batch, outcomes)
        if plan is None or self.forced is not None:
            return
        for i, outcome in enumerate(outcomes):
            kind, own, words = plan.kinds[i], around.rows[batch.first + i], plan.copies[i][1]
            self.rate.learn(kind, len(outcome.tokens), plan.cost)
            true = outcome.tokens
            if words:
                same = next((j for j, (a, b) in enumerate(zip(words, true, strict=False)) if a != b), None)
                known = min(len(words), len(true)) if same is None else same + 1
                x = copied_features(plan.copies[i][0], known, own.copied)
                y = np.ones(known)
                y[-1] = float(same is None)
                own.copied += NEAR * (float(y[0]) - float(self.copies.of(kind, x[0])) - own.copied)
                self.copies.learn(kind, x, y)
            self._learn_levels(i, kind, own, plan.levels, true)
        around.plan = None

    def _learn_levels(self, i: int, kind: int, own: RowState, levels: list[Level], true: list[int]) -> None:
        """Learn from the nodes that the target reached: those above the first that it did not take, and that one."""
        for level, token in zip(levels, true, strict=False):
            hits = (level.tokens[i] == token).astype(float)
            self.accepts.learn(kind, level.x[i], hits)
            own.drafted += NEAR * (float(hits[0] - level.p[i, 0]) - own.drafted)
            if not hits[0]:
                return


def _tree_of(
    batch: Batch, offers: list[Offer], kept: list[list[int]], width: int, levels: int, drafts: bool
) -> TokenTree:
    """The tree of the nodes that were kept, `width` a row at most."""
    rows, size = len(offers), 1 + width
    numbers = np.zeros((3, rows, size), dtype=np.int64)
    numbers[1, :, 0] = -1
    valid, score = np.zeros((rows, size), dtype=bool), np.zeros((rows, size), dtype=np.float32)
    valid[:, 0] = True
    memo = np.full((rows, max(1, levels)), -1, dtype=np.int64)
    memo[:, 0] = 0 if levels else -1  # without a draft not even the root was run
    for i, (offer, nodes) in enumerate(zip(offers, kept, strict=True)):
        place = {0: 0}
        for at, node in enumerate(nodes, 1):
            parent = place[offer.parents[node]]
            place[node] = at
            numbers[:, i, at] = offer.tokens[node], parent, numbers[2, i, parent] + 1
            score[i, at] = score[i, parent] + offer.log_q[node]
        valid[i, 1 : len(nodes) + 1] = True
        # The chain's nodes but the last were run, each in the scratch slot of its depth.
        for depth, node in enumerate(offer.chain[: levels - 1], 1):
            memo[i, depth] = place.get(node, -1)
    device = batch.device
    tree = TokenTree.of_host(batch.roots, numbers, valid, score)
    if drafts:
        tree.memo = to_device(memo, device)
    return tree
