"""`glidecape tune`: what `auto` goes by on this machine, and what it has learned of a draft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from ..errors import InputError
from ..progress import bar, note
from .shared import AsJson, Draft, Output, ServingMachine, TargetOrShipped, opened, pair_or_shipped, read_prompts

if TYPE_CHECKING:
    from ..drafting.auto.stored import Stored
    from ..tune import Tuned


def tune(
    target: TargetOrShipped = None,
    draft: Draft = None,
    again: Annotated[bool, typer.Option("--again", help="Measure anew, and keep that.")] = False,
    store: Annotated[
        bool, typer.Option("--store", help="Learn how much is accepted, and keep it beside the draft's weights.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="With --store, to learn from: .jsonl with a prompt column, or a text file; default: built in."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="With --store, most tokens of each output.")] = 96,
    as_json: AsJson = False,
    output: Output = None,
    machine: ServingMachine = ServingMachine(),
) -> None:
    """Show the prices that auto goes by, and the fixed lengths that would be best under them.

    Without --draft: of prompt lookup alone. Prices are measured where they are not known yet, and kept.
    """
    from ..certify import PROMPTS
    from ..drafting.auto.drafter import AutoDrafter
    from ..drafting.auto.stored import store as keep
    from ..drafting.methods import base_for, make_drafter
    from ..drafts.checkpoint import load_draft
    from ..tune import learn, tuned

    if prompts is not None and not store:
        raise InputError("--prompts are what --store learns from: give --store, too, or leave --prompts out")
    target, drafts = pair_or_shipped(target, [] if draft is None else [draft])
    if store and not drafts:
        raise InputError("--store keeps what was learned beside a draft: name its folder with --draft")
    texts = list(PROMPTS) if prompts is None else [prompt.text for prompt in read_prompts(None, prompts)]
    with opened(output) as out:
        model = machine.load(target)
        loaded = load_draft(drafts[0], model) if drafts else None
        drafter = make_drafter("lookup+auto" if loaded is None else f"{base_for(loaded.kind)}+auto", loaded)
        assert isinstance(drafter, AutoDrafter)
        machine.compile_models(model, [drafter], 0, price=False)
        found = tuned(model, drafter, note, again)
        kept = None
        if store:
            with bar("learning"):
                learn(model, drafter, [model.encode(text) for text in texts], max_new_tokens)
            kept = keep(drafter, loaded)
        if as_json:
            learned = {} if kept is None else {"stored": str(kept[0]), "learned_from": kept[1].observations}
            print(
                json.dumps({"target": target, "draft": drafts[0] if drafts else None} | found.as_dict() | learned),
                file=out,
            )
        else:
            _print(found, kept, out)


def _print(found: Tuned, kept: tuple[Path, Stored] | None, out: TextIO | None) -> None:
    from ..tables import wide_console
    from ..tune import tables_of

    console = wide_console(out)
    for table in tables_of(found):
        table.print(console)
    when = "measured now" if found.measured else "measured before"
    there = found.file is not None and found.file.is_file()
    console.print(f"prices: {when}, {f'kept in {found.file}' if there else 'not kept'}", soft_wrap=True)
    if kept is not None:
        greedy, sampled = kept[1].observations
        said = f"acceptance: learned from {greedy:,} greedy and {sampled:,} sampled tokens, kept in {kept[0]}"
        console.print(said, soft_wrap=True)
