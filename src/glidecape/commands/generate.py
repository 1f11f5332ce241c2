"""`glidecape generate`: complete prompts with any method."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..core.params import SamplingParams
from ..drafting.options import MethodOptions
from .effects import note_unused, refuse_unused, typed
from .flatten import flattened
from .shared import (
    AsJson,
    ConstraintOptions,
    Draft,
    ServingMachine,
    TargetName,
    load_fitting_draft,
    read_prompts,
)


@flattened
def generate(
    ctx: typer.Context,
    target: TargetName,
    draft: Draft = None,
    method: Annotated[
        str,
        typer.Option(
            help="plain, lookup, vanilla, glide, eagle or medusa. All but the first two also +chain, +cape, +beam, +tree "
            "(EAGLE-2's, usual for eagle) or +static (EAGLE-1's, usual for medusa), and +svip or +heuristic."
        ),
    ] = "glide+cape",
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeat for several.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="A text file (one prompt), or .jsonl with text, prompt or messages; a row's own answer is left out.",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are a user's messages: apply the tokenizer's chat template.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Prompts decoded side by side.")] = 1,
    params: SamplingParams = SamplingParams(),
    constraint: ConstraintOptions = ConstraintOptions(),
    options: MethodOptions = MethodOptions(),
    svip_fit: Annotated[
        Path | None, typer.Option(help="Prompts to fit the threshold on first; .jsonl, or a text file.")
    ] = None,
    as_json: AsJson = False,
    machine: ServingMachine = ServingMachine(),
) -> None:
    """Complete prompts, from --prompt, --file or standard input."""
    from ..drafting.methods import make_drafter, parse_method
    from ..show import show

    base, _ = parse_method(method)
    refuse_unused(ctx, [method])
    note_unused(ctx, method, params.temperature)
    params = replace(params, constraint=constraint.read())
    prompts = read_prompts(prompt, file)
    rows = [replace(params, seed=params.seed + i) for i in range(len(prompts))]
    model = machine.load(target)
    loaded = load_fitting_draft(draft, base, model)
    if loaded is not None and typed(ctx, "draft_length") and options.length > loaded.max_lag:
        print(
            f"note: this draft was trained for {loaded.max_lag} tokens a round, so it drafts no more", file=sys.stderr
        )
    drafter = make_drafter(method, loaded, options)
    machine.compile_models(model, [drafter], len(rows) * params.max_new_tokens, not params.greedy)
    if svip_fit is not None:
        from ..fit import with_fitted_threshold

        known = [one.ids(model, chat) for one in read_prompts(None, svip_fit)]
        drafter, fit = with_fitted_threshold(model, drafter, known, rows[0])
        print(f"[svip threshold {fit.threshold}, {fit.speedup:.2f}x expected]", file=sys.stderr)
    show(model, drafter, prompts, rows, batch, method, as_json, chat)
