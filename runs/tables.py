"""Markdown tables of docs/results.md from folders of `glidecape bench`.

.venv/bin/python runs/tables.py runs/out/results/g5-t0 ...
"""

import sys
from pathlib import Path

from glidecape.bench.metrics import summarise
from glidecape.bench.records import RunFolder
from glidecape.bench.tables import circumstances_line, markdown, title_of

COLUMNS = ("method", "tokens_per_s", "over_plain", "interval", "acceptance_length", "alpha", "nodes", "equal")

for folder in map(Path, sys.argv[1:]):
    summary = summarise(RunFolder(folder))
    print(f"`{summary['sessions'][-1]['command']}`\n\n{circumstances_line(summary)}\n")
    for group in (group for group in summary["groups"] if group["category"] == "all"):
        print(f"{title_of(group, summary['settings'])}:\n\n{markdown(group['rows'], COLUMNS)}\n")
        for pair in summary["pairs"][group["kind"]]:
            if (pair["a"], pair["b"]) == ("glide", "nocross:glide"):
                alpha = pair["alpha"]
                gain = f"{100 * alpha['gain']:.1f} points, p = {alpha['p']:.1g}"
                print(f"Cross-attention, mean gain of alpha over prompts: {gain}\n")
