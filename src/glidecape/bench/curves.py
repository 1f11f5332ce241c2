"""Curves from what drafts were seen to think (`watch`): confidence and entropy against acceptance, and stop policies
replayed beside the oracle that knows how much will be accepted."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..drafting.stop import Entropy
from .settings import Settings

BINS = 10
Line = Mapping[str, Any]
Policy = Callable[[Line, int], int]  # (notes, position) -> depths that are drafted there


def svip_bound(entropy: float) -> float:
    """SVIP's estimate of the least overlap: 1 - sqrt(c H), c = 0.15.

    Source: SVIP paper, section 2.2, with the constant of its code.

    >>> svip_bound(0.0), round(svip_bound(0.6), 2)
    (1.0, 0.7)
    """
    return 1 - math.sqrt(Entropy.C * entropy)


def binned(pairs: Iterable[tuple[float, float]], width: float, most: int) -> list[dict[str, float]]:
    """Means of y in bins of x: `x` and `y` means, `count`; the last bin takes what lies beyond.

    >>> binned([(0.05, 1.0), (0.15, 0.0), (0.12, 1.0)], 0.1, 10)
    [{'x': 0.05, 'y': 1.0, 'count': 1}, {'x': 0.135, 'y': 0.5, 'count': 2}]
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for x, y in pairs:
        found.setdefault(min(most - 1, int(x / width)), []).append((x, y))
    return [
        {
            "x": round(statistics.mean(x for x, _ in each), 4),
            "y": round(statistics.mean(y for _, y in each), 4),
            "count": len(each),
        }
        for _, each in sorted(found.items())
    ]


def replay(lines: Sequence[Line], policy: Policy) -> dict[str, float]:
    """Rounds that a chain with this stop policy would have made: a round at position t drafts `policy` tokens, of which the
    first `matches[t]` are accepted. Returns acceptance length, mean drafted and accepted depths.

    Exact for chains: the output does not depend on the policy, and a draft from a position does not either, as far as its
    cache holds the same keys and values. That is so for draft LMs and for GliDe of one layer.
    """
    rounds = emitted = drafted = accepted = 0
    for line in lines:
        at = 0
        while at < len(line["matches"]):
            length = max(1, min(policy(line, at), len(line["entropy"][at])))
            right = min(length, line["matches"][at])
            rounds, drafted, accepted = rounds + 1, drafted + length, accepted + right
            emitted += min(right + 1, len(line["matches"]) - at)
            at += right + 1
    return {
        "acceptance_length": round(emitted / rounds, 4),
        "drafted": round(drafted / rounds, 4),
        "accepted": round(accepted / rounds, 4),
    }


def constant(length: int) -> Policy:
    return lambda line, at: length


def svip(threshold: float) -> Policy:
    """Down to the first depth with sqrt(0.15 H) above the threshold; that one is kept."""

    def length(line: Line, at: int) -> int:
        own = line["entropy"][at]
        return next((d for d, h in enumerate(own, 1) if math.sqrt(Entropy.C * h) > threshold), len(own))

    return length


def oracle(line: Line, at: int) -> int:
    """What will be accepted, no more; at least one."""
    return max(1, line["matches"][at])


def watched_figures(
    lines: Sequence[Line], costs: Mapping[str, Any] | None, settings: Settings
) -> dict[str, dict[str, Any]]:
    """For each draft: mean overlap, confidence and entropy against acceptance, and replayed stop policies.

    With `costs`, policies have an expected speed-up: tau / (gamma c + v(gamma)), v between the measured numbers of nodes.
    """
    made = {}
    for draft in dict.fromkeys(line["draft"] for line in lines):
        own = [line for line in lines if line["draft"] == draft]
        overlaps = [x for line in own for x in line["overlap"]]
        if not overlaps:
            continue
        made[draft] = {
            "prompts": len(own),
            "positions": len(overlaps),
            "overlap": round(statistics.mean(overlaps), 4),
            "overlap_1": round(statistics.mean(x for line in own for x in line["overlap_1"]), 4),
            "confidence": binned(_reached(own, "confidence", settings.draft_length), 1 / BINS, BINS),
            "entropy": binned(
                ((each[0], y) for line in own for each, y in zip(line["entropy"], line["overlap_1"], strict=True)),
                0.4,
                15,
            ),
            "policies": _policies(own, costs, draft, settings),
        }
    return made


def _reached(lines: Sequence[Line], name: str, depth: int) -> Iterable[tuple[float, float]]:
    """(what the draft showed, was its token the target's) at every depth whose ancestors all were right."""
    for line in lines:
        for at, (shown, right) in enumerate(zip(line[name], line["matches"], strict=True)):
            left = len(line["matches"]) - at  # at the end a draft may be longer than what is left to compare with
            for d, value in enumerate(shown[: min(depth, right + 1, left)], 1):
                yield value, float(right >= d)


def _policies(
    lines: Sequence[Line], costs: Mapping[str, Any] | None, draft: str, settings: Settings
) -> list[dict[str, Any]]:
    deepest = max(len(each) for line in lines for each in line["entropy"])
    named: list[tuple[str, float, Policy]] = [("constant", n, constant(n)) for n in range(1, deepest + 1)]
    thresholds = sorted({round(0.1 * i, 1) for i in range(1, 10)} | {settings.threshold})
    named += [("svip", h, svip(h)) for h in thresholds]
    named.append(("oracle", 0, oracle))
    found = []
    for kind, value, policy in named:
        one: dict[str, Any] = {"policy": kind, "value": value, **replay(lines, policy)}
        if costs and draft in costs["c"]:
            price = one["drafted"] * costs["c"][draft] + ratio_at(costs["v"], one["drafted"])
            one["expected"] = round(one["acceptance_length"] / price, 4)
        found.append(one)
    return found


def ratio_at(ratios: Mapping[str, float], nodes: float) -> float:
    """v(n) between the measured numbers of nodes, by straight lines.

    >>> ratio_at({"0": 1.0, "2": 1.5, "4": 2.0}, 3), ratio_at({"0": 1.0, "2": 1.5}, 9)
    (1.75, 1.5)
    """
    known = sorted((int(n), v) for n, v in ratios.items())
    for (low, a), (high, b) in itertools.pairwise(known):
        if nodes <= high:
            return a + (b - a) * (nodes - low) / (high - low)
    return known[-1][1]
