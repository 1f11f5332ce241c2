"""The tables of a report that are folded: all columns, categories, pairs of methods, depths, costs, stop policies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..tables import TextTable
from .tables import by_category, sheet

Summary = Mapping[str, Any]


def details_of(summary: Summary) -> list[TextTable]:
    """The tables for which the run has figures."""
    made = [sheet(group, summary["settings"]) for group in summary["groups"] if group["category"] == "all"]
    for kind in summary["pairs"]:
        heads, rows = by_category(summary, kind)
        made.append(TextTable(f"Speed-up over plain by category (prompts), {kind}", heads, rows))
    made += [sheet(group, summary["settings"]) for group in summary["groups"] if group["category"] != "all"]
    made += [_pairs(kind, pairs) for kind, pairs in summary["pairs"].items()]
    made += [*_depths(summary), *_calibration(summary), *_costs(summary["costs"]), *_policies(summary["watched"])]
    return [table for table in made if table.rows]


def _pairs(kind: str, pairs: list[dict[str, Any]]) -> TextTable:
    heads = ["a", "b", "a over b, speed", "95 % interval", "p"]
    heads += ["alpha, a - b", "p", "acceptance length, a - b", "p"]
    rows = []
    for pair in pairs:
        speed, more = pair["speed"], [pair["alpha"], pair["acceptance_length"]]
        row = [pair["a"], pair["b"], f"{speed['ratio']:.2f}", "{:.2f} to {:.2f}".format(*speed["interval"])]
        row.append(f"{speed['p']:.2g}")
        rows.append(row + [text for one in more for text in (f"{one['gain']:+.3f}", f"{one['p']:.2g}")])
    return TextTable(f"Every two methods on the same prompts, {kind}", heads, rows)


def _depths(summary: Summary) -> Iterable[TextTable]:
    for group in (g for g in summary["groups"] if g["category"] == "all"):
        rows = [row for row in group["rows"] if row.get("by_depth")]
        deepest = max((len(row["by_depth"]) for row in rows), default=0)
        heads = ["method", *(f"depth {d}" for d in range(1, deepest + 1))]
        texts = [[row["method"], *(f"{rate:.2f} ({n})" for rate, n in row["by_depth"])] for row in rows]
        texts = [text + [""] * (len(heads) - len(text)) for text in texts]
        yield TextTable(f"Acceptance rate by depth (rounds that tested it), {group['kind']}", heads, texts)
        longest = max((int(n) for row in rows for n in row["accepted_lengths"]), default=0)
        counts = [[str(row["accepted_lengths"].get(str(n), 0)) for n in range(longest + 1)] for row in rows]
        texts = [[row["method"], *own] for row, own in zip(rows, counts, strict=True)]
        yield TextTable(f"Rounds by accepted nodes, {group['kind']}", ["method", *map(str, range(longest + 1))], texts)


def _calibration(summary: Summary) -> Iterable[TextTable]:
    heads = ["method", "predicted", "accepted", "nodes reached", "nodes offered", "expected calibration error"]
    for group in (g for g in summary["groups"] if g["category"] == "all"):
        rows = []
        for row in (row for row in group["rows"] if "calibration" in row):
            error = f"{row['calibration']['error']:.3f}"
            for p, rate, reached, offered in row["calibration"]["bins"]:
                rows.append([row["method"], f"{p:.2f}", f"{rate:.2f}", str(reached), str(offered), error])
        yield TextTable(f"What auto predicted of the nodes that it offered, {group['kind']}", heads, rows)


def _costs(costs: Mapping[str, Any] | None) -> Iterable[TextTable]:
    if costs is None:
        return
    heads = ["verification of so many nodes beside the root", "ms", "v(n)"]
    rows = [[n, f"{1e3 * s:.3f}", f"{costs['v'][n]:.3f}"] for n, s in costs["verify_s"].items()]
    yield TextTable(f"Verification ratio, measured alone after {costs['context']} tokens", heads, rows)
    rows = [[name, f"{1e3 * s:.3f}", f"{costs['c'][name]:.3f}"] for name, s in costs["draft_step_s"].items()]
    yield TextTable("Cost ratio, measured alone", ["draft", "ms a step", "c"], rows)


def _policies(watched: Mapping[str, Any]) -> Iterable[TextTable]:
    heads = ["stop policy", "value", "depths drafted", "accepted", "acceptance length", "expected speed-up"]
    for draft, one in watched.items():
        rows = [
            [
                p["policy"],
                f"{p['value']:g}",
                *(f"{p[name]:.2f}" for name in ("drafted", "accepted", "acceptance_length")),
                f"{p['expected']:.2f}" if "expected" in p else "",
            ]
            for p in one["policies"]
        ]
        yield TextTable(f"Stop policies replayed, {draft} ({one['prompts']} prompts, chains)", heads, rows)
