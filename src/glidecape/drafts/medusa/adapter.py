"""Medusa heads joined to the decode loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ...core.cache import KVCache
from ..sharing import SharedDraft
from .network import MedusaModel


class MedusaDraft(SharedDraft):
    """Medusa heads, joined to the decode loop by `drafting.medusa.MedusaDrafter`. They have no cache."""

    kind, reads_hidden = MedusaModel.kind, True

    def __init__(self, module: MedusaModel, figures: dict[str, Any] | None = None) -> None:
        self.module, self.figures = module.eval(), figures or {}
        self.max_lag = module.config.heads

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """The heads run once a round, and stay eager."""
        return False

    def all_depths(self, target_cache: KVCache) -> Tensor:
        """Logits `(batch, max_lag, vocab)` of the nodes one, two, … below the root."""
        return self.module.logits(self.module(target_cache.hidden_at(target_cache.lengths[:, None] - 1)[:, 0]))
