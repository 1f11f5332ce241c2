"""`glidecape study`: draft recipes trained side by side on the same batches, and compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..files import only_writer
from ..train.recipe import DraftRecipe, is_muon
from .shared import Machine, TargetName, command_line, resumable
from .train import SaveEvery, Tokens, budget_of


def study(
    target: TargetName,
    data: Annotated[Path, typer.Option(help="As for train.")],
    out: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of the study; an interrupted study there resumes.")
    ],
    factor: Annotated[
        list[str] | None,
        typer.Option(
            help="One row for each value of this factor: cross, loss, lags, max-lag, preset, optimizer, "
            "glimpse, layers, read, width, norm, "
            "embedding, window or draft-vocab; repeat."
        ),
    ] = None,
    row: Annotated[
        list[str] | None, typer.Option(help="One more row, NAME=field:value,field:value of a recipe; repeat.")
    ] = None,
    base: Annotated[
        str, typer.Option(help="Changes to the recipe that all rows start from, field:value,field:value.")
    ] = "",
    seeds: Annotated[str, typer.Option(help="Random seeds, joined by commas; every row is trained with each.")] = "0",
    tokens: Tokens = None,
    length: Annotated[int, typer.Option(min=16, help="Tokens of a window.")] = 256,
    rows: Annotated[int, typer.Option(min=1, help="Windows in each step.")] = 16,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    optimizer: Annotated[str, typer.Option(help="muon for the hidden matrices, or adamw.")] = "muon",
    prompts: Annotated[
        int, typer.Option(min=2, help="Held-out prompts to compare on, only those whose output does not loop.")
    ] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of a prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option(min=16, help="Tokens decoded after each.")] = 64,
    save_every: SaveEvery = 300,
    machine: Machine = Machine(dtype="float32"),
) -> None:
    """Train several draft recipes on the same batches, the target's forward paid once, and compare them in a table."""
    from ..sources import check_exists
    from ..train.ranks import refuse_several
    from ..train.study import Trial, run_study
    from ..train.study_rows import changes_of, study_rows
    from ..train.study_table import table_of

    refuse_several("study")
    if tokens is None:
        raise InputError("give --tokens: the rows of a study are compared at equal tokens")
    try:
        numbers = tuple(int(part) for part in seeds.split(","))
    except ValueError:
        raise InputError(f"--seeds takes numbers joined by commas, not '{seeds}'") from None
    common = {"length": length, "rows": rows, "rate": rate, "muon": is_muon(optimizer)}
    recipe = DraftRecipe(**(common | (changes_of(base) if base else {})))
    trial = Trial(prompts, prompt_tokens, new_tokens)
    check_exists(data)
    with only_writer(out):  # asked before the model is loaded, too
        model = machine.load(target, pack=False)
        recipes = study_rows(recipe, factor or [], row or [], len(model.shapes))
        budget = budget_of(tokens, None)
        with resumable(out):
            result = run_study(model, data, out, recipes, budget, numbers, trial, command_line(), save_every)
    table_of(result["table"]).print()
