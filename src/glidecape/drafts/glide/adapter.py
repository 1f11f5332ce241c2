"""GliDe joined to the decode loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...core.cache import KVCache
from ...core.masks import lag_one_visible
from ..base import Queries
from ..layers import decoding_attention
from ..program import DraftCache, NetworkDraft
from .network import GlideModel


class GlideDraft(NetworkDraft):
    """A GliDe network as a `DraftModel`.

    An accepted node keeps the keys and values of the lag it was drafted at, as in training; the prompt and tokens that are
    caught up with have lag 1.

    >>> from glidecape import GlideDraft, Target, load_draft
    >>> draft = load_draft("path/to/draft", Target.from_pretrained("path/to/model"))
    >>> isinstance(draft, GlideDraft), draft.max_lag
    (True, 8)
    """

    kind, trusts_own = GlideModel.kind, True

    def __init__(self, module: GlideModel, figures: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.module, self.figures = module.eval(), figures or {}
        self.config = c = module.config
        self.layers_read, self.max_lag = c.layers_read, c.max_lag
        self.uses_parents = self.reads_hidden = c.glimpse

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        c, weight = self.config, self.module.norm.weight
        shapes = [(c.heads, c.head_dim)] * c.layers
        return KVCache(shapes, batch, capacity, weight.dtype, weight.device, hidden=c.width if c.glimpse else 0)

    def catch_up(self, tokens: Tensor, positions: Tensor, own: KVCache, target_cache: KVCache) -> None:
        if self.config.layers == 1:
            own.write(0, *self.module.first_keys_values(tokens, positions))
        else:
            self.hidden(Queries(tokens, positions, positions), own, target_cache)

    def hidden(self, queries: Queries, own: DraftCache, target_cache: DraftCache) -> Tensor:
        """See `NetworkDraft`. Every node of a round reads the keys that were committed at its start."""
        tokens, positions = queries.tokens, queries.positions
        hidden = self.module.hidden(
            tokens,
            positions,
            {layer: target_cache.committed(layer) for layer in self.config.layers_read},
            self._visible(positions, target_cache),
            decoding_attention(own, queries, self.config.window),
            self._glimpse(positions, own, target_cache, queries.parents) if self.config.glimpse else None,
        )
        if own.hidden is not None:
            own.write_hidden(hidden)
        return hidden

    def _visible(self, positions: Tensor, target_cache: KVCache) -> Tensor | None:
        lengths = target_cache.lengths[:, None]
        if self.config.layers > 1:
            # Tokens caught up with, even a single one, have lag 1: the second layer's keys and values depend on it.
            return torch.minimum(lag_one_visible(positions), lengths)
        return lengths if target_cache.ragged else None

    def _glimpse(self, positions: Tensor, own: KVCache, target_cache: KVCache, parents: Tensor | None) -> Tensor:
        if parents is None:
            return self.module.glimpse_projection(target_cache.hidden_at(positions - 1).to(self.module.dtype))
        return self.module.own_glimpse_projection(own.hidden_at(own.lengths[:, None] + parents))
