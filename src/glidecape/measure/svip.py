"""SVIP against constant and heuristic draft lengths, and all of them against the oracle, under one measured cost model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..core.params import NOISE, SamplingParams
from ..costmodel import RoundCosts, line
from ..costs import Verification
from ..drafting.drafter import Drafter, ModelDrafter, NoDraft
from ..drafting.expansions.base import Expansion
from ..drafting.methods import AnyDraft
from ..drafting.methods import drafter_of as with_stop
from ..drafting.stop import Entropy, FixedLength, Heuristic
from ..errors import InputError
from ..fit import fit_threshold, record
from ..replay import Expected, Recorded, Round, expected
from ..target.target import Target
from .oracle import distance, oracle, rounds_of
from .runs import PLAIN, Run, Runs, Watched, figures, interleaved, merged
from .table import Table

RELEASED = 0.3  # threshold of the released code


@dataclass(frozen=True)
class Lengths:
    """What is tried.

    Attributes:
        constant: lengths; those past the draft's max lag are left out.
        start: the heuristic's first length.
        threshold: SVIP's, beside the fitted one.
        cap: of the heuristic, of SVIP and of the oracle.
    """

    constant: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 12, 16)
    start: int = 5
    threshold: float = RELEASED
    cap: int = 40


def study_svip(
    target: Target,
    draft: AnyDraft,
    expansion: Expansion,
    name: str,
    prompts: Sequence[Sequence[int]],
    calibration: Sequence[Sequence[int]],
    params: SamplingParams,
    verification: Verification,
    lengths: Lengths | None = None,
    repeats: int = 1,
) -> tuple[Table, RoundCosts]:
    """A row a way to choose the draft's length, the oracle's last.

    `expected` is tokens for their cost under the cost model, over plain decoding; `behind_oracle` how much more time a
    token takes than the oracle's, under that model; `off_oracle` the mean of |drafted - accepted| in depths, over all
    tokens a draft may begin at. `over_plain` is what was measured, beside it.

    Args:
        calibration: prompts on which SVIP's threshold is fitted; not those that are measured.
        verification: v(n) of this target at this temperature, see `verification_ratios`.

    Raises:
        InputError: the residual rule above temperature 0, where the oracle is not defined; prompts that are calibration
            prompts, too; or none.
    """
    lengths = lengths or Lengths()
    if params.temperature > 0 and params.sampling != NOISE:
        raise InputError(
            "the oracle knows what will be accepted: under the residual rule that cannot be known; use shared noise"
        )
    if not calibration or {tuple(p) for p in prompts} & {tuple(p) for p in calibration}:
        raise InputError("SVIP's threshold is fitted on calibration prompts that are none of those measured: give some")
    cap = min(lengths.cap, draft.max_lag)
    drafters = _drafters(draft, expansion, lengths, cap)
    if cap > 1:  # of one token there is nothing to stop
        fit = fit_threshold(target, draft, calibration, params, expansion, cap)
        drafters[f"svip fitted {fit.threshold:.2f}"] = with_stop(draft, expansion, Entropy(fit.threshold, cap))
    watched: dict[str, Drafter] = {PLAIN: NoDraft(), "longest": with_stop(draft, expansion, FixedLength(cap))}
    seen = {n: Watched(d) for n, d in (watched | drafters).items()}
    runs = interleaved(target, seen, [[p] for p in prompts], params, repeats)
    rounds = {n: _rounds(n, seen[n], runs) for n in seen}
    short = next(iter(drafters))  # the shortest constant length, if there is one
    costs = _costs([(runs[n][0], rounds[n]) for n in (short, "longest")], runs[PLAIN][0], verification)
    best = oracle(rounds["longest"], costs)
    roots = [one for text in record(target, draft, prompts, params, expansion, cap) for one in text]
    table = Table(
        f"{name}, T={params.temperature:g}, {len(prompts)} prompts, start {costs.start:.3f}, c = {costs.draft:.3f}"
    )
    for method in (PLAIN, *drafters):
        model = expected(rounds[method], costs)
        off = None if method == PLAIN else _off(drafters[method], roots, cap)
        table.rows.append(_row(method, runs, model, best, off))
    shown = {"acceptance_length": best.acceptance_length, "depths": best.depths, "expected": best.speedup}
    table.rows.append(
        {"method": "oracle"} | {k: round(v, 3) for k, v in shown.items()} | {"behind_oracle": 0.0, "off_oracle": 0.0}
    )
    return table, costs


def _drafters(draft: AnyDraft, expansion: Expansion, lengths: Lengths, cap: int) -> dict[str, Drafter]:
    made: dict[str, Drafter] = {
        f"constant {n}": with_stop(draft, expansion, FixedLength(n))
        for n in sorted(lengths.constant)
        if n <= min(draft.max_lag, lengths.cap)
    }
    made["heuristic"] = with_stop(draft, expansion, Heuristic(lengths.start, cap))
    made[f"svip {lengths.threshold:g}"] = with_stop(draft, expansion, Entropy(lengths.threshold, cap))
    return made


def _row(method: str, runs: Runs, model: Expected, best: Expected, off: float | None) -> dict[str, object]:
    row = figures(method, runs)
    kept = ("tokens_per_s", "over_plain", "over_plain_95", "acceptance_length", "nodes", "equal")
    shown: dict[str, object] = {"method": method} | {key: row[key] for key in kept if key in row}
    shown |= {"depths": round(model.depths, 2), "expected": round(model.speedup, 3)}
    shown["behind_oracle"] = round(best.speedup / model.speedup - 1, 4)
    return shown if off is None else shown | {"off_oracle": round(off, 3)}


def _rounds(name: str, watched: Watched, runs: Runs) -> list[Round]:
    """The rounds of all measured runs; those of the warm-up came first."""
    stats = [r for batches in runs[name] for one in batches for r in one.rounds]
    return rounds_of(watched.nodes[len(watched.nodes) - len(stats) :], stats)


def _costs(
    timed: Sequence[tuple[Sequence[Run], Sequence[Round]]], plain: Sequence[Run], verification: Verification
) -> RoundCosts:
    """The cost model, over a plain step: drafting is the straight line through the rounds of two draft lengths."""
    step = merged(plain)
    step_s = (step.total_s - step.draft_s) / step.rounds
    depths, seconds = [], []
    for each, rounds in timed:
        stats = merged(each)
        depths.append(sum(len(r.nodes) for r in rounds[: stats.rounds]) / stats.rounds)
        seconds.append(stats.draft_s / stats.rounds / step_s)
    draft, start = line(depths, seconds)
    return RoundCosts(round(draft, 4), verification.sizes, verification.ratios, round(start, 4))


def _off(drafter: Drafter, roots: Sequence[Recorded], cap: int) -> float | None:
    """Mean distance from the oracle's lengths, where the drafter's own can be told from the root alone."""
    assert isinstance(drafter, ModelDrafter)
    stop = drafter.stop
    if isinstance(stop, Entropy):
        own = [r.length(stop.threshold) for r in roots]
    elif isinstance(stop, FixedLength):
        own = [min(stop.cap, len(r.nodes)) for r in roots]
    else:
        return None
    return distance(own, [r.accepted for r in roots]) if roots else None
