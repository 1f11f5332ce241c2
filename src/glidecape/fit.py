"""SVIP's threshold for a pair of models, fitted on calibration prompts instead of taken from the paper.

The prompts are decoded token by token, and at every token a draft that never stops early is made, thrown away, and
written down with the uncertainty of each of its depths. The output is the same with any draft, so how much of each draft
would have been accepted is known at the end, and with it the rounds of every threshold: each begins where the one before
ended. The smallest threshold within a hundredth of the most tokens for their cost wins.

Under the residual rule the output depends on the draft; there the threshold of shared noise is taken. The output's law
does not depend on the threshold, so a bad fit costs speed only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from torch import Tensor

from .batch import Batch
from .decode import decode
from .drafting.drafter import Around, Drafter, ModelDrafter, NoDraft
from .drafting.expansion import Chain, Expansion
from .drafting.law import DraftLaw
from .drafting.methods import AnyDraft, joined
from .drafting.stop import Entropy, FixedLength
from .errors import InputError
from .models.target import Target
from .sampling import NOISE, SamplingParams
from .stats import Stats
from .tree import TokenTree

STEP = 0.02  # between the thresholds that are tried
# The optimum is flat, and prompts harder than the calibration's lose more to long drafts than to short ones.
NEAR = 0.99
SHORT, LONG = 1, 5  # depths whose rounds are timed: most of SVIP's drafts end between them


@dataclass(frozen=True)
class Costs:
    """Times in units of a plain target step: a round of g depths and n nodes takes 1 + start + g draft + n node.

    Attributes:
        draft: of one more depth drafted.
        node: of one more node to verify.
        start: of a round with a draft, whatever its length: catching up, the tree, a target step of more than one token.
    """

    draft: float
    node: float
    start: float = 0.0

    def of(self, depths: int, nodes: int) -> float:
        """A round that drafts `depths` depths and verifies `nodes` nodes and the root."""
        return 1 + self.start + self.draft * depths + self.node * nodes


@dataclass(frozen=True)
class Recorded:
    """A draft made to its end: uncertainty after each depth but the last, nodes down to each depth, accepted depths."""

    uncertainty: tuple[float, ...]
    nodes: tuple[int, ...]
    accepted: int

    def length(self, threshold: float) -> int:
        """Depths that SVIP would have drafted: the uncertain one is kept."""
        above = (depth for depth, u in enumerate(self.uncertainty, 1) if u > threshold)
        return next(above, len(self.nodes))


@dataclass(frozen=True)
class Fit:
    """The outcome of a fit.

    Attributes:
        threshold: of sqrt(0.15 H), to be given to `Entropy`.
        speedup: expected over plain decoding, with `costs`.
        acceptance_length, drafted: expected tokens emitted and depths drafted a round.
        table: (threshold, speedup) of all that were tried.
        costs: measured or given.
    """

    threshold: float
    speedup: float
    acceptance_length: float
    drafted: float
    table: tuple[tuple[float, float], ...]
    costs: Costs


class _Recorder(Entropy):
    """Stops at the cap only, and writes down what SVIP would have looked at."""

    def __init__(self, cap: int, over: str) -> None:
        super().__init__(0.0, cap, over)
        self.seen: list[float] = []
        self.nodes: list[int] = []

    def more(self, tree: TokenTree, depth: int, law: DraftLaw) -> Tensor | bool:
        self.seen.append(float((self.C * self.uncertainty(tree, law)[0]).sqrt()))
        self.nodes.append(int(tree.num_drafted[0]))
        return depth < self.cap


class _Everywhere(Around):
    """Drafts at every token and has nothing of it verified: a round emits one token."""

    def __init__(self, inner: Drafter, stop: _Recorder) -> None:
        super().__init__(inner)
        self.stop = stop
        self.made: list[tuple[TokenTree, tuple[float, ...], tuple[int, ...]]] = []

    def propose(self, batch: Batch) -> TokenTree:
        self.stop.seen, self.stop.nodes = [], []
        tree = super().propose(batch)
        drafted = int(tree.num_drafted[0])
        # A tree that is pruned to its best nodes never verifies more than it does now.
        nodes = (*(min(n, drafted) for n in self.stop.nodes), drafted)
        self.made.append((tree, tuple(self.stop.seen), nodes))
        root = TokenTree(batch.roots, capacity=1)
        root.memo = tree.memo
        return root


def _accepted(tree: TokenTree, following: Sequence[int]) -> int:
    """Depths of the only row's tree that agree with the text after its root."""
    children, node = tree.children(0), 0
    for depth, token in enumerate(following):
        below = (child for child in children[node] if int(tree.tokens[0, child]) == token)
        node = next(below, -1)
        if node < 0:
            return depth
    return len(following)


def record(
    target: Target,
    draft: AnyDraft,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    expansion: Expansion | None = None,
    cap: int = 40,
    over: str = "best",
) -> list[list[Recorded]]:
    """Decode the prompts one by one; for each, one record a token that was emitted: of the draft of `cap` depths that could
    have begun in its place."""
    stop, params = _Recorder(cap, over), replace(params, sampling=NOISE)
    inner = joined(draft, expansion or Chain(), stop)
    texts = []
    for prompt in prompts:
        everywhere = _Everywhere(inner, stop)
        text = [token for event in decode(target, everywhere, [prompt], params) for token in event.tokens]
        texts.append(
            [
                Recorded(seen, nodes, _accepted(tree, text[at : at + len(nodes)]))
                for at, (tree, seen, nodes) in enumerate(everywhere.made[: len(text)])
            ]
        )
    return texts


def best_threshold(texts: Sequence[Sequence[Recorded]], costs: Costs) -> Fit:
    """The smallest threshold within a hundredth of the most tokens for their cost.

    Args:
        texts: of each prompt, the drafts at all its tokens.

    Raises:
        InputError: there is no draft to fit on.
    """
    highest = max((u for text in texts for one in text for u in one.uncertainty), default=None)
    if highest is None:
        raise InputError("nothing to fit SVIP's threshold on: give calibration prompts and at least 3 new tokens each")
    found = []
    for threshold in (round(STEP * i, 4) for i in range(int(highest / STEP) + 2)):
        rounds, emitted, depths, cost = 0, 0, 0, 0.0
        for text in texts:
            at = 0
            while at < len(text):
                length = text[at].length(threshold)
                cost += costs.of(length, text[at].nodes[length - 1])
                rounds, depths = rounds + 1, depths + length
                at += min(text[at].accepted, length) + 1
            emitted += len(text)
        found.append((emitted / cost, threshold, emitted / rounds, depths / rounds))
    enough = NEAR * max(found)[0]
    speedup, threshold, tau, drafted = next(f for f in found if f[0] >= enough)
    return Fit(threshold, speedup, tau, drafted, tuple((f[1], f[0]) for f in found), costs)


def measured_costs(
    target: Target,
    draft: AnyDraft,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    expansion: Expansion | None = None,
    cap: int = 40,
) -> Costs:
    """Costs on this machine: each prompt is decoded plainly, with short and with long drafts, one right after the other, since
    a drifting machine slows all three; medians over prompts."""
    drafted = (joined(draft, expansion or Chain(), FixedLength(min(n, cap))) for n in (SHORT, LONG))
    drafters: list[Drafter] = [NoDraft(), *drafted]
    found = []
    for prompt in prompts:
        timed = []
        for drafter in drafters:
            stats = Stats()
            for _ in decode(target, drafter, [prompt], params, stats):
                pass
            timed.append(stats)
        found.append(_from_timed(*timed))
    return Costs(median(c.draft for c in found), median(c.node for c in found), median(c.start for c in found))


def _from_timed(plain: Stats, short: Stats, long: Stats) -> Costs:
    """The straight lines through two lengths' rounds: drafting by depths, the rest by nodes."""
    step = plain.total_s / plain.rounds
    drafting = [one.draft_s / one.rounds / step for one in (short, long)]
    rest = [(one.total_s - one.draft_s) / one.rounds / step - 1 for one in (short, long)]
    depths = [one.depths / one.rounds for one in (short, long)]
    nodes = [one.drafted / one.rounds for one in (short, long)]
    draft = slope(depths, drafting)
    node = slope(nodes, rest)
    return Costs(draft, node, max(0.0, drafting[0] - draft * depths[0] + rest[0] - node * nodes[0]))


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Through two points, or through the origin if they are one; never downwards."""
    return max(0.0, (y[1] - y[0]) / (x[1] - x[0]) if x[1] > x[0] else y[1] / x[1])


def fit_threshold(
    target: Target,
    draft: AnyDraft,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    expansion: Expansion | None = None,
    cap: int = 40,
    over: str = "best",
    costs: Costs | None = None,
) -> Fit:
    """Fit SVIP's threshold for a target and a draft on calibration prompts (token ids).

    Args:
        params: how the calibration prompts are sampled; None: greedy, 128 new tokens.
        expansion: the one it is for; None: a chain.
        cap: depths at most; the draft's max lag also holds.
        over: see `Entropy`.
        costs: None: measured on this machine (`measured_costs`).

    Raises:
        InputError: no prompt, or too few new tokens to draft anything.
    """
    params = params or SamplingParams()
    texts = record(target, draft, prompts, params, expansion, cap, over)
    if costs is None and any(texts):
        costs = measured_costs(target, draft, prompts, params, expansion, cap)
    return best_threshold(texts, costs or Costs(0.0, 0.0))


def with_fitted_threshold(
    target: Target, drafter: Drafter, prompts: Sequence[Sequence[int]], params: SamplingParams | None = None
) -> tuple[ModelDrafter, Fit]:
    """The same drafter with its SVIP threshold fitted, and the fit.

    Raises:
        InputError: the drafter does not stop by SVIP; see also `fit_threshold`.
    """
    if not isinstance(drafter, ModelDrafter) or not isinstance(drafter.stop, Entropy):
        raise InputError("there is no SVIP threshold to fit: choose a method with +svip")
    stop = drafter.stop
    fit = fit_threshold(target, drafter.model, prompts, params, drafter.expansion, stop.cap, stop.over)
    return joined(drafter.model, drafter.expansion, Entropy(fit.threshold, stop.cap, stop.over)), fit
