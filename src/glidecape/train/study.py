"""A study: several draft recipes trained side by side on the same batches, and compared prompt by prompt.

The target's forward, the larger part of a training's cost, is paid once for all of them. A row of a study ends with the
weights that `train_draft` would have given its recipe alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.params import SamplingParams
from ..core.stats import Stats, merged
from ..drafting.methods import make_drafter
from ..drafts.card import STATE
from ..errors import CheckpointError
from ..files import remove_leftovers, write_atomic
from ..progress import bar
from ..target.target import Target
from .data import load_streams
from .draft import DraftLoss, make_draft
from .figures import (
    evaluation_prompts,
    figures_by_lag,
    stats_by_prompt,
    steady_prompts,
    trained_on,
    write_curve,
)
from .kinds import training_of
from .loop import WRITTEN, Budget, Clock, differences, fit, optimizers, recent_mean
from .recipe import DraftRecipe
from .state import forget, identity_in, load_state, save_state
from .stream import Stream, Windows
from .study_table import summary, table_of
from .teacher import Teacher

RESULT = "row.json"
MEASURED = {"chain": ("+chain", 5), "cape": ("+cape", 5)}  # what is added to the base method, tokens drafted a round
TEMPERATURES = {"greedy": 0.0, "t1": 1.0}


@dataclass(frozen=True)
class Trial:
    """How the rows of a study are evaluated: on `prompts` held-out prompts of `prompt_tokens` whose greedy continuations
    of `new_tokens` don't loop, with a chain of 5 and with CaPE, greedy and at temperature 1."""

    prompts: int = 32
    prompt_tokens: int = 128
    new_tokens: int = 64


class DraftGroup:
    """Drafts that learn side by side from one target, as one module with one state.

    Args:
        recipes: by name; equal in all of `study_rows.SHARED`.
        length: of the windows, in tokens.
        text: token ids of the training text, for reduced vocabularies.
    """

    def __init__(self, target: Target, recipes: Mapping[str, DraftRecipe], length: int, text: np.ndarray) -> None:
        first = next(iter(recipes.values()))
        self.target, self.names, self.length = target, list(recipes), length
        self.modules = [make_draft(target, recipe, text) for recipe in recipes.values()]
        reads_hidden = any(training_of(module).reads_hidden for module in self.modules)
        self.teacher = Teacher(target, first.rows, length, reads_hidden)
        self.state = nn.ModuleDict({f"row{i}": module for i, module in enumerate(self.modules)})
        self.made = [
            one
            for module, recipe in zip(self.modules, recipes.values(), strict=True)
            for one in optimizers(module, recipe.rate, recipe.muon)
        ]
        self.draft_losses = [
            DraftLoss(target, module, recipe, length, self.teacher)
            for module, recipe in zip(self.modules, recipes.values(), strict=True)
        ]
        self.target_s, self.draft_s, self.tokens_seen = 0.0, [0.0] * len(self.modules), 0

    def losses(
        self, batch: Tensor, number: int, learned: Tensor | None, begins: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Each draft's loss over `batch (rows, length)`, made when it is asked for."""
        started = self._now()
        output = self.teacher.run(batch, number, learned, begins, self.draft_losses[0].positions(number))
        self.tokens_seen += batch.numel()
        self.target_s += (learning := self._now()) - started
        for i, draft_loss in enumerate(self.draft_losses):
            yield draft_loss.of(output)
            self.draft_s[i] += (now := self._now()) - learning  # the caller has been through the backward pass
            learning = now

    def _now(self) -> float:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)
        return time.monotonic()

    def tokens_per_s(self, i: int) -> float | None:
        """Tokens a second of teaching and learning, were draft `i` alone; optimizers excluded. None: nothing was output."""
        return round(self.tokens_seen / (self.target_s + self.draft_s[i]), 1) if self.tokens_seen else None


def run_study(
    target: Target,
    data: Path,
    out: Path,
    rows: Mapping[str, DraftRecipe],
    budget: Budget,
    seeds: Sequence[int] = (0,),
    trial: Trial = Trial(),
    command: str = "",
    save_every_s: float = 300.0,
) -> dict[str, Any]:
    """Train every row with every seed, evaluate them, and write `out/study.json` and `out/study.md`.

    A row's draft lies in `out/seed-S/NAME`, ready for decoding. An interrupted study resumes when it is called again;
    finished rows are kept, so rows and seeds can be added later.

    Returns:
        What study.json holds: command, settings, the rows with their recipes and figures (`summary`).
    Raises:
        DataError: see `train_draft`.
        CheckpointError: `out` holds a row of that name from another recipe, other data or another budget.
    """
    base = next(iter(rows.values()))
    streams = load_streams(data, target.tokenizer, target.vocab_size, base.loss_on, keep=out)
    room = min(trial.prompt_tokens, target.context - trial.new_tokens)
    evaluation_prompts(streams["valid"].tokens, 1, room, 0)  # too little text is an error now, not after an hour
    shared: dict[str, Any] = {"data": streams["train"].digest, "target": target.weights_digest[:16]}
    shared |= {"dtype": str(target.dtype), "tokens": budget.tokens, "minutes": budget.minutes, "trial": asdict(trial)}
    prompts: tuple[list[list[int]], int] | None = None
    results: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in rows}
    for seed in seeds:
        folder = out / f"seed-{seed}"
        recipes = {name: replace(recipe, seed=seed) for name, recipe in rows.items()}
        identities = {name: shared | {"recipe": asdict(recipe)} for name, recipe in recipes.items()}
        while pending := [name for name in recipes if _finished(folder, name, identities[name]) is None]:
            group = {name: identities[name] for name in _begun(folder, recipes) or pending}
            trained, clock = _trained(target, streams["train"], folder, recipes, group, budget, save_every_s)
            prompts = prompts or held_out_prompts(target, streams["valid"], trial)
            for i, name in enumerate(group):
                if _finished(folder, name, group[name]) is None:
                    figures = _figures(target, trained, i, clock, streams["valid"], prompts, trial)
                    write_row(folder / name, trained.modules[i], target, command, figures, group[name])
            forget(folder)  # rows that come later begin a group of their own
        for name in recipes:
            results[name][str(seed)] = _finished(folder, name, identities[name]) or {}
    result: dict[str, Any] = {
        "command": command,
        "settings": shared | {"threads": torch.get_num_threads(), "torch": torch.__version__},
        "rows": {name: {"recipe": asdict(rows[name]), "seeds": by_seed} for name, by_seed in results.items()},
        "table": summary(results),
    }
    texts = {"study.json": json.dumps(result, indent=1), "study.md": table_of(result["table"]).markdown()}
    for name, text in texts.items():
        write_atomic(out / name, lambda path, text=text: path.write_text(text + "\n"))  # type: ignore[misc]
    return result


def held_out_prompts(target: Target, text: Stream, trial: Trial) -> tuple[list[list[int]], int]:
    """The prompts of a trial, and how many were drawn to find them; the same for every row and seed."""
    room = min(trial.prompt_tokens, target.context - trial.new_tokens)
    return steady_prompts(target, text.tokens, trial.prompts, room, trial.new_tokens)


def _finished(folder: Path, name: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The figures of a row that is done; None: it is not."""
    path = folder / name / RESULT
    if not path.is_file():
        return None
    try:
        saved = json.loads(path.read_text())
        there, figures = saved["identity"], saved["figures"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is not a study's row: delete it to train the row again") from None
    if other := differences(there, identity):
        raise CheckpointError(
            f"{folder / name} holds a row of that name made with {'; '.join(other)}: give the row or --output another name"
        )
    return figures


def _begun(folder: Path, asked: Mapping[str, Any]) -> list[str] | None:
    """Names of the rows whose training was interrupted in `folder`; None: there is no such training."""
    names = identity_in(folder)
    if names is None:
        return None
    if missing := [name for name in names if name not in asked]:
        raise CheckpointError(
            f"the training in {folder} was interrupted with row {missing[0]} in it: ask for the same rows, or delete "
            f"{folder / STATE}"
        )
    return list(names)


def _trained(
    target: Target,
    text: Stream,
    folder: Path,
    recipes: Mapping[str, DraftRecipe],
    group: dict[str, Any],
    budget: Budget,
    save_every_s: float,
) -> tuple[DraftGroup, Clock]:
    """Train the rows of `group` together, from where they were left."""
    chosen = {name: recipes[name] for name in group}
    first = next(iter(chosen.values()))
    length = min(first.length, target.context)
    output = DraftGroup(target, chosen, length, text.tokens)
    folder.mkdir(parents=True, exist_ok=True)
    clock = load_state(folder, output.state, output.made, group)
    windows = Windows(text, first.seed, first.documents == "apart")
    output.state.train()

    def losses_of(number: int) -> tuple[Iterator[Tensor], int]:
        batch, *marks = windows.marked_batch(number, first.rows, length, lambda one: one.to(target.device))
        return output.losses(batch, number, *marks), batch.numel()

    def save(now: Clock) -> None:
        save_state(folder, output.state, output.made, now, group)

    clock = fit(
        output.modules,
        output.made,
        budget,
        losses_of,
        clock,
        save,
        save_every_s,
        first.clip,
        accumulate=first.accumulate,
    )
    return output, clock


def _figures(
    target: Target,
    trained: DraftGroup,
    i: int,
    clock: Clock,
    text: Stream,
    prompts: tuple[list[list[int]], int],
    trial: Trial,
) -> dict[str, Any]:
    """What is told of draft `i`: its training, its agreement by lag, and its trial."""
    module = trained.modules[i]
    losses = clock.each[i] if clock.each else clock.losses
    figures: dict[str, Any] = {
        "steps": clock.step,
        "tokens": clock.tokens,
        "tokens_per_s": trained.tokens_per_s(i),
        "parameters": sum(p.numel() for p in module.parameters()),
        "train_loss": recent_mean(losses),
        "loss": [round(value, 5) for value in losses],
        "prompts": len(prompts[0]),
        "prompts_drawn": prompts[1],
        "trained_on": trained_on(target, trained.length),
    }
    module.eval()
    figures |= figures_by_lag(target, module, text.tokens, trained.length)
    base, draft = training_of(module).joined()
    with bar(f"trying {trained.names[i]}", len(MEASURED) * len(TEMPERATURES)) as shown:
        for name, (addition, depth) in MEASURED.items():
            for heat, temperature in TEMPERATURES.items():
                drafter = make_drafter(base + addition, draft, length=depth)
                params = SamplingParams(temperature, max_new_tokens=trial.new_tokens, ignore_eos=True, seed=1)
                figures[f"{name}_{heat}"] = trial_figures(stats_by_prompt(target, drafter, prompts[0], params))
                shown.advance()
    return figures


def trial_figures(each: Sequence[Stats]) -> dict[str, Any]:
    """alpha and acceptance length of all prompts together, and of each."""
    total = merged(each)
    return {
        "alpha": round(total.alpha, 4),
        "acceptance_length": round(total.acceptance_length, 4),
        "alpha_by_prompt": [round(one.alpha, 4) for one in each],
        "acceptance_length_by_prompt": [round(one.acceptance_length, 4) for one in each],
    }


def write_row(
    folder: Path, module: nn.Module, target: Target, command: str, figures: dict[str, Any], identity: dict[str, Any]
) -> None:
    """A row's draft, its curve, and last its figures: a row that has these is done."""
    losses = figures.pop("loss")
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, (*WRITTEN, RESULT))
    write_curve(folder, losses, figures["tokens"], figures)
    training_of(module).save(folder, target, command, figures)
    done = json.dumps({"identity": identity, "figures": figures}, indent=1) + "\n"
    write_atomic(folder / RESULT, lambda path: path.write_text(done))
