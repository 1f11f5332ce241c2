"""`glidecape publish`: a draft to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..files import write_folder
from .waiting import waiting

LocalDraft = Annotated[Path, typer.Argument(metavar="DRAFT", help="Folder of a draft that was trained.")]


def publish(
    draft: LocalDraft,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Its name on the Hub, such as me/model-glide.")],
    base: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            help="Hub name of its model, OWNER/MODEL@REVISION to pin one; default: the name in the draft's card.",
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a private repository, where there is none yet.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to, made if it is not there.")] = None,
    license: Annotated[str | None, typer.Option(help="License of the draft, such as apache-2.0.")] = None,
    dataset: Annotated[
        list[str] | None, typer.Option(help="Hub name of a data set that it was trained on; repeat for several.")
    ] = None,
    message: Annotated[str, typer.Option(help="Message of the commit.")] = "Upload a draft",
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write what would be uploaded to this folder, and upload nothing."),
    ] = None,
) -> None:
    """Upload a draft to the Hugging Face Hub, with a model card.

    The file is checked against its description first. A draft without acceptance figures is refused, and one whose target
    others cannot load. Log in with `hf auth login`, or set HF_TOKEN.
    """
    from ..drafts.checkpoint import check_published
    from ..drafts.readme import Details
    from ..drafts.sharing import README, Place, write_published
    from ..drafts.sharing import publish as upload

    target = check_published(draft, base)
    details = Details(license, dataset or [])
    if out is not None:
        write_folder(out, lambda folder: write_published(draft, folder, repo, target, details), README)
        print(out)
        return
    with waiting(f"uploading {repo}"):
        print(upload(draft, Place(repo, private, revision, None, message), target, details))
