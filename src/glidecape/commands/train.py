"""`glidecape train` and `glidecape train-target`: a draft for a frozen target, and a small target from scratch."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..files import only_writer
from .shared import Device, Dtype, Revision, TargetName, Threads, Trust, check_device, command_line, load_target


def train(
    target: TargetName,
    data: Annotated[Path, typer.Option(help="Corpus folder, .jsonl(.gz) with text/prompt/messages, or text files.")],
    out: Annotated[Path, typer.Option(help="Folder of the draft; an interrupted run there goes on.")],
    kind: Annotated[
        str, typer.Option(help="glide, glide-no-cross (the ablation), eagle, medusa or lm (an independent LM).")
    ] = "glide",
    preset: Annotated[str, typer.Option(help="default, or paper: the paper's own choices.")] = "default",
    loss: Annotated[
        str,
        typer.Option(help="kl, rkl, tv, nla, lk_hybrid or ce, several joined by +; feature for eagle, its default."),
    ] = "",
    lags: Annotated[str, typer.Option(help="block-random, block (the paper's), balanced or shift.")] = "block-random",
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on, such as 4e6.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time to train; the first limit reached ends it.")] = None,
    max_lag: Annotated[int, typer.Option(help="Deepest draft to train for, heads of medusa; 0: the preset's.")] = 0,
    length: Annotated[int, typer.Option(min=16, help="Window in tokens.")] = 256,
    rows: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 16,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    optimizer: Annotated[str, typer.Option(help="adamw, or muon for the hidden matrices.")] = "adamw",
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of --rows windows a step.")] = 1,
    clip: Annotated[float, typer.Option(min=0, help="Largest norm of a step's gradient; 0: any.")] = 1.0,
    loss_on: Annotated[
        str, typer.Option(help="all tokens, or completion: of prompt+completion and chat data.")
    ] = "all",
    preview: Annotated[bool, typer.Option("--preview", help="Show a window with its loss mask, and exit.")] = False,
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile the draft.")] = False,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between saves; a killed run loses no more.")] = 300,
    layers: Annotated[int, typer.Option(min=1, help="Of the draft; GliDe has 1 or 2.")] = 1,
    read: Annotated[
        str,
        typer.Option(
            help="Target layers that it reads: last; upper, three quarters of the way up; numbers joined by +; or mix: a "
            "learned mean. Default: the preset's."
        ),
    ] = "",
    glimpse: Annotated[
        str, typer.Option(help="on: it takes the target's last hidden state, too; or off; default: the preset's.")
    ] = "",
    width: Annotated[float, typer.Option(help="Its width over the target's.")] = 1.0,
    window: Annotated[
        int, typer.Option(min=-1, help="Tokens that its self-attention looks back; 0: all; -1: the preset's, 64.")
    ] = -1,
    embedding: Annotated[str, typer.Option(help="shared with the target or own; default: the preset's.")] = "",
    norm: Annotated[str, typer.Option(help="on or off, before the cross-attention; default: the preset's.")] = "",
    draft_vocab: Annotated[int, typer.Option(help="Propose only so many frequent tokens; 0: all.")] = 0,
    noise: Annotated[float, typer.Option(help="On the features that eagle is trained on; 0: none.")] = 0.1,
    seed: int = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = 0,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Train a draft for a frozen target. Its keys and values are made on the fly; nothing is stored."""
    from ..train.draft import DraftRecipe, preview_data, train_draft

    muon = _is_muon(optimizer)
    recipe = DraftRecipe(
        kind,
        preset,
        loss,
        max_lag,
        length,
        rows,
        rate,
        muon,
        seed,
        lags,
        loss_on,
        accumulate,
        clip,
        layers,
        read,
        glimpse,
        width,
        window,
        embedding,
        norm,
        draft_vocab,
        noise,
    )
    budget = None if preview else _budget(tokens, minutes)
    model = load_target(target, dtype, device, threads, revision, trust_remote_code, pack=False)
    if budget is None:
        _show(preview_data(model, data, recipe))
        return
    with only_writer(out):
        train_draft(
            model, data, out, recipe, budget, command_line(), save_every_s=save_every, compile_model=compile_model
        )


def _show(preview: Any) -> None:
    """With colours on a terminal; plain text where it is piped."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(preview)
    else:
        print(preview)


def _is_muon(optimizer: str) -> bool:
    if optimizer not in ("adamw", "muon"):
        raise InputError(f"unknown optimizer '{optimizer}': choose adamw or muon")
    return optimizer == "muon"


def _budget(tokens: float | None, minutes: float | None) -> Any:
    from ..train.loop import Budget

    if tokens is None and minutes is None:
        raise InputError("give --tokens or --minutes: training has no other end")
    if tokens is not None and not math.isfinite(tokens):
        raise InputError(f"--tokens takes a number such as 4e6, not {tokens}")
    return Budget(None if tokens is None else int(tokens), minutes)


def train_target(
    data: Annotated[Path, typer.Option(help="Corpus folder made by `glidecape data`.")],
    out: Annotated[Path, typer.Option(help="Model folder; an interrupted run there goes on.")],
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on, such as 2e7.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time to train; the first limit reached ends it.")] = None,
    start_from: Annotated[
        Path | None, typer.Option(help="Model folder to train further; sizes are then its own, --data any text.")
    ] = None,
    layers: int = 6,
    width: int = 384,
    ffn: int = 1024,
    heads: int = 6,
    kv_heads: int = 6,
    context: Annotated[int, typer.Option(help="Longest sequence that the model declares.")] = 8192,
    rope_theta: Annotated[float, typer.Option(help="Base of the rotary embedding.")] = 1e5,
    architecture: Annotated[str, typer.Option(help="llama, or qwen3: normalised queries and keys.")] = "llama",
    window: Annotated[int, typer.Option(min=0, help="Tokens that a layer with a window sees (qwen3); 0: all.")] = 0,
    full_every: Annotated[int, typer.Option(min=1, help="Layers from one without window to the next.")] = 4,
    length: Annotated[int, typer.Option(min=16, help="Window in tokens.")] = 512,
    rows: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 16,
    long_length: Annotated[int, typer.Option(help="Window at the end of the run.")] = 2048,
    long_share: Annotated[float, typer.Option(min=0, max=1, help="Share of the run with long windows.")] = 0.1,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    with_draft: Annotated[
        bool, typer.Option("--with-draft", help="Train a draft beside it on the same batches, written to OUT/draft.")
    ] = False,
    draft_recipe: Annotated[
        str, typer.Option(help="With --with-draft: changes to its recipe, such as max_lag:6,loss:kl+tv.")
    ] = "",
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile: about a quarter faster.")] = False,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between saves; a killed run loses no more.")] = 300,
    seed: int = 0,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Train a small target from nothing, for a machine without any model, or a model you have further."""
    import torch

    from ..train import target as recipes

    if threads:
        torch.set_num_threads(threads)
    check_device(device)
    shape = recipes.TargetShape(
        layers, width, ffn, heads, kv_heads, context, rope_theta, architecture, window, full_every
    )
    windowing = recipes.Windowing(length, rows, long_length, long_share)
    budget = _budget(tokens, minutes)
    draft = _draft_beside(draft_recipe, seed) if with_draft else None
    if draft_recipe and draft is None:
        raise InputError("--draft-recipe says how to train a draft: give --with-draft too")
    with only_writer(out):
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


def _draft_beside(changes: str, seed: int) -> Any:
    from ..train.draft import DraftRecipe
    from ..train.study import changes_of

    wanted: dict[str, Any] = {"muon": True, "seed": seed} | (changes_of(changes) if changes else {})
    if given := {"length", "rows", "accumulate", "clip", "loss_on"} & wanted.keys():
        raise InputError(f"--draft-recipe cannot set {min(given)}: the draft sees its target's own batches")
    return DraftRecipe(**wanted)
