"""`glidecape doctor`: why a target and its draft are slow, and what to change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from ..core.params import SamplingParams
from ..errors import InputError
from ..progress import bar, note
from .shared import AsJson, Draft, Output, ServingMachine, TargetOrShipped, opened, pair_or_shipped, read_prompts

if TYPE_CHECKING:
    from ..batch.text import Prompt
    from ..costmodel import Prices
    from ..doctor.examine import Diagnosis
    from ..drafting.auto.drafter import AutoDrafter

DoctorPrompts = Annotated[
    Path | None,
    typer.Option(help=".jsonl with text, prompt or messages, or a text file: text like yours; default: built in."),
]


def doctor(
    target: TargetOrShipped = None,
    draft: Draft = None,
    prompts: DoctorPrompts = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat prompts as a user's messages: apply the tokenizer's chat template.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Prompts at most.")] = 16,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0: greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Most tokens of each output.")] = 96,
    as_json: AsJson = False,
    output: Output = None,
    machine: ServingMachine = ServingMachine(),
) -> None:
    """Say why a pair is slow: one row for each possible cause, with what was found and what to change.

    Exit code 0, whatever is found; 2 where the model or the draft cannot be read.
    """
    from ..costs import prices_of
    from ..doctor.examine import examine
    from ..drafts.checkpoint import resolve

    params = SamplingParams(temperature, seed=1, max_new_tokens=max_new_tokens)
    shipped = target is None and draft is None
    target, drafts = pair_or_shipped(target, [] if draft is None else [draft])
    if not drafts:
        raise InputError("there is no draft to examine: name its folder with --draft")
    texts = _prompts(prompts, shipped)[:limit]
    with opened(output) as out:
        folder = resolve(drafts[0])
        model = machine.load(target)
        ids = [prompt.ids(model, chat) for prompt in texts]

        def measure(drafter: AutoDrafter) -> Sequence[Prices]:
            machine.compile_models(model, [drafter], len(ids) * max_new_tokens, price=False)
            return prices_of(model, drafter, note)

        with bar("examining"):
            found = examine(model, folder, ids, params, measure)
        if as_json:
            where = {"target": target, "draft": drafts[0], "dtype": str(model.dtype).removeprefix("torch.")}
            print(json.dumps(where | {"temperature": temperature, "prompts": len(ids)} | found.as_dict()), file=out)
        else:
            _print(found, out)


def _prompts(file: Path | None, shipped: bool) -> list[Prompt]:
    """The prompts of a file; without one those built in, for the shipped pair the ones that it was made for."""
    from ..batch.text import Prompt
    from ..bench.suites import read_suites
    from ..certify import PROMPTS

    if file is not None:
        return read_prompts(None, file)
    if shipped:
        return [Prompt(one.turns[0]) for one in read_suites(["own"], None, False)[0].prompts]
    return [Prompt(text) for text in PROMPTS]


def _print(found: Diagnosis, out: TextIO | None) -> None:
    from ..doctor.examine import cells
    from ..tables import TextTable, wide_console

    console = wide_console(out)
    rows = [[row.cause, row.verdict, row.found, row.change] for row in found.rows]
    TextTable("why a pair is slow", ["looked at", "verdict", "found", "what to change"], rows).print(console)
    if depths := list(cells(found)):
        heads = ["depth", "in training", "teacher-forced", "decoded (nodes tested)"]
        TextTable("acceptance by depth", heads, depths).print(console)
    console.print(found.sentence, soft_wrap=True)
