"""The picture that a report opens with: a bar for each method, its interval on it; and the colour of each method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .headline import labels, overall, speed

Summary = Mapping[str, Any]
# Six that differ, with a contrast of at least 3 to the white and to the dark page.
PALETTE = ("#2f7fd6", "#cf6a12", "#2c9464", "#b05cc4", "#c9475a", "#84812a")
PLAIN, PEER, OTHER = "#767d86", "#8a9099", "#5f83a6"
MOST = len(PALETTE)  # methods in a plot


@dataclass(frozen=True)
class Bar:
    """One method; `length`, `low` and `high` are percentages of the longest bar of the page, its interval included."""

    method: str
    text: str
    told: str
    colour: str
    length: float
    low: float
    high: float
    peer: bool


@dataclass(frozen=True)
class Panel:
    """The bars of a run, the fastest first; `plain` is where a bar of 1 ends."""

    label: str
    what: str
    plain: float
    bars: list[Bar]


def fastest_of(summaries: Sequence[Summary]) -> list[str]:
    """The drafting methods of all runs, the fastest first, each by its best run."""
    best: dict[str, float] = {}
    for group in filter(None, map(overall, summaries)):
        for row in group["rows"]:
            if not row["peer"] and row["method"] != "plain":
                best[row["method"]] = max(best.get(row["method"], 0.0), speed(row))
    return sorted(best, key=lambda name: -best[name])


def colours_of(summaries: Sequence[Summary]) -> dict[str, str]:
    """The colour of every row of the page; the six fastest methods have one of their own."""
    fastest = fastest_of(summaries)
    made = dict.fromkeys(fastest, OTHER) | dict(zip(fastest, PALETTE, strict=False))
    rows = [row for group in filter(None, map(overall, summaries)) for row in group["rows"]]
    return made | {row["method"]: PEER for row in rows if row["peer"]} | {"plain": PLAIN}


def panels_of(summaries: Sequence[Summary], names: Sequence[str]) -> list[Panel]:
    """A panel a run, on one scale."""
    colours = colours_of(summaries)
    groups = [
        (label, group) for label, group in zip(labels(summaries, names), map(overall, summaries), strict=True) if group
    ]
    longest = max((_interval(row)[1] for _, group in groups for row in group["rows"]), default=1.0)
    share = 100 / max(longest, 1.0)
    made = []
    for label, group in groups:
        bars = []
        for row in sorted(group["rows"], key=speed, reverse=True):
            low, high = _interval(row)
            told = f"{speed(row):.2f} times plain decoding" + (f", {low:.2f} to {high:.2f}" if high > low else "")
            at, start, end = (round(share * value, 2) for value in (speed(row), low, high))
            name = row["method"]
            bars.append(Bar(name, f"{speed(row):.2f}", told, colours[name], at, start, end, row["peer"]))
        kind = " that loop" if group["kind"] == "looping" else ""
        made.append(Panel(label, f"{group['prompts']} prompts{kind}", round(share, 2), bars))
    return made


def _interval(row: Mapping[str, Any]) -> tuple[float, float]:
    low, high = row["over"]["plain"]["interval"] if "plain" in row["over"] else (1.0, 1.0)
    return low, high
