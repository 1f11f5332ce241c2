"""Teacher-forced forwards of target and draft on whole windows, as training and evaluation take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..cache import KVCache
from ..models.glide import GlideModel
from ..models.target import Target


class Teacher:
    """The frozen target on whole windows: logits and, through one reused cache, the keys and values of its layers."""

    def __init__(self, target: Target, rows: int, length: int) -> None:
        self.target = target.model.requires_grad_(False) and target
        self.cache: KVCache = target.new_cache(rows, length)
        self.positions = torch.arange(length, device=target.device).expand(rows, -1)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        self.cache.truncate([0] * tokens.shape[0])
        logits = self.target.forward(tokens, self.positions, self.cache).logits
        self.cache.commit([tokens.shape[1]] * tokens.shape[0])
        return logits

    def teach(self, tokens: Tensor, number: int, learned: Tensor | None = None) -> Taught:
        """A batch with what the target says of it, in bfloat16 products; any number of drafts may learn from it until the
        next one is taught."""
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            return Taught(tokens, number, learned, self(tokens), self)


@dataclass(frozen=True)
class Taught:
    """A batch of a training and the target's forward over it.

    Attributes:
        tokens: `(rows, length)`.
        number: of the batch in its run; what is drawn for it follows from it.
        learned: `(rows, length)` bool, the tokens to be learned, each by the position before it; None: all.
        logits: the target's, `(rows, length, vocab)`.
        teacher: holds the keys and values of the target's layers.
    """

    tokens: Tensor
    number: int
    learned: Tensor | None
    logits: Tensor
    teacher: Teacher


def draft_logits(module: nn.Module, tokens: Tensor, positions: Tensor, cache: KVCache, visible: Tensor) -> Tensor:
    """Teacher-forced draft logits `(batch, length, vocab)` of either kind of draft."""
    if isinstance(module, GlideModel):
        return module(tokens, positions, cache.committed(module.config.target_layer), visible)
    return module(input_ids=tokens).logits
