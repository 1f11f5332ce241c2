"""SVIP's threshold for a pair of models, fitted on calibration prompts instead of taken from the paper.

The prompts are decoded once with drafts that never stop early, and each depth's uncertainty is written down. What a
threshold would have done to each of those rounds is then known: it cuts the draft after the first depth above it, and
accepted tokens beyond are lost. The threshold with the most emitted tokens for its cost wins.

An approximation: the rounds that are cut are those of the long drafts, where a shorter draft would begin its next round
elsewhere. The output's law does not depend on the threshold, so a bad fit costs speed only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from .decode import decode, run_round, start
from .drafting.drafter import Drafter, ModelDrafter, NoDraft
from .drafting.expansion import Chain, Expansion
from .drafting.law import DraftLaw
from .drafting.methods import AnyDraft, joined
from .drafting.stop import Entropy
from .errors import InputError
from .models.target import Target
from .sampling import SamplingParams
from .stats import Stats
from .tree import TokenTree

STEP = 0.02  # between the thresholds that are tried


@dataclass(frozen=True)
class Costs:
    """Times in units of a plain target step: `draft` of one more depth, `node` of one more node to verify."""

    draft: float
    node: float


@dataclass(frozen=True)
class Recorded:
    """One round drafted to its end: uncertainty after each depth but the last, nodes down to each depth, accepted."""

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


def record(
    target: Target,
    draft: AnyDraft,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    expansion: Expansion | None = None,
    cap: int = 40,
    over: str = "best",
    stats: Stats | None = None,
) -> list[Recorded]:
    """Decode the prompts one by one with drafts of `cap` depths; one record a round that drafted two or more."""
    stop = _Recorder(cap, over)
    drafter = joined(draft, expansion or Chain(), stop)
    rounds = []
    for prompt in prompts:
        state = start(target, drafter, [prompt], params)
        while state.rows[0].finish is None and state.rows[0].budget > 0:
            stop.seen, stop.nodes = [], []
            (event,) = run_round(target, drafter, state, stats)
            if stop.seen:
                # A tree that is pruned to its best nodes never verifies more than it does now.
                nodes = (*(min(n, event.stats.drafted) for n in stop.nodes), event.stats.drafted)
                rounds.append(Recorded(tuple(stop.seen), nodes, event.stats.accepted))
    return rounds


def best_threshold(rounds: Sequence[Recorded], costs: Costs) -> Fit:
    """The threshold that would have emitted most for its cost; the smallest of equals.

    A round of length g costs g draft steps and the verification of its nodes, and emits its accepted tokens down to depth
    g and one more.

    Raises:
        InputError: there is no round to fit on.
    """
    if not rounds:
        raise InputError("nothing to fit SVIP's threshold on: give calibration prompts and at least 3 new tokens each")
    highest = max(max(r.uncertainty) for r in rounds)
    tried = [round(STEP * i, 4) for i in range(int(highest / STEP) + 2)]
    found = []
    for threshold in tried:
        lengths = [r.length(threshold) for r in rounds]
        emitted = sum(min(r.accepted, g) + 1 for r, g in zip(rounds, lengths, strict=True))
        cost = sum(1 + costs.draft * g + costs.node * r.nodes[g - 1] for r, g in zip(rounds, lengths, strict=True))
        found.append((emitted / cost, threshold, emitted / len(rounds), sum(lengths) / len(rounds)))
    speedup, threshold, tau, drafted = max(found, key=lambda f: (f[0], -f[1]))
    table = tuple((f[1], f[0]) for f in found)
    return Fit(threshold, speedup, tau, drafted, table, costs)


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
        costs: None: measured on this machine, beside plain decoding of each prompt; medians over prompts.

    Raises:
        InputError: no prompt, or too few new tokens to draft anything.
    """
    params = params or SamplingParams()
    if not prompts:
        raise InputError("nothing to fit SVIP's threshold on: give calibration prompts")
    rounds: list[Recorded] = []
    measured: list[Costs] = []
    for prompt in prompts:
        stats, plain = Stats(), Stats()
        found = record(target, draft, [prompt], params, expansion, cap, over, stats)
        rounds += found
        if costs is None and found:  # plain decoding of the same prompt at once: a drifting machine slows both
            for _ in decode(target, NoDraft(), [prompt], params, plain):
                pass
            step, depths = plain.verify_s / plain.rounds, sum(len(r.nodes) for r in found)
            verification = stats.verify_s / stats.rounds / step
            per_node = max(0.0, verification - 1) / (stats.drafted / stats.rounds)
            measured.append(Costs(stats.draft_s / depths / step, per_node))
    if costs is None and measured:
        costs = Costs(median(c.draft for c in measured), median(c.node for c in measured))
    return best_threshold(rounds, costs or Costs(0.0, 0.0))


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
