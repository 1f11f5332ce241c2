"""EAGLE joined to the decode loop."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core.cache import KVCache
from ..base import Queries
from ..layers import decoding_attention
from ..program import DraftCache, NetworkDraft
from .network import EagleModel


class EagleDraft(NetworkDraft):
    """An EAGLE network as a `DraftModel`.

    Accepted nodes are run again in the next round, with the target's true features.
    """

    kind, reads_hidden, trusts_own, uses_parents = EagleModel.kind, True, False, True

    def __init__(self, module: EagleModel, figures: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.module, self.figures = module.eval(), figures or {}
        self.config, self.max_lag = module.config, module.config.max_lag

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        c, dtype = self.config, self.module.dtype
        device = next(self.module.parameters()).device
        return KVCache([(c.kv_heads, c.head_dim)], batch, capacity, dtype, device, hidden=c.hidden_size)

    def catch_up(self, tokens: Tensor, positions: Tensor, own: KVCache, target_cache: KVCache) -> None:
        own.write(0, *self.module.keys_values(tokens, positions, target_cache.hidden_at(positions - 1)))

    def hidden(self, queries: Queries, own: DraftCache, target_cache: DraftCache) -> Tensor:
        """See `NetworkDraft`. The first step of a round reads true features, later ones the draft's own."""
        q = queries
        if q.parents is None:
            features = target_cache.hidden_at(q.positions - 1)
        else:
            features = own.hidden_at(own.lengths[:, None] + q.parents)
        hidden = self.module.hidden(q.tokens, q.positions, features, decoding_attention(own, q))
        own.write_hidden(hidden)
        return hidden
