"""Teacher-forced forwards of target and draft on whole windows, as training and evaluation take them."""

from __future__ import annotations

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


def draft_logits(module: nn.Module, tokens: Tensor, positions: Tensor, cache: KVCache, visible: Tensor) -> Tensor:
    """Teacher-forced draft logits `(batch, length, vocab)` of either kind of draft."""
    if isinstance(module, GlideModel):
        return module(tokens, positions, cache.committed(module.config.target_layer), visible)
    return module(input_ids=tokens).logits
