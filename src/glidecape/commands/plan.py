"""`glidecape plan`: what a training of a draft will need, before it is begun: parameters, disk, memory and hours.

Sizes are counted, memory is estimated from them, speed is measured on this machine with the very step that training
takes (`train.draft.DraftLoss`).
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..progress import bar
from ..tables import millions, several
from ..train.recipe import DraftRecipe
from .shared import AsJson, Machine, TargetName

if TYPE_CHECKING:
    from torch import nn

    from ..target.target import Target
    from ..train.stream import Windows

ROOM = 0.9  # of the free memory that a training may be planned to take


@dataclass(frozen=True)
class Sizes:
    """Counted sizes; `_bytes` as said. `memory_bytes` is an estimate of the peak: weights, gradients, optimizer moments,
    the target's cache and the logits, with the draft's activations."""

    target_parameters: int
    draft_parameters: int
    checkpoint_bytes: int
    training_state_bytes: int
    memory_bytes: int


def sizes(target: Target, module: nn.Module, recipe: DraftRecipe, length: int) -> Sizes:
    """What training `module` with windows of `length` tokens stores and holds."""
    own = sum(p.numel() for p in module.parameters())
    frozen = sum(p.numel() * p.element_size() for p in target.model.parameters())
    cache = 2 * sum(h * d for h, d in target.shapes) * recipe.rows * length * target.dtype.itemsize
    # Logits: the target's, the draft's and twice their gradient in autocast's two bytes; a piece of them is widened.
    from ..train.kinds import training_of
    from ..train.losses import CHUNK

    logits = recipe.rows * length * target.vocab_size * training_of(module).laws
    widened = 6 * 4 * min(logits, CHUNK)
    config = target.text_config
    ffn = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    # About a dozen tensors of the width and four of the feed-forward width stay for the backward pass, and as much is
    # taken by the target's widest layer for a moment.
    activations = 4 * recipe.rows * length * (16 * config.hidden_size + 6 * ffn)
    if recipe.documents == "apart":
        activations += (
            8 * recipe.rows * length**2
        )  # masks of every position for every other, of the target and the draft
    return Sizes(
        target_parameters=sum(p.numel() for p in target.model.parameters()),
        draft_parameters=own,
        checkpoint_bytes=2 * own,
        training_state_bytes=12 * own,
        memory_bytes=frozen
        + 16 * own
        + cache
        + 2 * (recipe.rows * length * target.vocab_size + 3 * logits)
        + widened
        + activations,
    )


def free_memory(device: Any) -> int | None:
    """Bytes that can still be taken on `device`, None where the system does not say. On a CPU: Linux's MemAvailable."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


def measure(
    target: Target, module: nn.Module, recipe: DraftRecipe, windows: Windows | None, length: int, seconds: float
) -> tuple[float, int]:
    """Tokens a second of training, and how many batches that was measured on.

    One batch warms up; then batches are timed for `seconds`, three at least; the median counts.

    Args:
        windows: a `train.stream.Windows`, or None for random token ids (speed does not depend on what they are).
    """
    import torch

    from ..train.draft import DraftLoss
    from ..train.loop import optimizers, reuse_freed_memory

    reuse_freed_memory()
    made = optimizers(module, recipe.rate, recipe.muon)
    draft_loss = DraftLoss(target, module.train(), recipe, length)
    times: list[float] = []
    began = time.monotonic()
    while len(times) < 4 or time.monotonic() - began < seconds:
        number, started = len(times), time.monotonic()
        if windows is None:
            generator = torch.Generator().manual_seed(number)
            batch = torch.randint(target.vocab_size, (recipe.rows, length), generator=generator)
            begins = torch.zeros_like(batch) if recipe.documents == "apart" else None  # one document a window
        else:
            batch = windows.batch(number, recipe.rows, length)
            begins = windows.batch_begins(number, recipe.rows, length)
        there = None if begins is None else begins.to(target.device)
        draft_loss(batch.to(target.device), number, begins=there).backward()
        torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], 1.0)
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if target.device.type == "cuda":
            torch.cuda.synchronize(target.device)
        times.append(time.monotonic() - started)
    timed = sorted(times[1:])
    return recipe.rows * length / timed[len(timed) // 2], len(timed)


def make_plan(
    target: Target, recipe: DraftRecipe, tokens: int, data: Path | None = None, seconds: float = 5.0
) -> dict[str, Any]:
    """The plan as one flat dictionary: `Sizes`, tokens_per_s, hours, and the numbers they hold for.

    Raises:
        InputError: training would not fit into the free memory; nothing was measured.
        DataError: `data` cannot be read.
    """
    from ..train.data import load_streams
    from ..train.draft import make_draft
    from ..train.stream import Windows

    length = min(recipe.length, target.context)
    text = load_streams(data, target.tokenizer, target.vocab_size)["train"] if data else None
    windows = None if text is None else Windows(text, recipe.seed, recipe.documents == "apart")
    module = make_draft(target, recipe, None if text is None else text.tokens)
    counted = sizes(target, module, recipe, length)
    free = free_memory(target.device)
    loaded = counted.target_parameters * target.dtype.itemsize  # is in memory already
    if free is not None and counted.memory_bytes - loaded > ROOM * free:
        raise InputError(
            f"training {recipe.rows} windows of {length} tokens needs about {_bytes(counted.memory_bytes)}, and "
            f"{_bytes(free)} are free on {target.device} with the target loaded: lower --rows or --length, or load the "
            "target with --dtype bfloat16"
        )
    speed, batches = measure(target, module, recipe, windows, length, seconds)
    plan = vars(counted) | {
        "rows": recipe.rows,
        "length": length,
        "steps": -(-tokens // (recipe.rows * length * recipe.accumulate)),
        "tokens": tokens,
        "tokens_per_s": round(speed, 1),
        "batches_timed": batches,
        "hours": round(tokens / speed / 3600, 4),
    }
    if windows is not None:
        plan |= {"data_tokens": len(windows.text.tokens), "epochs": round(tokens / len(windows.text.tokens), 2)}
    return plan


def _bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if count >= 100 or unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError


def _time(hours: float) -> str:
    if hours < 1 / 60:
        return f"{3600 * hours:.0f} seconds"
    return f"{60 * hours:.0f} minutes" if hours < 2 else f"{hours:.1f} hours"


def describe(plan: dict[str, Any]) -> str:
    """The plan in lines for people."""
    import torch

    lines = [
        f"target      {millions(plan['target_parameters'])} parameters, frozen",
        f"draft       {millions(plan['draft_parameters'])} parameters, trained",
        f"on disk     {_bytes(plan['checkpoint_bytes'])} draft, {_bytes(plan['training_state_bytes'])} state to resume from",
        f"in memory   about {_bytes(plan['memory_bytes'])}: {plan['rows']} windows of {plan['length']} tokens a step",
        f"speed       {plan['tokens_per_s']:,.0f} tokens/s, median of {plan['batches_timed']} batches with "
        f"{several(torch.get_num_threads(), 'thread')} of {os.cpu_count()}",
        f"time        {_time(plan['hours'])} for {plan['tokens']:,} tokens in {plan['steps']:,} steps",
    ]
    if "epochs" in plan:
        lines.append(f"data        {plan['data_tokens']:,} tokens: {plan['epochs']} times over")
    return "\n".join(lines)


def plan(
    target: TargetName,
    data: Annotated[Path | None, typer.Option(help="Text to train on; default: random token ids.")] = None,
    tokens: Annotated[float, typer.Option(min=1, help="Tokens to train on.")] = 4e6,
    recipe: DraftRecipe = DraftRecipe(),
    seconds: Annotated[float, typer.Option(min=0, help="Seconds to measure for.")] = 5.0,
    as_json: AsJson = False,
    machine: Machine = Machine(dtype="float32"),
) -> None:
    """What training a draft will take on this machine: parameters, disk, memory, and hours. Writes nothing."""
    from ..sources import check_exists

    if data is not None:
        check_exists(data)
    model = machine.load(target, pack=False)
    with bar("measuring", seconds=seconds + 1):
        made = make_plan(model, recipe, int(tokens), data, seconds)
    print(json.dumps(made) if as_json else describe(made))
