"""Decodes of several drafters, interleaved, with the figures that every study shows.

All of a study runs in one process on one timer; at each prompt (or batch of prompts) all drafters take their turn, in an
order that rotates, so that a drifting machine hurts all alike. Prefill is not counted.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..batch.batch import Batch
from ..bench.draw import draw
from ..bench.settings import Settings
from ..bench.suites import Suite
from ..core.params import SamplingParams
from ..core.stats import RoundStats, Stats
from ..core.stats import merged as merged_stats
from ..core.tree import TokenTree
from ..drafting.drafter import Drafter, DrafterWrapper
from ..engine.decode import decode
from ..errors import InputError
from ..progress import bar
from ..significance import bootstrap_ratio
from ..target.target import Target

PLAIN = "plain"


@dataclass
class Run:
    """One decode of a batch of prompts.

    Attributes:
        stats: counts over all rows.
        tokens: of each row.
        rounds: each row's rounds, in the order in which they were run.
        marks: after each call of the loop, tokens emitted so far by all rows and seconds so far.
    """

    stats: Stats = field(default_factory=Stats)
    tokens: list[list[int]] = field(default_factory=list)
    rounds: list[RoundStats] = field(default_factory=list)
    marks: list[tuple[int, float]] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """Calls of the loop: of batch 1, rounds."""
        return len(self.marks)


def run(target: Target, drafter: Drafter, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Run:
    """Decode one batch and keep what the studies need."""
    one = Run(tokens=[[] for _ in prompts])
    for event in decode(target, drafter, prompts, params, one.stats):
        one.tokens[event.row] += event.tokens
        if event.stats.emitted:
            one.rounds.append(event.stats)
        mark = (one.stats.emitted, one.stats.total_s)
        if not one.marks or one.marks[-1] != mark:
            one.marks.append(mark)
    return one


Runs = dict[str, list[list[Run]]]  # method -> repeat -> batch


def interleaved(
    target: Target,
    drafters: Mapping[str, Drafter],
    batches: Sequence[Sequence[Sequence[int]]],
    params: SamplingParams | Sequence[SamplingParams],
    repeats: int = 1,
) -> Runs:
    """Run every drafter on every batch, `repeats` times, after a short warm-up of each.

    Args:
        params: of all batches, or of each.

    Raises:
        InputError: no prompt is left.
    """
    if not batches:
        raise InputError("no prompt is left to measure: give more, or shorter ones")
    own = [params] * len(batches) if isinstance(params, SamplingParams) else params
    for drafter in drafters.values():
        run(target, drafter, batches[0][:1], replace(own[0], max_new_tokens=8, ignore_eos=True))
    names = list(drafters)
    runs: Runs = {name: [[] for _ in range(repeats)] for name in names}
    with bar("measuring", repeats * len(batches) * len(names)) as shown:
        for repeat in range(repeats):
            for turn, (batch, how) in enumerate(zip(batches, own, strict=True)):
                for k in range(len(names)):
                    name = names[(k + turn) % len(names)]
                    runs[name][repeat].append(run(target, drafters[name], batch, how))
                    shown.advance(what=f"measuring {name}")
    return runs


def figures(method: str, runs: Runs) -> dict[str, Any]:
    """A row: tokens/s (median over repeats), over plain with a bootstrap interval over batches, and what a round holds.

    Times are milliseconds a call of the loop: drafting (CaPE's "speculation"), verification, and the rest.
    """
    repeats, plain = runs[method], runs[PLAIN]
    speeds = [_speed(each) for each in repeats]
    each = [one for batches in repeats for one in batches]
    calls = sum(one.calls for one in each)
    total = merged(repeats[0])
    row: dict[str, Any] = {
        "method": method,
        "tokens_per_s": round(statistics.median(speeds), 1),
        "over_plain": round(statistics.median(a / _speed(b) for a, b in zip(speeds, plain, strict=True)), 3),
    }
    if method != PLAIN and len(plain[0]) > 1:
        row["over_plain_95"] = bootstrap_ratio(paces(runs, PLAIN), paces(runs, method))
    draft, verify, all_s = (sum(getattr(one.stats, f) for one in each) for f in ("draft_s", "verify_s", "total_s"))
    return row | {
        "acceptance_length": round(total.acceptance_length, 3),
        "alpha": round(total.alpha, 4) if total.drafted else None,
        "nodes": round(total.drafted / total.rounds, 2),
        "draft_ms": round(1000 * draft / calls, 3),
        "verify_ms": round(1000 * verify / calls, 3),
        "other_ms": round(1000 * (all_s - draft - verify) / calls, 3),
        "prefill_ms": round(1000 * sum(one.stats.prefill_s for one in each) / len(each), 1),
        "equal": all(a.tokens == b.tokens for a, b in zip(repeats[0], plain[0], strict=True)),
    }


def paces(runs: Runs, method: str) -> list[float]:
    """Seconds a token on each batch, the median over repeats."""
    return [
        statistics.median(one.stats.total_s / one.stats.emitted for one in each)
        for each in zip(*runs[method], strict=True)
    ]


def merged(each: Sequence[Run]) -> Stats:
    """Counts and times of several runs together."""
    return merged_stats(one.stats for one in each)


def _speed(each: Sequence[Run]) -> float:
    return merged(each).tokens_per_s


class Watched(DrafterWrapper):
    """A drafter that remembers the trees it proposed: for each round of row 0, nodes down to each depth, root excluded."""

    def __init__(self, inner: Drafter) -> None:
        super().__init__(inner)
        self.nodes: list[tuple[int, ...]] = []

    def propose(self, batch: Batch) -> TokenTree:
        tree = self.inner.propose(batch)
        self.nodes.append(tuple(tree.depth[0][tree.valid[0]].bincount().cumsum(0).sub(1)[1:].tolist()))
        return tree


def prompts_of(target: Target, suites: Sequence[Suite], settings: Settings) -> list[list[int]]:
    """Token ids of the prompts that are measured, in order; with greedy decoding those that don't loop.

    Raises:
        InputError: none is left.
    """
    with bar("sorting prompts", sum(len(suite.prompts) for suite in suites)) as shown:
        items = draw(target, list(suites), replace(settings, looping=0), shown.advance).items
    if not items:
        raise InputError("every greedy continuation loops: give more prompts, or a temperature above 0")
    return [list(item.ids) for item in items]
