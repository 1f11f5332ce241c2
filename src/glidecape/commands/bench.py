"""`glidecape bench`: methods beside plain decoding and transformers, on one target in one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from .shared import (
    Device,
    Dtype,
    TargetName,
    Threads,
    command_line,
    load_target,
    named_folders,
    parse_bins,
    read_prompts,
)


def bench(
    target: TargetName,
    draft: Annotated[list[str], typer.Option(help="NAME=FOLDER, such as glide=models/pysource/glide; repeat.")],
    prompts: Annotated[
        str,
        typer.Option(
            help="Joined by commas: .jsonl with a prompt column, a text file, stdlib:N for cuts of Python's own."
        ),
    ],
    methods: Annotated[
        str, typer.Option(help="Joined by commas; NAME:method uses the draft of that name.")
    ] = "plain,glide",
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    prompt_tokens: Annotated[int, typer.Option(help="Prompts are cut to so many tokens; 0: whole.")] = 0,
    limit: Annotated[int, typer.Option(help="Prompts that count: with greedy decoding, ones that don't loop.")] = 32,
    looping: Annotated[int, typer.Option(help="Prompts with looping greedy continuations, reported apart.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats; medians are reported.")] = 3,
    transformers: Annotated[bool, typer.Option(help="Time transformers' own generate in the same run.")] = True,
    draft_length: int = 5,
    cape_bins: str = "paper",
    svip_threshold: float = 0.3,
    out: Annotated[Path | None, typer.Option(help="Write the table as JSON too.")] = None,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = 0,
) -> None:
    """Compare methods on one target, prompt by prompt in turn, beside plain decoding and transformers."""
    from ..bench.compare import Settings, compare, report
    from ..bench.prompts import stdlib_prompts
    from ..models.checkpoint import load_draft

    model = load_target(target, dtype, device, threads, None, False)
    drafts = {name: load_draft(folder, model) for name, folder in named_folders(draft).items()}
    settings = Settings(
        temperature,
        max_new_tokens,
        prompt_tokens,
        limit,
        looping,
        repeats,
        draft_length,
        parse_bins(cape_bins),
        svip_threshold,
    )
    source = target if transformers else None
    texts = []
    for source_of in prompts.split(","):
        suite, _, count = source_of.partition(":")
        if suite == "stdlib" and not (count or "128").isdigit():
            raise InputError(f"--prompts stdlib:N takes a number, not '{count}'")
        texts += stdlib_prompts(int(count or 128)) if suite == "stdlib" else read_prompts(None, Path(source_of))
    result = compare(model, drafts, methods.split(","), texts, settings, source, command_line())
    report(result)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
