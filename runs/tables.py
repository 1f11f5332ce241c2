"""Markdown tables of docs/results-0.1.md from folders of `glidecape bench`.

.venv/bin/python runs/tables.py [--by-category] runs/out/results/g5-t0 ...
"""

import sys
from pathlib import Path

from glidecape.bench.metrics import summarise
from glidecape.bench.records import RunFolder
from glidecape.bench.tables import circumstances_line, markdown, title_of

COLUMNS = ("method", "tokens_per_s", "over_plain", "interval", "acceptance_length", "alpha", "nodes", "equal")


def of_categories(summary, kind):
    """Acceptance length and alpha of each method in each category."""
    groups = [one for one in summary["groups"] if one["kind"] == kind and one["category"] != "all"]
    if not groups:
        return f"{kind}: one category only\n"
    names = [row["method"] for row in groups[0]["rows"] if row.get("alpha") is not None]
    lines = ["| category (prompts) | " + " | ".join(names) + " | repeated 4-grams |", "|---" * (len(names) + 2) + "|"]
    for group in groups:
        rows = {row["method"]: row for row in group["rows"]}
        cells = [f"{rows[name]['acceptance_length']:.2f} ({rows[name]['alpha']:.2f})" for name in names]
        repeated = group["repeated_4grams"]
        cells.append("" if repeated is None else f"{repeated:.0%}")
        lines.append(f"| {group['category']} ({group['prompts']}) | " + " | ".join(cells) + " |")
    return f"{kind}, acceptance length (alpha) by category:\n\n" + "\n".join(lines) + "\n"


folders = [word for word in sys.argv[1:] if word != "--by-category"]
by_category = len(folders) < len(sys.argv[1:])
for folder in map(Path, folders):
    summary = summarise(RunFolder(folder))
    print(f"`{summary['sessions'][-1]['command']}`\n\n{circumstances_line(summary)}\n")
    for group in (group for group in summary["groups"] if group["category"] == "all"):
        print(f"{title_of(group, summary['settings'])}:\n\n{markdown(group['rows'], COLUMNS)}\n")
        if by_category:
            print(of_categories(summary, group["kind"]))
        for pair in summary["pairs"][group["kind"]]:
            if (pair["a"], pair["b"]) == ("glide", "nocross:glide"):
                alpha = pair["alpha"]
                gain = f"{100 * alpha['gain']:.1f} points, p = {alpha['p']:.1g}"
                print(f"Cross-attention, mean gain of alpha over prompts: {gain}\n")
