"""EAGLE drafts in training: every position reads the target's last hidden state, its feature, of the one before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...drafts.eagle.config import EagleConfig
from ...drafts.eagle.network import EagleModel
from ...drafts.layers import WholeSequence
from ...target.target import Target
from ..losses import distillation_loss
from ..ranks import mean_count, own_rows, ranks
from ..recipe import FEATURE, DraftRecipe
from ..teacher import Teacher, TeacherOutput, previous
from .base import DraftTraining

LAW_WEIGHT = 0.1


class EagleTraining(DraftTraining):
    module: EagleModel
    reads_hidden = True

    @staticmethod
    def new(target: Target, recipe: DraftRecipe, text: np.ndarray | None) -> nn.Module:
        deepest: dict[str, Any] = {"max_lag": recipe.max_lag} if recipe.max_lag else {}
        return EagleModel.new(EagleConfig.for_target(target, **deepest), target).float()

    def loss(self, output: TeacherOutput, recipe: DraftRecipe) -> Tensor:
        return eagle_loss(self.module, output, recipe.loss, recipe.noise, recipe.seed)

    def logits_by_lag(self, tokens: Tensor, teacher: Teacher) -> Iterator[Tensor]:
        before = previous(teacher.features(tokens))
        yield self.module.logits(self.module.hidden(tokens, teacher.positions, before))


def noisy(features: Tensor, noise: float, seed: int, number: int) -> Tensor:
    """Features `(rows, length, width)` with uniform noise of at most noise x 512 / length, drawn for batch `number`.

    A function of its arguments alone, so a resumed run draws what the killed one would have drawn.

    Source: EAGLE's code, with noise 0.1: a longer text is shaken less.
    """
    if not noise:
        return features
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    rows, *shape = features.shape
    shake = own_rows(2 * torch.rand(rows * ranks().count, *shape, generator=generator) - 1)
    return features + (noise * 512 / features.shape[1] * shake).to(features)


def eagle_loss(module: EagleModel, output: TeacherOutput, loss: str, noise: float, seed: int) -> Tensor:
    """Mean loss of a batch, teacher-forced: every position reads the target's feature of the one before.

    With loss "feature": smooth L1 on features, a mean over their width, plus 0.1 times KL(target || draft). Any other loss
    is of the laws alone (`losses.distillation_loss`), through the target's head.

    Source: EAGLE paper, section 4.2. Differs: it has the soft cross-entropy, which is the KL plus a number that no gradient
    sees.
    """
    tokens, teacher = output.tokens, output.teacher
    features = teacher.features(tokens)
    positions = output.positions[: tokens.shape[0], : tokens.shape[1]]
    before = previous(features)
    if output.begins is not None:
        before = before.masked_fill((positions == 0)[..., None], 0.0)  # that feature is another document's
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        shaken = noisy(before, noise, seed, output.number)
        guessed = module.hidden(tokens, positions, shaken, WholeSequence(output.apart))
        drafted = module.logits(guessed)
    counted = output.counted() & (positions > 0)  # the first token has no feature before it
    if loss != FEATURE:
        return distillation_loss(drafted, output.logits, tokens, counted, loss)
    apart = F.smooth_l1_loss(guessed.float(), features.float(), reduction="none").mean(-1)
    close = (apart * counted).sum() / mean_count(int(counted.sum()))
    return close + LAW_WEIGHT * distillation_loss(drafted, output.logits, tokens, counted, "kl")
