"""docs/speed.svg from folders of `glidecape bench`: tokens a second of each method, greedy and at T=1.

.venv/bin/python runs/picture.py runs/out/results/t0 runs/out/results/t1 docs/speed.svg
"""

import sys
from pathlib import Path

from glidecape.bench.metrics import summarise
from glidecape.bench.records import RunFolder

WIDTH, ROW, LEFT, TOP = 720, 26, 190, 34
COLOURS = {"plain": "#8a8f98", "transformers": "#c9ccd1", "llama.cpp": "#c9ccd1"}


def panel(title: str, rows: list[dict], top: int) -> tuple[str, int]:
    """One group of bars; returns its markup and the y below it."""
    most = max(row["tokens_per_s"] for row in rows)
    parts = [f'<text x="8" y="{top + 16}" font-weight="bold">{title}</text>']
    y = top + TOP
    rows = [row for row in rows if len(row["method"]) < 32]  # variants with many options are left to the tables
    for row in sorted(rows, key=lambda r: r["tokens_per_s"]):
        length = (WIDTH - LEFT - 150) * row["tokens_per_s"] / most
        colour = COLOURS.get(row["method"].split("+")[0], "#2f7d4f")
        over = row["over"].get("plain", {"ratio": 1.0})["ratio"]
        note = f"{row['tokens_per_s']:.0f} tokens/s, {over:.2f}x"
        parts.append(f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{row["method"]}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{length:.0f}" height="{ROW - 8}" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + length + 6:.0f}" y="{y + 14}">{note}</text>')
        y += ROW
    return "\n".join(parts), y + 10


def main(greedy: str, sampled: str, out: str) -> None:
    top, body = 4, []
    for name, path in (("greedy", greedy), ("temperature 1", sampled)):
        summary = summarise(RunFolder(Path(path)))
        where = summary["circumstances"]
        for group in (group for group in summary["groups"] if group["category"] == "all"):
            what = "" if group["kind"] == "steady" else ", continuations that loop"
            machine = f"{where['dtype']}, {where['threads']} CPU threads, batch {summary['settings']['batch']}"
            markup, top = panel(f"{name}{what}: {group['prompts']} prompts, {machine}", group["rows"], top)
            body.append(markup)
    style = 'font-family="system-ui, sans-serif" font-size="13" fill="#24292f"'
    background = f'<rect width="{WIDTH}" height="{top}" fill="#ffffff"/>'
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" viewBox="0 0 {WIDTH} {top}" {style}>'
    )
    Path(out).write_text("\n".join([head, background, *body, "</svg>"]) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:4])
