"""SVIP's threshold for a pair of models, fitted on calibration prompts instead of taken from the paper.

The prompts are decoded token by token, and at every token a draft that never stops early is made, thrown away, and
written down with the uncertainty of each of its depths. From that record `replay` makes the rounds of every threshold. The
smallest threshold within a hundredth of the most tokens for their cost wins.

Under the residual rule the output depends on the draft; there the threshold of shared noise is taken. The output's law
does not depend on the threshold, so a bad fit costs speed only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

from torch import Tensor

from .batch.batch import Batch
from .core.params import NOISE, SamplingParams
from .core.stats import Stats
from .core.tree import TokenTree
from .costmodel import RoundCosts, line
from .drafting.drafter import Drafter, DrafterWrapper, ModelDrafter, NoDraft
from .drafting.expansions.base import Expansion
from .drafting.expansions.chain import Chain
from .drafting.law import DraftLaw
from .drafting.methods import AnyDraft, drafter_of
from .drafting.stop import Entropy, FixedLength
from .engine.decode import decode
from .errors import InputError
from .progress import bar
from .replay import Recorded, expected, replay
from .target.target import Target

STEP = 0.02  # between the thresholds that are tried
# The optimum is flat, and prompts harder than the calibration's lose more to long drafts than to short ones.
NEAR = 0.99
SHORT, LONG = 1, 5  # depths whose rounds are timed: most of SVIP's drafts end between them


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
    costs: RoundCosts


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


class _DraftEverywhere(DrafterWrapper):
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
    inner = drafter_of(draft, expansion or Chain(), stop)
    texts = []
    with bar("drafting at every token", len(prompts)) as shown:
        for prompt in prompts:
            everywhere = _DraftEverywhere(inner, stop)
            text = [token for event in decode(target, everywhere, [prompt], params) for token in event.tokens]
            drafts = enumerate(everywhere.made[: len(text)])
            texts.append(
                [
                    Recorded(seen, nodes, _accepted(tree, text[at : at + len(nodes)]))
                    for at, (tree, seen, nodes) in drafts
                ]
            )
            shown.advance()
    return texts


def best_threshold(texts: Sequence[Sequence[Recorded]], costs: RoundCosts) -> Fit:
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
        rounds = [one for text in texts for one in replay(text, partial(Recorded.length, threshold=threshold))]
        found.append((expected(rounds, costs), threshold))
    enough = NEAR * max(one.speedup for one, _ in found)
    best, threshold = next((one, h) for one, h in found if one.speedup >= enough)
    table = tuple((h, one.speedup) for one, h in found)
    return Fit(threshold, best.speedup, best.acceptance_length, best.depths, table, costs)


def measured_costs(
    target: Target,
    draft: AnyDraft,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    expansion: Expansion | None = None,
    cap: int = 40,
) -> RoundCosts:
    """Costs on this machine: each prompt is decoded plainly, with short and with long drafts, one right after the other, since
    a drifting machine slows all three; medians over prompts."""
    drafted = (drafter_of(draft, expansion or Chain(), FixedLength(min(n, cap))) for n in (SHORT, LONG))
    drafters: list[Drafter] = [NoDraft(), *drafted]
    found = []
    with bar("timing drafts", len(prompts)) as shown:
        for prompt in prompts:
            timed = []
            for drafter in drafters:
                stats = Stats()
                for _ in decode(target, drafter, [prompt], params, stats):
                    pass
                timed.append(stats)
            found.append(_from_timed(*timed))
            shown.advance()
    return RoundCosts.linear(*(median(column) for column in zip(*found, strict=True)))


def _from_timed(plain: Stats, short: Stats, long: Stats) -> tuple[float, float, float]:
    """Costs of a depth, a node and a start: straight lines through two lengths' rounds, drafting by depths, the rest by nodes.

    The start holds what any draft costs: catching up, the tree, a target step of more than one token.
    """
    step = plain.total_s / plain.rounds
    drafting = [one.draft_s / one.rounds / step for one in (short, long)]
    rest = [(one.total_s - one.draft_s) / one.rounds / step - 1 for one in (short, long)]
    draft, node = (
        line([getattr(one, name) / one.rounds for one in (short, long)], y)[0]
        for name, y in (("depths", drafting), ("drafted", rest))
    )
    start = drafting[0] - draft * short.depths / short.rounds + rest[0] - node * short.drafted / short.rounds
    return draft, node, max(0.0, start)


def fit_threshold(
    target: Target,
    draft: AnyDraft,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | None = None,
    expansion: Expansion | None = None,
    cap: int = 40,
    over: str = "best",
    costs: RoundCosts | None = None,
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
    return best_threshold(texts, costs or RoundCosts(0.0))


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
    return drafter_of(drafter.model, drafter.expansion, Entropy(fit.threshold, stop.cap, stop.over)), fit
