"""Train a draft for a frozen target: GliDe, GliDe without cross-attention, EAGLE, Medusa heads, or an independent
one-layer LM.

The target runs on each batch and its keys and values are used at once: nothing is stored. The draft sees them through
`visible`, as in decoding (masks.block_visible), so a teacher-forced position of lag d is the state of depth d - 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import InputError
from ..progress import note, say
from ..target.target import Target
from .data import load_streams
from .figures import evaluate_draft, figures_by_lag, trained_on, trial_prompts, write_curve
from .kinds import BY_RECIPE, training_of
from .loop import Budget, Clock, fit, optimizers, recent_mean
from .positions import check_offsets, window_positions
from .ranks import own_rows, ranks, shard
from .recipe import DraftRecipe
from .rows import Preview, preview
from .state import forget_before, load_state, save_state
from .stream import Windows
from .teacher import Teacher, TeacherOutput

ENOUGH = 1_000_000  # tokens that a draft learns a good deal from (docs/tutorials/train.md)
WORTH = 2.0  # acceptance length from which on a draft usually pays


def make_draft(target: Target, recipe: DraftRecipe, text: np.ndarray | None = None) -> nn.Module:
    """The untrained draft network of a recipe, see `DraftTraining.new`.

    Raises:
        UnsupportedError: see `DraftTraining.new`; also a target that is not on one device.
    """
    target.refuse_placed("training a draft")
    target.unpack()  # gradients pass through its head
    torch.manual_seed(recipe.seed)
    return BY_RECIPE[recipe.kind].new(target, recipe, text)


@contextmanager
def compiled(module: nn.Module) -> Iterator[None]:
    """Run the draft's layers (of an LM, all of it) through torch.compile, until the end of the block. Parameters keep their
    names."""
    parts = training_of(module).layers
    for part in parts:
        part.forward = torch.compile(part.forward)
    try:
        yield
    finally:
        for part in parts:
            del part.forward  # the class's own again: decoding has a new shape each round


class DraftLoss:
    """The loss of a batch: the target's forward, its keys and values read at the recipe's lags, the draft's forward.

    Args:
        length: of the windows, in tokens.
        teacher: shared with other drafts' losses; None: one of its own.

    Raises:
        InputError, UnsupportedError: windows are too short for the deepest lag, or cannot be moved (`check_offsets`).
    """

    def __init__(
        self, target: Target, module: nn.Module, recipe: DraftRecipe, length: int, teacher: Teacher | None = None
    ) -> None:
        self.training, self.recipe = training_of(module), recipe
        rows = ranks().share(recipe.rows)
        self.teacher = teacher or Teacher(target, rows, length, self.training.reads_hidden)
        if length < (least := self.training.shortest):
            raise InputError(
                f"windows of {length} tokens hold no lag of {least - 1}: lower --max-lag, or lengthen --length"
            )
        self._size = recipe.rows, length, target.context
        if recipe.positions != "zero":
            check_offsets(target, length)

    def __call__(
        self, batch: Tensor, number: int, learned: Tensor | None = None, begins: Tensor | None = None
    ) -> Tensor:
        """Mean loss over `batch (rows, length)`, this process's rows of the run's batch of that number; `learned` and `begins`
        as in `TeacherOutput`."""
        return self.of(self.teacher.run(batch, number, learned, begins, self.positions(number)))

    def positions(self, number: int) -> Tensor | None:
        """Positions of this process's rows of that batch, `(rows, length)`; None: from zero."""
        if self.recipe.positions == "zero":
            return None
        drawn = window_positions(self.recipe.seed, number, *self._size)
        return own_rows(drawn).to(self.teacher.positions.device)

    def of(self, output: TeacherOutput) -> Tensor:
        """Mean loss over a batch that the target has run on; lags and noise are drawn for its number."""
        return self.training.loss(output, self.recipe)


def train_draft(
    target: Target,
    data: Path,
    out: Path,
    recipe: DraftRecipe,
    budget: Budget,
    command: str = "",
    prompts: int = 16,
    save_every_s: float = 300.0,
    compile_model: bool = False,
) -> dict[str, Any]:
    """Train a draft and write it to `out`; a run killed at any moment goes on from its last save, `save_every_s` seconds
    ago at most, and ends with the weights of one never killed (with a budget of tokens, on the same machine).

    Returns:
        Figures: steps, tokens, seconds, train_loss, parameters, and those of `figures_by_lag` and `evaluate_draft`.
    Raises:
        DataError: no readable text in `data`, or a row that cannot be used.
        CheckpointError: `out` is not writable, not resumable, or holds a run
            with another recipe or other data.
        UnsupportedError: the target's cache cannot be read by a GliDe draft.
    """
    streams = load_streams(data, target.tokenizer, target.vocab_size, recipe.loss_on, keep=out)
    text, held_out = streams["train"], streams["valid"].tokens
    length = min(recipe.length, target.context)
    trial_prompts(held_out, prompts, target.context, recipe.seed)  # too little text is an error now, not after an hour
    windows = Windows(text, recipe.seed, recipe.documents == "apart")
    module = make_draft(target, recipe, text.tokens)
    made = optimizers(module, recipe.rate, recipe.muon)
    if ranks().first:
        out.mkdir(parents=True, exist_ok=True)
    identity = asdict(recipe) | {"data": text.digest, "target": target.weights_digest[:16]}
    identity |= {"dtype": str(target.dtype), "compile": compile_model}  # they change the weights in their last bits
    clock = load_state(out, module, made, identity)
    draft_loss = DraftLoss(target, module, recipe, length)
    shard(target)
    module.train()

    def losses_of(number: int) -> tuple[list[Tensor], int]:
        # Windows and lags depend on the batch's number alone: a resumed run repeats nothing and skips nothing.
        batch, *marks = windows.marked_batch(
            number, recipe.rows, length, lambda whole: own_rows(whole).to(target.device)
        )
        return [draft_loss(batch, number, *marks)], recipe.rows * length

    def save(now: Clock) -> None:
        save_state(out, module, made, now, identity)

    with compiled(module) if compile_model else nullcontext():
        clock = fit(
            [module], made, budget, losses_of, clock, save, save_every_s, recipe.clip, accumulate=recipe.accumulate
        )
    parameters = sum(p.numel() for p in module.parameters())
    figures = clock.counts | {"train_loss": recent_mean(clock.losses), "parameters": parameters}
    figures = finish_draft(out, module, target, held_out, figures, clock.losses, length, prompts, recipe.seed, command)
    if ranks().first:
        forget_before(out)
    return figures


def finish_draft(
    out: Path,
    module: nn.Module,
    target: Target,
    held_out: np.ndarray,
    figures: dict[str, Any],
    losses: list[float],
    length: int,
    prompts: int = 16,
    seed: int = 0,
    command: str = "",
) -> dict[str, Any]:
    """Evaluate a trained draft on held-out tokens, and write its curve and checkpoint to `out`.

    Args:
        figures: of the training; those of `figures_by_lag` and `evaluate_draft` are added, unless `prompts` is 0.
        losses: of each step.
        length: of a window, in tokens.
    """
    figures["trained_on"] = trained_on(target, length)
    if prompts:
        figures |= figures_by_lag(target, module, held_out, length)
        chosen, new_tokens = trial_prompts(held_out, prompts, target.context, seed)
        figures |= evaluate_draft(target, module, chosen, new_tokens)
    if not ranks().first:
        return figures
    out.mkdir(parents=True, exist_ok=True)
    write_curve(out, losses, figures["tokens"], figures)
    training_of(module).save(out, target, command, figures)
    say(f"wrote {out}: {summary(figures)}")
    if learned_little(figures):
        note(
            f"a draft that speeds decoding up usually takes {ENOUGH:,} tokens or more: give the same command with larger "
            "--tokens or --minutes, which goes on from here"
        )
    return figures


def learned_little(figures: dict[str, Any]) -> bool:
    """Was it trained on few tokens, and is too little accepted to pay?

    >>> learned_little({"tokens": 20_000, "acceptance_length_greedy": 1.2})
    True
    >>> learned_little({"tokens": 20_000, "acceptance_length_greedy": 3.1})
    False
    """
    return figures["tokens"] < ENOUGH and figures.get("acceptance_length_greedy", math.inf) < WORTH


def summary(figures: dict[str, Any]) -> str:
    """What a person wants to know of a trained draft.

    >>> summary({"tokens": 4000, "alpha_greedy": 0.8, "acceptance_length_greedy": 3.5})
    '4,000 tokens learned; greedily alpha 0.80, acceptance length 3.50; all figures are in card.json'
    """
    parts = [f"{figures['tokens']:,} tokens learned"]
    for mode, name in (("greedy", "greedily"), ("t1", "at T=1")):
        if f"alpha_{mode}" in figures:
            alpha, length = figures[f"alpha_{mode}"], figures[f"acceptance_length_{mode}"]
            parts.append(f"{name} alpha {alpha:.2f}, acceptance length {length:.2f}")
    return "; ".join([*parts, "all figures are in card.json"])


def preview_data(target: Target, data: Path, recipe: DraftRecipe) -> Preview:
    """The first window that training would see, decoded, with its loss mask (`rows.preview`).

    Raises:
        DataError: as `train_draft`.
    """
    text = load_streams(data, target.tokenizer, target.vocab_size, recipe.loss_on)["train"]
    windows, length = Windows(text, recipe.seed), min(recipe.length, target.context)
    learned = windows.batch_learned(0, 1, length)
    return preview(
        target.tokenizer, windows.batch(0, 1, length)[0].tolist(), None if learned is None else learned[0].tolist()
    )
