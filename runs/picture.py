"""The README's picture from the README's table of figures: bars of tokens a second, greedily and at T=1.

.venv/bin/python runs/picture.py [README.md docs/images/speed.svg]

So the two cannot differ; tests/test_site.py compares them.
"""

import re
import sys
from pathlib import Path

from drawings import Picture

LEFT, TOP, ROW, SPAN = 150, 58, 30, 190
OTHERS = ("OpenVINO GenAI", "llama.cpp", "transformers")


def table_of(page: Path) -> list[list[str]]:
    """The cells of a page's table of figures, without its head."""
    table = re.search(r"<!-- figures.*?-->\n(.*?)<!-- end of figures -->", page.read_text(), re.S)
    assert table, f"{page} has no table of figures"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].strip().splitlines()[2:]]


def figures(readme: Path) -> list[tuple[str, list[float], list[str]]]:
    """Of each row its method, tokens a second (greedily, at T=1), and how many times plain decoding that is."""
    return [(row[0], [float(row[1]), float(row[3])], [row[2], row[4]]) for row in table_of(readme)]


def draw(rows: list[tuple[str, list[float], list[str]]]) -> Picture:
    picture = Picture("Tokens a second of each method", 720, TOP + ROW * len(rows) + 20)
    for panel, title in enumerate(("greedy", "T=1")):
        left = LEFT + panel * (SPAN + 95)
        picture.text(left, 32, f"{title}, tokens/s", "bold")
        most = max(speeds[panel] for _, speeds, _ in rows)
        for k, (name, speeds, over) in enumerate(rows):
            y = TOP + ROW * k
            kind = "box" if name in OTHERS else "target" if k == 0 else "yes"
            length = SPAN * speeds[panel] / most
            picture.box(left, y, length, ROW - 8, kind, 3)
            picture.text(left + length + 7, y + 16, f"{speeds[panel]:.0f}  {over[panel]}", "small")
            if panel == 0:
                picture.text(LEFT - 10, y + 16, name, "end")
    return picture


if __name__ == "__main__":
    readme, out = sys.argv[1:3] or ("README.md", "docs/images/speed.svg")
    draw(figures(Path(readme))).write(Path(out))
