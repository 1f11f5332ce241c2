"""What every training here shares: the schedule, the loop with its progress bar.

The schedule is warmup-stable-decay over *progress* in [0, 1], which is the larger of "share of the tokens" and "share
of the minutes". So a run can be given either budget, and any checkpoint of the stable phase can be decayed later.
"""

from __future__ import annotations

import ctypes
import json
import math
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..compat import without_weight_bars
from ..drafts.card import CARD, STATE, WEIGHTS
from ..errors import InputError
from ..files import write_folder
from ..progress import bar
from .ranks import average_gradients, largest_of, mean_of
from .stopping import Stopped, stop_requests

CURVE, PICTURE = "curve.json", "curve.png"
WRITTEN = (STATE, CURVE, PICTURE, WEIGHTS, CARD)


@dataclass
class Budget:
    """When training ends, and the learning rate on the way there.

    `tokens` and `minutes` are upper limits, either may be None, not both. `warmup` and `decay` are shares of the whole.
    """

    tokens: int | None = None
    minutes: float | None = None
    warmup: float = 0.02
    decay: float = 0.25

    def __post_init__(self) -> None:
        limits = [limit for limit in (self.tokens, self.minutes) if limit is not None]
        if not limits or not all(limit > 0 and math.isfinite(limit) for limit in limits):
            raise InputError(
                f"training ends after at least 1 token or some minutes, not {self.tokens} tokens and {self.minutes} minutes"
            )

    def progress(self, tokens: int, seconds: float) -> float:
        by_tokens = tokens / self.tokens if self.tokens else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_tokens, by_time))

    def factor(self, progress: float) -> float:
        """Share of the peak learning rate at `progress`."""
        if progress < self.warmup:
            return max(progress, 1e-3 * self.warmup) / self.warmup
        return min(1.0, max(0.0, (1 - progress) / self.decay))


@dataclass
class Clock:
    """Where a run stands; saved with the weights, so that a resumed run goes on exactly there.

    Attributes:
        losses: of each step, in nats; where several modules are trained, the first one's.
        each: every module's losses, where there are several.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    each: list[list[float]] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int | float]:
        """How long was trained, as a draft's or target's figures say it."""
        return {"steps": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 1)}

    def log(self, losses: list[float]) -> None:
        """Append a step's losses, one a module."""
        self.losses.append(losses[0])
        if len(losses) > 1:
            self.each = self.each or [[] for _ in losses]
            for past, value in zip(self.each, losses, strict=True):
                past.append(value)


def recent_mean(losses: list[float], steps: int = 50) -> float:
    """Mean loss in nats over the last steps."""
    recent = losses[-steps:]
    return round(sum(recent) / len(recent), 4)


def reuse_freed_memory() -> None:
    """Ask glibc to keep freed blocks instead of returning them to the kernel; elsewhere, do nothing.

    Activations of hundreds of megabytes are freed and taken again each step; giving them back made half of the CPU time
    page faults (dev/LOG.md).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(option, 2**31 - 1)


def optimizers(module: torch.nn.Module, rate: float, muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW; with `muon`, hidden matrices go to Muon instead (fewer tokens to the same loss on small targets)."""
    learned = [p for p in module.parameters() if p.requires_grad]
    hidden = hidden_matrices(module) if muon else []
    chosen = {id(p) for p in hidden}
    rest = [p for p in learned if id(p) not in chosen]
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(
            [
                {"params": [p for p in rest if p.ndim >= 2], "weight_decay": 0.01},
                {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=rate,
            betas=(0.9, 0.95),
        )
    ]
    if hidden:
        made.append(torch.optim.Muon(hidden, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
    for optimizer in made:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return made


def hidden_matrices(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The trained weight matrices between two hidden states: no embedding, no vocabulary head, no learned mean's scores."""
    outer = {id(part.weight) for part in module.modules() if isinstance(part, torch.nn.Embedding)}
    for part in module.modules():
        heads = [part.get_output_embeddings()] if isinstance(part, PreTrainedModel) else [getattr(part, "head", None)]
        outer |= {id(head.weight) for head in heads if isinstance(head, torch.nn.Linear)}
    return [
        p
        for name, p in module.named_parameters()
        if p.requires_grad and p.ndim == 2 and name.endswith("weight") and id(p) not in outer
    ]


def differences(saved: dict[str, Any], wanted: dict[str, Any], within: str = "") -> list[str]:
    """What a run was begun with that is now wanted otherwise, in words. What was not saved is taken for equal.

    >>> differences({"rate": 0.1, "recipe": {"loss": "kl", "rows": 2}}, {"rate": 0.1, "recipe": {"loss": "tv", "rows": 2}})
    ['recipe.loss kl, not tv']
    """
    found: list[str] = []
    for name, value in wanted.items():
        there = saved.get(name, value)
        if isinstance(there, dict) and isinstance(value, dict):
            found += differences(there, value, f"{within}{name}.")
        elif there != value:
            found.append(f"{within}{name} {there}, not {value}")
    return found


def save_lm(model: Any, tokenizer: Any, out: Path, card: dict[str, Any]) -> None:
    """Write an ordinary Hugging Face model folder, with a card; an earlier model there stays until this one is whole.

    Raises:
        CheckpointError: the disk is full or the folder not writable.
    """

    def write(folder: Path) -> None:
        with without_weight_bars():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / CARD).write_text(json.dumps(card, indent=1) + "\n")

    write_folder(out, write, last=CARD)


def _step(
    modules: Sequence[torch.nn.Module], made: list[torch.optim.Optimizer], losses: list[float], number: int, clip: float
) -> None:
    """Clip the gradients and take step `number`.

    Raises:
        InputError: a loss is not finite.
    """
    if not all(map(math.isfinite, losses)):
        raise InputError(
            f"the loss is {', '.join(f'{value:g}' for value in losses)} at step {number}: lower the learning rate and start "
            "again with another --output; what was saved before is kept"
        )
    for module in modules if clip else ():
        torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.grad is not None], clip)
    for optimizer in made:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def fit(
    modules: Sequence[torch.nn.Module],
    made: list[torch.optim.Optimizer],
    budget: Budget,
    losses_of: Callable[[int], tuple[Iterable[torch.Tensor], int]],
    clock: Clock,
    save: Callable[[Clock], None],
    save_every_s: float = 300.0,
    clip: float = 1.0,
    accumulate: int = 1,
) -> Clock:
    """Train until the budget is spent. `losses_of(number)` gives the losses of the run's batch of that number, one a
    module, and the batch's tokens.

    Each loss is differentiated before the next is asked for, so one graph lives at a time. A step takes the mean gradient
    of `accumulate` batches, clipped to norm `clip` in each module (0: not clipped). A batch depends on its number alone, so a
    run killed and resumed sees the same data as one never killed.

    Raises:
        Stopped: Ctrl-C or SIGTERM asked for the end. The step that ran then is finished, and saved.
        InputError: a loss is not finite.
    """
    reuse_freed_memory()
    last_save = started = time.monotonic()
    before = clock.seconds
    progress = budget.progress(clock.tokens, clock.seconds)
    with stop_requests() as asked, bar("training", 1.0, start=progress) as shown:
        while progress < 1.0 and asked.signal is None:
            for group in (group for optimizer in made for group in optimizer.param_groups):
                group["lr"] = group["peak"] * budget.factor(progress)
            here = [0.0] * len(modules)
            for number in range(clock.step * accumulate, (clock.step + 1) * accumulate):
                losses, tokens = losses_of(number)
                for i, loss in enumerate(losses):
                    (loss / accumulate).backward()
                    here[i] += float(loss.detach()) / accumulate
                clock.tokens += tokens
            here = mean_of(here)
            for module in modules:
                average_gradients(module)
            _step(modules, made, here, clock.step + 1, clip)
            clock.step += 1
            clock.seconds = before + time.monotonic() - started
            clock.log(here)
            # Clocks differ a little between processes, and a signal may reach one of them alone.
            progress, heard = largest_of([budget.progress(clock.tokens, clock.seconds), asked.signal or 0])
            asked.signal = int(heard) or None
            mean = recent_mean(clock.losses, 20)
            pace = clock.tokens / clock.seconds
            shown.at(progress, f"training, step {clock.step}, loss {mean:.3f}, {pace:,.0f} tokens/s")
            if time.monotonic() - last_save > save_every_s:
                save(clock)
                last_save = time.monotonic()
        save(clock)
    if asked.signal is not None:
        raise Stopped(asked.signal)
    return clock
