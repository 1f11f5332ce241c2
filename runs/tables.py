"""Markdown tables from the JSON of `glidecape bench`.

.venv/bin/python runs/tables.py runs/out/results/small-t1.json ...
"""

import json
import sys
from pathlib import Path
from statistics import mean

from glidecape.significance import paired_permutation

COLUMNS = {
    "method": "method",
    "tokens_per_s": "tokens/s",
    "over_plain": "over plain",
    "over_plain_95": "95 % interval",
    "over_transformers": "over transformers",
    "acceptance_length": "acceptance length",
    "alpha": "alpha",
    "nodes_a_round": "nodes a round",
    "equal": "tokens equal plain's",
}


def cell(row: dict, column: str) -> str:
    value = row.get(column)
    if value is None or (column == "alpha" and row["method"] == "plain"):
        return ""
    if isinstance(value, list):
        return f"{value[0]:.2f} to {value[1]:.2f}"
    return ("yes" if value else "NO") if isinstance(value, bool) else str(value)


for path in map(Path, sys.argv[1:]):
    result = json.loads(path.read_text())
    print(f"`{result['provenance']['command']}`\n")
    for kind in ("steady", "looping"):
        if result[kind]:
            print(
                f"{kind} continuations, {result['prompts'][kind]} prompts, "
                f"{result['repeated_4grams'][kind]:.0%} repeated 4-grams, commit {result['provenance']['commit']}:\n"
            )
            print("| " + " | ".join(COLUMNS.values()) + " |\n|" + "---|" * len(COLUMNS))
            for row in result[kind]:
                print("| " + " | ".join(cell(row, c) for c in COLUMNS) + " |")
            print()
            alphas = {row["method"]: row.get("alpha_by_prompt") for row in result[kind]}
            if alphas.get("glide") and alphas.get("nocross:glide"):
                p = paired_permutation(alphas["glide"], alphas["nocross:glide"])
                gain = mean(alphas["glide"]) - mean(alphas["nocross:glide"])
                print(f"Cross-attention, mean gain of alpha over prompts: {100 * gain:.1f} points, p = {p:.1g}\n")
