"""`glidecape data`: training corpora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Make training corpora.", no_args_is_help=True)


@app.command()
def pysource(
    out: Annotated[Path, typer.Option(help="Corpus folder to write.")],
    root: Annotated[
        list[Path] | None, typer.Option(help="Folder of Python packages; repeat. Default: site-packages.")
    ] = None,
    hold_out: Annotated[str, typer.Option(help="Packages kept out of training, joined by commas.")] = "",
    vocab_size: Annotated[int, typer.Option(min=512, max=65_535)] = 4096,
    max_bytes: Annotated[float | None, typer.Option(help="Training text at most, such as 9e7.")] = None,
) -> None:
    """Tokenize the Python sources of installed packages: a corpus without any download."""
    from ..train.corpus import build_pysource

    held = tuple(name for name in hold_out.split(",") if name)
    counts = build_pysource(out, root, held, vocab_size, int(max_bytes) if max_bytes else None)
    print(json.dumps(counts))
