"""The losses of drafts that read the target's last hidden states, its features: EAGLE and Medusa."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..drafts.eagle.network import EagleModel
from ..drafts.medusa.network import MedusaModel
from .losses import distillation_loss
from .recipe import FEATURE
from .teacher import TeacherOutput, previous

LAW_WEIGHT = 0.1
FADE = 0.8


def noisy(features: Tensor, noise: float, seed: int, number: int) -> Tensor:
    """Features `(rows, length, width)` with uniform noise of at most noise x 512 / length, drawn for batch `number`.

    A function of its arguments alone, so a resumed run draws what the killed one would have drawn.

    Source: EAGLE's code, with noise 0.1: a longer text is shaken less.
    """
    if not noise:
        return features
    generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
    shake = 2 * torch.rand(features.shape, generator=generator) - 1
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
    positions = teacher.positions[: tokens.shape[0], : tokens.shape[1]]
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
        guessed = module.hidden(tokens, positions, noisy(previous(features), noise, seed, output.number))
        drafted = module.logits(guessed)
    counted = output.counted() & (positions > 0)  # the first token has no feature before it
    if loss != FEATURE:
        return distillation_loss(drafted, output.logits, tokens, counted, loss)
    apart = F.smooth_l1_loss(guessed.float(), features.float(), reduction="none").mean(-1)
    close = (apart * counted).sum() / counted.sum().clamp(min=1)
    return close + LAW_WEIGHT * distillation_loss(drafted, output.logits, tokens, counted, "kl")


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
        value = distillation_loss(drafted, output.logits[:, k:], tokens[:, k:], counted[:, k:], loss)
        total = total + weight / sum(weights) * value
    return total
