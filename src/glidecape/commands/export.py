"""`glidecape export`: a draft in another library's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .publish import LocalDraft


def export(
    draft: LocalDraft,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    form: Annotated[
        str, typer.Option("--format", help="speculators: config.json and model.safetensors.")
    ] = "speculators",
    base: Annotated[
        str | None, typer.Option("--base-model", help="Hub name of its model; default: the name in the draft's card.")
    ] = None,
) -> None:
    """Write a GliDe draft in the format of the speculators library."""
    from ..drafts.speculators import write_speculators

    if form != "speculators":
        raise InputError(f"--format takes speculators, not '{form}'")
    write_speculators(draft, out, base)
    print(out)
