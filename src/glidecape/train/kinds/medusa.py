"""Medusa heads in training: head k at each position learns the target's law k places later."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...drafts.medusa.config import MedusaConfig
from ...drafts.medusa.network import MedusaModel
from ...target.target import Target
from ..losses import distillation_loss
from ..recipe import DraftRecipe
from ..teacher import Teacher, TeacherOutput
from .base import DraftTraining

FADE = 0.8


class MedusaTraining(DraftTraining):
    module: MedusaModel
    reads_hidden = True

    def __init__(self, module: MedusaModel) -> None:
        super().__init__(module)
        self.lags = self.laws = module.config.heads
        self.deepest = max(8, self.lags)

    @staticmethod
    def new(target: Target, recipe: DraftRecipe, text: np.ndarray | None) -> nn.Module:
        heads: dict[str, Any] = {"heads": recipe.max_lag} if recipe.max_lag else {}
        return MedusaModel.new(MedusaConfig.for_target(target, **heads), target).float()

    def loss(self, output: TeacherOutput, recipe: DraftRecipe) -> Tensor:
        return medusa_loss(self.module, output, recipe.loss)

    def logits_by_lag(self, tokens: Tensor, teacher: Teacher) -> Iterator[Tensor]:
        for lag in range(1, self.lags + 1):
            found = self.module.head_logits(lag - 1, teacher.features(tokens)[:, :-lag])
            yield nn.functional.pad(found, (0, 0, lag, 0))


def medusa_loss(module: MedusaModel, output: TeacherOutput, loss: str) -> Tensor:
    """Mean loss of a batch: head k at each position against the target's law k places later, weighted by 0.8^k.

    Source: Medusa paper, section 2.2.1, with loss "ce". Differs: weights sum to 1, so that the loss is a mean over heads in
    nats; and our default loss is the KL to the target's law, which says more than the text's one token.
    """
    tokens, counted = output.tokens, output.counted()
    features = output.teacher.features(tokens)
    heads = module.config.heads
    weights = [FADE**k for k in range(1, heads + 1)]
    total = features.new_zeros((), dtype=torch.float32)
    for k, weight in enumerate(weights, 1):
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            drafted = module.head_logits(k - 1, features[:, :-k])
        there = counted[:, k:]
        if output.begins is not None:
            there = there & (output.begins[:, k:] == output.begins[:, :-k])  # the document that it saw
        value = distillation_loss(drafted, output.logits[:, k:], tokens[:, k:], there, loss)
        total = total + weight / sum(weights) * value
    return total
