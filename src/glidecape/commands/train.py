"""`glidecape train` and `glidecape train-target`: a draft for a frozen target, and a small target from scratch."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..files import only_writer
from ..train.recipe import DraftRecipe, TargetShape, Windowing
from .shared import Machine, TargetName, command_line, resumable

if TYPE_CHECKING:
    from ..train.loop import Budget
    from ..train.rows import Preview

Tokens = Annotated[float | None, typer.Option("--tokens", help="Tokens to train on, such as 4e6.")]
Minutes = Annotated[
    float | None,
    typer.Option(
        help="Minutes to train, loading before and evaluation after it not counted; the first limit reached ends training."
    ),
]
SaveEvery = Annotated[float, typer.Option(min=0, help="Seconds between saves; a killed run loses no more than that.")]


def train(
    target: TargetName,
    data: Annotated[
        Path,
        typer.Option(
            help="Corpus folder; .jsonl(.gz) or .parquet with text, prompt or messages; text files; or hub:OWNER/NAME:SPLIT."
        ),
    ],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder of the draft; an interrupted run there resumes.")],
    recipe: DraftRecipe = DraftRecipe(),
    tokens: Tokens = None,
    minutes: Minutes = None,
    preview: Annotated[bool, typer.Option("--preview", help="Show a window with its loss mask, and exit.")] = False,
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile the draft.")] = False,
    save_every: SaveEvery = 300,
    eval_prompts: Annotated[
        int,
        typer.Option(min=0, help="Held-out prompts on which the trained draft is tried, greedily and at T=1; 0: none."),
    ] = 16,
    machine: Machine = Machine(dtype="float32"),
) -> None:
    """Train a draft for a frozen target; no hidden states need to be stored.

    On several GPUs or machines: torchrun --nproc-per-node GPUS -m glidecape train …
    """
    from ..sources import check_exists
    from ..train.draft import preview_data, train_draft
    from ..train.ranks import process_group, ranks

    budget = None if preview else budget_of(tokens, minutes)
    check_exists(data)  # before the model is loaded
    if budget is None:
        _show(preview_data(machine.load(target, pack=False), data, recipe))
        return
    with process_group(), only_writer(out) if ranks().first else nullcontext():
        model = machine.load(target, pack=False)
        with resumable(out if ranks().first else None):
            train_draft(
                model,
                data,
                out,
                recipe,
                budget,
                command_line(),
                eval_prompts,
                save_every,
                compile_model,
            )


def _show(preview: Preview) -> None:
    """With colours on a terminal; plain text where it is piped."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(preview)
    else:
        print(preview)


def budget_of(tokens: float | None, minutes: float | None) -> Budget:
    """When training ends.

    Raises:
        InputError: neither limit was given, or one is no number.
    """
    from ..train.loop import Budget

    if tokens is None and minutes is None:
        raise InputError("give --tokens or --minutes: nothing else ends training")
    if tokens is not None and not math.isfinite(tokens):
        raise InputError(f"--tokens takes a number such as 4e6, not {tokens}")
    return Budget(None if tokens is None else int(tokens), minutes)


def train_target(
    data: Annotated[Path, typer.Option(help="Corpus folder made by `glidecape data`.")],
    out: Annotated[
        Path, typer.Option("--output", "-o", help="Model folder to write; an interrupted run there resumes.")
    ],
    tokens: Tokens = None,
    minutes: Minutes = None,
    start_from: Annotated[
        Path | None, typer.Option(help="Model folder to continue from; its sizes are kept, and --data may be any text.")
    ] = None,
    shape: TargetShape = TargetShape(),
    windowing: Windowing = Windowing(),
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    with_draft: Annotated[
        bool, typer.Option("--with-draft", help="Train a draft beside it on the same batches, written to OUT/draft.")
    ] = False,
    draft_recipe: Annotated[
        str, typer.Option(help="With --with-draft: changes to its recipe, such as max_lag:6,loss:kl+tv.")
    ] = "",
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile: about a quarter faster.")] = False,
    save_every: SaveEvery = 300,
    seed: Annotated[int, typer.Option(help="Random seed of weights and batches.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: PyTorch's choice.")] = 0,
) -> None:
    """Train a small target from scratch, or continue training a model that you have."""
    from ..train import target as recipes
    from ..train.ranks import refuse_several

    refuse_several("train-target")
    Machine(device, threads=threads).check()
    budget = budget_of(tokens, minutes)
    draft = _joint_recipe(draft_recipe, seed) if with_draft else None
    if draft_recipe and draft is None:
        raise InputError("--draft-recipe says how to train a draft: give --with-draft too")
    with only_writer(out), resumable(out):
        recipes.train_target(
            data,
            out,
            shape,
            budget,
            windowing,
            rate,
            compile_model,
            device,
            seed,
            command_line(),
            save_every,
            draft,
            start_from=start_from,
        )


def _joint_recipe(changes: str, seed: int) -> DraftRecipe:
    from ..train.study_rows import changes_of

    wanted: dict[str, Any] = {"muon": True, "seed": seed} | (changes_of(changes) if changes else {})
    if given := {"length", "rows", "accumulate", "clip", "loss_on", "documents", "positions"} & wanted.keys():
        raise InputError(f"--draft-recipe cannot set {min(given)}: the draft sees its target's own batches")
    return DraftRecipe(**wanted)
