"""Curves from what drafts were seen to think (`watch`): confidence and entropy against acceptance, and stop policies
replayed beside the oracle that knows how much will be accepted."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..costmodel import RoundCosts
from ..drafting.stop import Entropy
from ..replay import Recorded, expected, replay
from .settings import Settings

BINS = 10
Note = Mapping[str, Any]  # what `watch` wrote down of one prompt


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


def records_of(note: Note) -> list[Recorded]:
    """The drafts of a watched chain at every token of its text."""
    return [
        Recorded(tuple(math.sqrt(Entropy.C * h) for h in entropy), tuple(range(1, len(entropy) + 1)), accepted)
        for entropy, accepted in zip(note["entropy"], note["matches"], strict=True)
    ]


def policies(deepest: int, threshold: float) -> list[tuple[str, float, Callable[[Recorded], int]]]:
    """Kind, value and length of the policies that are compared; the oracle drafts what will be accepted."""
    thresholds = sorted({round(0.1 * i, 1) for i in range(1, 10)} | {threshold})
    return [
        *(("constant", n, lambda draft, n=n: n) for n in range(1, deepest + 1)),
        *(("svip", h, lambda draft, h=h: draft.length(h)) for h in thresholds),
        ("oracle", 0, lambda draft: draft.accepted),
    ]


def watched_figures(
    lines: Sequence[Note], costs: Mapping[str, Any] | None, settings: Settings
) -> dict[str, dict[str, Any]]:
    """For each draft: mean overlap, confidence and entropy against acceptance, and replayed stop policies.

    With `costs`, policies have an expected speed-up: tokens for their cost, v between the measured numbers of nodes.
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
            "confidence": binned(_reached(own, "confidence", settings.options.length), 1 / BINS, BINS),
            "entropy": binned(
                ((each[0], y) for line in own for each, y in zip(line["entropy"], line["overlap_1"], strict=True)),
                0.4,
                15,
            ),
            "policies": _policies(own, costs, draft, settings),
        }
    return made


def _reached(lines: Sequence[Note], name: str, depth: int) -> Iterable[tuple[float, float]]:
    """(what the draft showed, was its token the target's) at every depth whose ancestors all were right."""
    for line in lines:
        for at, (shown, right) in enumerate(zip(line[name], line["matches"], strict=True)):
            left = len(line["matches"]) - at  # at the end a draft may be longer than what is left to compare with
            for d, value in enumerate(shown[: min(depth, right + 1, left)], 1):
                yield value, float(right >= d)


def _policies(
    notes: Sequence[Note], costs: Mapping[str, Any] | None, draft: str, settings: Settings
) -> list[dict[str, Any]]:
    texts = [records_of(note) for note in notes]
    priced, model = False, RoundCosts(0.0)
    if costs and draft in costs["c"]:
        priced = True
        points = sorted((1 + int(nodes), ratio) for nodes, ratio in costs["v"].items())
        model = RoundCosts(costs["c"][draft], tuple(n for n, _ in points), tuple(ratio for _, ratio in points))
    found = []
    for kind, value, length in policies(
        max(len(one.nodes) for text in texts for one in text), settings.options.threshold
    ):
        figures = expected([one for text in texts for one in replay(text, length)], model)
        row: dict[str, Any] = {"policy": kind, "value": value}
        for name, figure in (
            ("acceptance_length", "acceptance_length"),
            ("drafted", "depths"),
            ("accepted", "accepted"),
        ):
            row[name] = round(getattr(figures, figure), 4)
        found.append(row | ({"expected": round(figures.speedup, 4)} if priced else {}))
    return found
