"""The picture of docs/auto.md from the table there: speeds of the best constant, auto and the oracle for each kind of prompt.

.venv/bin/python runs/auto_picture.py [docs/auto.md docs/images/auto.svg]

So the two cannot differ; tests/test_site.py compares them.
"""

import sys
from pathlib import Path

from drawings import Picture
from picture import table_of

LEFT, TOP, ROW, SPAN = 230, 58, 46, 330
KINDS = (("best constant", 2, "box"), ("auto", 3, "yes"), ("oracle", 5, "target"))  # with the table's column


def draw(rows: list[list[str]]) -> Picture:
    picture = Picture("Speed over plain decoding", 720, TOP + ROW * len(rows) + 20)
    most = max(float(row[column]) for row in rows for _, column, _ in KINDS)
    for k, (name, _, kind) in enumerate(KINDS):
        picture.box(LEFT + 130 * k, 20, 12, 12, kind, 2)
        picture.text(LEFT + 130 * k + 18, 31, name, "small")
    for i, row in enumerate(rows):
        picture.text(LEFT - 10, TOP + ROW * i + 22, row[0], "end")
        for k, (_, column, kind) in enumerate(KINDS):
            y, length = TOP + ROW * i + 13 * k, SPAN * float(row[column]) / most
            picture.box(LEFT, y, length, 11, kind, 2)
            picture.text(LEFT + length + 7, y + 10, row[column], "small")
    return picture


if __name__ == "__main__":
    page, out = sys.argv[1:3] or ("docs/auto.md", "docs/images/auto.svg")
    draw(table_of(Path(page))).write(Path(out))
