"""`glidecape report`: a page and Markdown tables from the folders of `glidecape bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..progress import note
from .waiting import waiting


def report(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER", help="Folders of glidecape bench --output, finished or not.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where report.html and report.md go; default: the first folder."),
    ] = None,
) -> None:
    """Write one self-contained HTML page and Markdown tables of one or several runs."""
    from ..bench.plots import have_matplotlib
    from ..bench.report import write_report

    with waiting("drawing the report"):
        page, text, sentence = write_report(folders, out or folders[0])
    if not have_matplotlib():
        note("the page has no plots but the first: they need matplotlib, pip install 'glidecape[plots]'")
    print(sentence)
    print(page)
    print(text)
