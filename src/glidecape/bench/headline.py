"""What a run comes to in one sentence: which method won, over plain decoding and over the best other library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Summary = Mapping[str, Any]
Row = Mapping[str, Any]


def overall(summary: Summary) -> Mapping[str, Any] | None:
    """The group that a run is told by: all categories, continuations that don't loop where there are some."""
    groups = [group for group in summary["groups"] if group["category"] == "all"]
    return groups[0] if groups else None


def speed(row: Row) -> float:
    """How many times as fast as plain decoding; 1 for plain decoding itself."""
    return float(row["over"]["plain"]["ratio"]) if "plain" in row["over"] else 1.0


def best_peer(rows: Sequence[Row]) -> Row | None:
    """The fastest other library, if one took part."""
    return max((row for row in rows if row["peer"]), key=speed, default=None)


def labels(summaries: Sequence[Summary], names: Sequence[str]) -> list[str]:
    """How each run is called: greedy or its temperature, with its folder's name where that would not tell them apart."""
    short = [
        "greedy" if one["settings"]["temperature"] == 0 else f"T={one['settings']['temperature']:g}"
        for one in summaries
    ]
    if len(set(short)) == len(short):
        return short
    return [f"{label}, {name}" for label, name in zip(short, names, strict=True)]


def headline(summaries: Sequence[Summary], names: Sequence[str]) -> str:
    """One sentence about all runs."""
    parts = [_of_run(one, label) for one, label in zip(summaries, labels(summaries, names), strict=True)]
    sentence = "; ".join(parts)
    return sentence[:1].upper() + sentence[1:] + "."


def _of_run(summary: Summary, label: str) -> str:
    when = f"at {label}" if label.startswith("T=") else label.replace("greedy", "with greedy decoding", 1)
    group = overall(summary)
    if group is None:
        return f"{when}, nothing is measured yet"
    rows = group["rows"]
    peer = best_peer(rows)
    drafting = [row for row in rows if not row["peer"] and row["method"] != "plain"]
    certain = [row for row in drafting if row["over"]["plain"]["interval"][0] > 1]
    if not drafting:
        return f"{when}, only plain decoding was measured"
    ours = max(certain or drafting, key=speed)
    if not certain:
        return f"{when}, no method is certainly faster than plain decoding: the best, {_measured(ours, peer)}"
    if peer is not None and ours["over"][peer["method"]]["ratio"] < 1:
        return f"{when}, another library won, {peer['method']}; our fastest method, {_measured(ours, peer)}"
    return f"{when}, {_measured(ours, peer).replace(', is', ' won: it is', 1)}"


def _measured(row: Row, peer: Row | None) -> str:
    over = row["over"]["plain"]
    low, high = over["interval"]
    text = f"{row['method']}, is {over['ratio']:.2f} times as fast as plain decoding (95 % interval {low:.2f} to {high:.2f})"
    return text + _over_peer(row, peer)


def _over_peer(row: Row, peer: Row | None) -> str:
    if peer is None:
        return ""
    ratio = row["over"][peer["method"]]["ratio"]
    return f" and {ratio:.2f} times as fast as {peer['method']}, the fastest other library"
