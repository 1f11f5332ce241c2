"""A draft that is trained beside its target, on the same batches, while the target itself still learns.

Source: a question that the GliDe paper leaves open: can this replace training a draft afterwards?
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..target.target import Target
from .draft import DraftLoss, finish_draft, make_draft
from .loop import optimizers, recent_mean
from .recipe import DraftRecipe


def frozen_view(model: nn.Module) -> nn.Module:
    """A model whose parameters share their storage with `model`'s and take no gradients: it follows each of its steps, and
    nothing that is computed with it reaches back."""
    views = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, memo=dict(views))


class JointDraft:
    """A draft and its draft_losses from a target in training.

    The target's forward is taken again without gradients, through our cache, so that the draft sees what it will see in
    decoding.

    Args:
        model: the causal LM in training.
        recipe: of the draft; windows are the target's own.
        text: token ids of the training text, for a reduced vocabulary.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, recipe: DraftRecipe, text: np.ndarray) -> None:
        self.target, self.recipe = Target(frozen_view(model), tokenizer, probe=False), recipe
        self.module, self._text = make_draft(self.target, recipe, text).train(), text
        self.made = optimizers(self.module, recipe.rate, recipe.muon)
        self._draft_losses: dict[torch.Size, DraftLoss] = {}

    def loss(self, batch: Tensor, number: int) -> Tensor:
        """The draft's mean loss over `batch (rows, length)`, the run's batch of that number."""
        rows, length = batch.shape
        if batch.shape not in self._draft_losses:
            recipe = replace(self.recipe, rows=rows, length=length)
            self._draft_losses = {
                batch.shape: DraftLoss(self.target, self.module, recipe, length)
            }  # one cache at a time
        return self._draft_losses[batch.shape](batch, number)

    def finish(
        self, out: Path, target_folder: Path, held_out: Any, counts: dict[str, Any], losses: list[float], **rest: Any
    ) -> dict[str, Any]:
        """Join the draft to the target as it was saved, and evaluate and write it; `rest` as for `finish_draft`."""
        device = str(self.target.device)
        saved = Target.from_pretrained(target_folder, torch.float32, device, probe=False, pack=False)
        module = make_draft(saved, self.recipe, self._text)
        module.load_state_dict(self.module.state_dict())
        parameters = sum(p.numel() for p in module.parameters())
        figures = counts | {"train_loss": recent_mean(losses), "parameters": parameters, "trained_with_target": True}
        return finish_draft(out, module, saved, held_out, figures, losses, **rest)
