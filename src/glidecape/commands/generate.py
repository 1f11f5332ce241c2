"""`glidecape generate`: complete prompts with any method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from ..core.params import SamplingParams
from ..drafting.options import MethodOptions
from ..progress import note, say
from .effects import names_options, note_unused, refuse_unused, typed
from .shared import (
    AsJson,
    ConstraintOptions,
    Draft,
    Output,
    ServingMachine,
    TargetOrShipped,
    choose,
    opened,
    read_prompts,
)


def generate(
    ctx: typer.Context,
    target: TargetOrShipped = None,
    draft: Draft = None,
    method: Annotated[
        str,
        typer.Option(
            help="usual: auto, where costs are known or quick to measure, else what suits the draft. auto: measured costs "
            "decide how much is drafted. Else plain, lookup, vanilla, glide, eagle or medusa. All but plain also +auto. Those "
            "with a draft also +chain, +cape, +beam, +tree (EAGLE-2's, usual for eagle) or +static (EAGLE-1's, usual for "
            "medusa), and +svip or +heuristic."
        ),
    ] = "usual",
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeat for several.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="A text file (one prompt), or .jsonl with text, prompt or messages; answers in it are left out.",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat prompts as a user's messages: apply the tokenizer's chat template.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Prompts decoded side by side.")] = 1,
    params: SamplingParams = SamplingParams(),
    constraint: ConstraintOptions = ConstraintOptions(),
    options: MethodOptions = MethodOptions(),
    svip_fit: Annotated[
        Path | None, typer.Option(help="Fit SVIP's threshold on these prompts first; .jsonl or a text file.")
    ] = None,
    as_json: AsJson = False,
    output: Output = None,
    machine: ServingMachine = ServingMachine(),
) -> None:
    """Complete prompts, from --prompt, --file or standard input."""
    from ..fit import with_fitted_threshold
    from ..show import show

    named, (target, draft, method) = method, choose(target, draft, method)
    refuse_unused(ctx, [method])
    note_unused(ctx, [method], params.temperature)
    params = replace(params, constraint=constraint.read())
    prompts = read_prompts(prompt, file)
    calibration = [] if svip_fit is None else read_prompts(None, svip_fit)
    with opened(output) as out:
        lm = machine.load_pair(target, draft, method, options)
        if lm.draft is not None and typed(ctx, "draft_length") and options.length > lm.draft.max_lag:
            note(f"this draft was trained for {lm.draft.max_lag} tokens a round, so it drafts no more")
        tokens = len(prompts) * params.max_new_tokens
        lm = machine.prepared(lm, tokens, may_choose=named == "usual" and not names_options(ctx))
        if calibration:
            known = [one.ids(lm.target, chat) for one in calibration]
            lm.drafter, fit = with_fitted_threshold(lm.target, lm.drafter, known, params)
            say(f"[svip threshold {fit.threshold}, {fit.speedup:.2f}x expected]")
        show(lm, prompts, params, batch, as_json, chat, out)
