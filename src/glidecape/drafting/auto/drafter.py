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
from functools import partial
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ...batch.batch import Batch
from ...batch.row import Outcome, Row
from ...core.cache import KVCache
from ...core.tree import TokenTree
from ...costmodel import Prices, RoundCosts
from ...drafts.program import NetworkDraft
from ..drafter import DraftState, ModelDrafter, lone_roots
from ..law import draft_law
from .acceptance import COPIED, DRAFTED, Array, OnlineLogistic, copied_features
from .offer import Level, Offer, copies_gain, levels_of, offer_of, reach_of, tree_of, width_of
from .rate import Depths, Lead, Probes, Rate, Settled, Tries, Worth
from .reliability import Offered
from .state import GREEDY, SAMPLED, AutoRows, Plan, RowState
from .timing import COPIES, STEPS, WHOLE, Timing

NODES = 24  # verified in a round, most, the root not counted
DEPTH = 12  # drafted, most
CHAIN = 4  # of which one program drafts so many
CHAINS = (2, 3, CHAIN)  # that are drafted and verified without a look at them
RANKED = 5  # tokens after a node that are looked at
STAY = 0.4  # tokens a row by which a proposal node by node must be better than the chain of the last rounds: means are noisy
DOUBT = 0.1  # the same of no proposal at all: about the deviation of the mean of a chain's gain
CLEAR = 1.3  # of a plain round's speed is more than what prices are wrong by
LITTLE = 0.25  # tokens a row that copies of a batch must bring beyond their cost, or not each round is looked through for them
LIKELY = 0.5  # copied tokens that are as probable are weighed node by node


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
        self.rate, self.worth = Rate(4), Worth(2)
        self.depths = Depths(2, DEPTH)
        self.lead, self.probes, self._had_chain = Lead(2), Probes(), True
        # Of the newest round: may chains be tried for this batch, and do they not pay?
        self.tries, self._has_tries, self._hopeless = Tries(), False, False
        self._settled, self.timing = Settled(), Timing()
        self.timed = False
        self.offered: list[Offered] | None = None  # a list: every round's offers are put into it, for `reliability`
        self._costs: dict[tuple[int, int, int], tuple[RoundCosts, Array]] = {}

    def __repr__(self) -> str:
        return f"AutoDrafter({'copies only' if self.runner is None else repr(self.runner.model)})"

    @property
    def reads_hidden(self) -> bool:
        return self.runner is not None and self.runner.reads_hidden

    def set_prices(self, prices: Sequence[Prices], timed: bool = False) -> None:
        """Take these prices from now on, greedily and sampled. `timed`: they were measured on this machine, and rounds are
        timed, too, to correct them."""
        self.prices, self._costs, self.timed = list(prices), {}, timed and self.priced

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """See `Drafter`."""
        if self.runner is None or not self.runner.compile(mode, say):
            return False
        model = self.runner.model
        if isinstance(model, NetworkDraft):
            model.compile_chain(min(CHAIN, model.max_lag), RANKED, mode, say)
            for length in CHAINS:
                model.compile_chain(min(length, model.max_lag), 1, mode, say)
        return True

    @property
    def length(self) -> int:
        """Depths that one program drafts, ranking several tokens at each; 0: there is none."""
        programs = self._programs
        return programs[-1][0] if programs else 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of chains that one program drafts."""
        return tuple(length for length, ranked in self._programs if ranked == 1)

    @property
    def _programs(self) -> list[tuple[int, int]]:
        """Lengths and ranked tokens of the programs that draft chains and are of use here, the longest with most tokens last;
        all of them or none."""
        model = None if self.runner is None else self.runner.model
        if not isinstance(model, NetworkDraft):
            return []
        lengths = [min(length, model.max_lag) for length in CHAINS]
        wanted = {*((length, 1) for length in lengths), (lengths[-1], RANKED)}
        return sorted(wanted) if wanted <= model.chains.keys() else []

    def budget(self, tokens: int) -> int:
        return max(1 + NODES, 0 if self.runner is None else self.runner.budget(tokens))

    def begin(self, rows: int, capacity: int) -> DraftState:
        state = DraftState(KVCache([], rows, 0)) if self.runner is None else self.runner.begin(rows, capacity)
        state.around = AutoRows(rows)
        return state

    def read(self, batch: Batch) -> None:
        if self.runner is not None:
            self.runner.read(batch)

    # --- a proposal

    def propose(self, batch: Batch) -> TokenTree:
        rows, around = batch.rows, _own(batch)
        self.timing.begin()
        if batch.laws.residual and self.runner is not None:
            around.plan, self.runner.limit = None, self.runner.cap
            return self.runner.propose(batch)
        kinds = [GREEDY if row.params.greedy else SAMPLED for row in rows]
        if self._settled.rests and self._may_rest(batch, kinds):
            around.plan = plan = Plan(kinds, [(0, [])] * len(kinds), places=[2 * kind for kind in kinds])
            return self._again(batch, plan)
        own = around.rows[batch.first : batch.last]
        batch.draft.own.use(batch.first, batch.last)
        costs, verify, copying = self._costs_of(batch, max(kinds))
        plan = Plan(kinds, [self._copy(row, one) for row, one in zip(rows, own, strict=True)])
        around.plan = plan
        plan.first = [
            self.copies.one(kind, (1.0, math.log(match), 0.0, one.copied)) if words else 0.0
            for kind, (match, words), one in zip(kinds, plan.copies, own, strict=True)
        ]
        plan.places = [2 * kind + (p > LIKELY) for kind, p in zip(kinds, plan.first, strict=True)]
        rate = len(rows) * self.rate.of(plan.places)
        missing = [1.0 - p for p in plan.first]
        if self.runner is not None and (chain := self._best_chain(batch, kinds, missing, costs, rate)):
            if not self._hopeless:
                if self._compares(kinds, chain):
                    return self._nothing(batch, plan)
                self._settle(plan, chain)
            self.tries.ran(not self._hopeless)
            return self._chain(batch, plan, chain)
        if self._drafts(kinds, missing):
            self._draft(batch, plan, own, costs, rate)
        elif self._nothing_pays(plan, copying, rate):
            # In a batch one row may have likely copies, and there are too few for all together: it stays so for some rounds.
            self._settle(plan, (0, 0.0), alone=len(rows) == 1)
            return self._again(batch, plan)
        else:
            verify = copying
        tree = self._chosen(batch, plan, self._chances(plan, own), costs, verify, rate)
        little = len(rows) > 1 and not plan.levels and plan.gain(rate) < LITTLE * len(rows)
        self._settle(plan, (0, 0.0) if little else None, alone=not little)
        return tree

    def _settle(self, plan: Plan, choice: tuple[int, float] | None, alone: bool = True) -> None:
        self._settled.note(plan.kinds, choice, alone and max(plan.first) > LIKELY)

    def _may_rest(self, batch: Batch, kinds: list[int]) -> bool:
        """May this round do as those before? Not where rows are of other laws, or the draft is to be asked again."""
        settled = self._settled
        if settled.place != settled.place_of(kinds) or not batch.laws.bare:
            settled.rests = 0
            return False
        settled.rests -= 1
        if settled.length:
            self.probes.chains += 1
            return True
        if self._hopeless:
            return not self.tries.wait()
        return self.runner is None or not self.worth.drafts(kinds, [1.0] * len(kinds))

    def _again(self, batch: Batch, plan: Plan) -> TokenTree:
        """The chain that was chosen last, or nothing."""
        length, cost = self._settled.length, self._settled.cost
        return self._chain(batch, plan, (length, cost)) if length else self._nothing(batch, plan)

    def _chain(self, batch: Batch, plan: Plan, chain: tuple[int, float]) -> TokenTree:
        """The runner's own, of this length and cost."""
        assert self.runner is not None
        self.runner.limit, plan.cost, plan.chain = chain[0], 1.0 + chain[1], True
        return self.runner.propose(batch)

    def _nothing_pays(self, plan: Plan, verify: Array, rate: float) -> bool:
        """Do copied tokens bring less than verifying one of them costs, where nothing is drafted?"""
        return sum(plan.first) <= rate * (verify[1] - verify[0])

    def _chances(self, plan: Plan, own: Sequence[RowState]) -> list[Array]:
        """The probabilities of each row's copied tokens, each given the one before."""
        return [
            self._of(self.copies, kind, copied_features(match, len(words), one.copied)) if words else np.zeros(0)
            for kind, (match, words), one in zip(plan.kinds, plan.copies, own, strict=True)
        ]

    def _best_chain(
        self, batch: Batch, kinds: list[int], missing: list[float], costs: RoundCosts, rate: float
    ) -> tuple[int, float] | None:
        """Length and cost of the runner's own chain that is worth most, or that a batch tries; None: it is not worth more than
        a proposal node by node, which takes longer to think of, or than none."""
        rows, had, many = len(kinds), self._had_chain, len(kinds) > 1
        possible = bool(costs.chains) and batch.laws.bare
        self._has_tries = many and possible
        self._hopeless = self._has_tries and self._hopeless
        if not possible or min(missing) < 1 - LIKELY:
            return None
        # A few lucky rounds do not begin chains in a batch: a try does, or what its texts are like over a longer time.
        gain = partial(self.depths.gain, kinds, usual=many and not had)
        value, length, cost = max((gain(n) - rate * cost, n, cost) for n, cost in costs.chains)
        # To begin again costs a batch something: all rows must be caught up with. So it begins where that is clearly worth it.
        doubt = had - many
        pays = value + DOUBT * rows * doubt > 0.0
        self._hopeless = many and not pays
        if self._hopeless and self.tries.left:
            self._had_chain = True
            return length, cost
        self._had_chain = pays and self.lead.of(kinds) <= STAY * rows * had
        if not self._had_chain:
            self.depths.forget(kinds)
            return None
        self.lead.forget(kinds)
        self.worth.pays(kinds)
        asks = not many or self.worth.of(kinds, missing) >= 0
        return None if asks and self.probes.due(self.depths.gain(kinds, length) / rows) else (length, cost)

    def _compares(self, kinds: list[int], chain: tuple[int, float]) -> bool:
        """Run a plain round instead of this chain? It is to be timed where the chain gains little by its price."""
        if not self.timed or not self.timing.wants_plain((max(kinds), len(kinds))):
            return False
        return 1.0 + self.depths.gain(kinds, chain[0]) / len(kinds) < CLEAR * (1.0 + chain[1])

    def _drafts(self, kinds: list[int], missing: list[float]) -> bool:
        if self._hopeless:
            self.tries.wait()
        if self._hopeless or self.runner is None:
            return False
        return self.worth.of(kinds, missing) >= 0 if self._has_tries else self.worth.drafts(kinds, missing)

    def _nothing(self, batch: Batch, plan: Plan) -> TokenTree:
        """The empty proposal. Not even the root was run, so the draft is not told of it, either."""
        plan.cost, plan.empty = 1.0, True
        return lone_roots(batch.roots)

    def _draft(self, batch: Batch, plan: Plan, own: Sequence[RowState], costs: RoundCosts, rate: float) -> None:
        """Run the draft, as long as another depth is expected to bring more than it costs: the first few depths by one
        program, where that is cheaper, and then depth by depth."""
        runner, cache, laws = self.runner, batch.draft.own, batch.laws
        assert runner is not None
        runner.resume(batch)
        recent = np.array([one.drafted for one in own])
        caps = np.array([row.budget - 1 for row in batch.rows])
        frontier = torch.zeros(len(batch.rows), 1, dtype=torch.long, device=batch.device)
        # Constraints and penalties look at the path.
        tree = lone_roots(batch.roots) if laws.bare else TokenTree(batch.roots, 1 + DEPTH)
        whole = None
        if self._by_one_program(plan.kinds, costs, rate):
            whole = runner.draft_whole(batch, cache, costs.length, RANKED)
        if whole is None:
            plan.cost = costs.start
            law = draft_law(batch, tree, frontier, runner.first_step(batch, cache), 0, False)
            ranked = [*law.first(RANKED), law.entropy]
        else:
            plan.cost = costs.whole - costs.length * costs.draft
            ranked = [*whole[:3], whole.entropy]
        plan.levels = self._levels(ranked, 1, plan.kinds, recent)
        reach, wanted = np.ones(len(batch.rows)), 0
        for depth in range(1, min(DEPTH, runner.model.max_lag)):
            level = plan.levels[depth - 1]
            reach, wanted = reach * level.p[:, 0], depth
            if not self._goes_on(depth, reach * (caps > depth), costs, rate):
                break
            if depth < len(plan.levels):
                continue
            if not laws.bare:
                frontier = tree.add(frontier, level.first, torch.zeros_like(level.first, dtype=torch.float))
            law = draft_law(batch, tree, frontier, runner.next_step(batch, cache, level.first, depth), depth, False)
            plan.levels += self._levels([*law.first(RANKED), law.entropy], depth + 1, plan.kinds, recent)
        plan.cost += costs.draft * len(plan.levels)
        for kind in plan.kinds:
            self.depths.want(kind, wanted)

    def _by_one_program(self, kinds: list[int], costs: RoundCosts, rate: float) -> bool:
        """Is a chain by one program expected to gain more than one that ends where the next depth is not worth it?"""
        if not costs.length:
            return False
        deep = max(self.depths.wanted[kind] for kind in kinds)
        node = (costs.verify(1 + costs.length) - 1.0) / costs.length
        of_steps = self.depths.gain(kinds, deep) - rate * (costs.start + (costs.draft + node) * deep)
        return self.depths.gain(kinds, costs.length) - rate * (costs.whole + node * costs.length) >= of_steps

    def _goes_on(self, depth: int, reach: Array, costs: RoundCosts, rate: float) -> bool:
        node = (costs.verify(3 + depth) - costs.verify(1 + depth)) / 2
        # The next token is about as probable as this path's were on average.
        gain = float((reach * reach ** (1 / depth)).sum())
        return gain > rate * (costs.draft + node)

    def _levels(self, ranked: Sequence[Tensor], depth: int, kinds: list[int], recent: Array) -> list[Level]:
        return levels_of(ranked, depth, kinds, recent, self.accepts if self.calibrated else None)

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

    def _costs_of(self, batch: Batch, kind: int) -> tuple[RoundCosts, Array, Array]:
        """Costs of a round of this batch, over a plain step of it; v(1), v(2), … beside the draft; and the same without it."""
        rows = len(batch.rows)
        key = kind, rows, batch.cache.longest // 256
        if key not in self._costs:
            costs = self.prices[kind].at(rows, batch.cache.longest)
            if not self.priced:
                costs = RoundCosts(0.0, (1, 2), (1.0, 1.0))
            self._costs[key] = costs, np.array([costs.verify(1 + n) for n in range(NODES + 1)])
        costs, verify = self._costs[key]
        steps, chain, copies = (self.timing.of((kind, rows), sort) for sort in (STEPS, WHOLE, COPIES))
        copying = copies * verify
        copying[0] = 1.0
        return costs.slower(steps, chain), 1.0 + steps * (verify - 1.0), copying

    # --- the choice

    def _chosen(
        self, batch: Batch, plan: Plan, chances: list[Array], costs: RoundCosts, verify: Array, rate: float
    ) -> TokenTree:
        offers = [self._offer(i, row, plan, chances[i]) for i, row in enumerate(batch.rows)]
        orders = [offer.best() for offer in offers]
        reaches = [[offer.reach[node] for node in order] for offer, order in zip(offers, orders, strict=True)]
        width = self._width(reaches, verify, rate)
        kept = [offer.numbered(order[:width]) for offer, order in zip(offers, orders, strict=True)]
        width = max(map(len, kept))
        plan.offers, plan.kept = offers, kept
        if plan.levels:
            self._learn_worth(plan, chances, costs, verify, rate / len(plan.kinds))
        plan.cost += float(verify[width])
        if width == 0 and not plan.levels:
            return self._nothing(batch, plan)
        return tree_of(batch.roots, offers, kept, width, len(plan.levels), self.runner is not None)

    def _width(self, reaches: list[list[float]], verify: Array, rate: float) -> int:
        return width_of(reaches, verify, rate)

    def _learn_worth(self, plan: Plan, chances: list[Array], costs: RoundCosts, verify: Array, rate: float) -> None:
        """What the draft is expected to bring beyond copies, and beyond a chain. `rate`: of a row."""
        width = max(map(len, plan.kept))
        each = zip(plan.kinds, plan.offers, plan.kept, chances, plan.first, strict=True)
        for i, (kind, offer, kept, chance, first) in enumerate(each):
            promised = sum(offer.reach[node] for node in kept)
            plan.promised.append(promised)
            gain = self.worth.truth(kind) * promised - rate * (float(verify[width]) - 1.0)
            gain -= copies_gain(chance, verify, rate)
            self.worth.learn(kind, gain / max(0.2, 1.0 - first), rate * plan.cost)
            if costs.chains:
                reach = reach_of([float(level.p[i, 0]) for level in plan.levels], costs.chains[-1][0])
                chain = max(self.worth.truth(kind) * sum(reach[:n]) - rate * cost for n, cost in costs.chains)
                self.lead.learn(kind, gain - rate * plan.cost - chain)

    def _offer(self, i: int, row: Row, plan: Plan, chance: Array) -> Offer:
        match, words = plan.copies[i]
        copied = (words, chance.tolist()) if match else ([], [])
        return offer_of(i, plan.levels, copied, max(0, row.budget - 1), self.ranked)

    # --- what is learned

    def commit(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        around = _own(batch)
        if self.runner is not None and (around.plan is None or not around.plan.empty):
            self.runner.commit(batch, outcomes)
        if around.plan is not None:
            self._learn(batch, around.plan, outcomes)
            if self.timed:
                self.timing.note((max(around.plan.kinds), len(outcomes)), around.plan.sort, around.plan.cost)
        around.plan = None

    def _learn(self, batch: Batch, plan: Plan, outcomes: Sequence[Outcome]) -> None:
        rows = _own(batch).rows[batch.first : batch.last]
        if self.offered is not None:
            chosen = (outcome.tokens for outcome in outcomes)
            self.offered += map(Offered, plan.offers, plan.kept, chosen)
        for i, outcome in enumerate(outcomes):
            kind, own, true = plan.kinds[i], rows[i], outcome.tokens
            self.rate.learn(plan.places[i], len(true), plan.cost)
            first = plan.first[i] if plan.first else 0.0
            own.learn_copies(self.copies, kind, plan.copies[i], first, true, not (plan.empty or plan.chain))
            own.learn_levels(self.accepts, self.depths, kind, i, plan.levels, true)
            accepted = len(outcome.path) - 1
            if plan.chain:
                self.depths.note(kind, accepted, accepted < outcome.depth)
            if plan.promised:
                self.worth.correct(kind, plan.promised[i], accepted)


def _own(batch: Batch) -> AutoRows:
    """What auto keeps of the rows."""
    return cast("AutoRows", batch.draft.around)
