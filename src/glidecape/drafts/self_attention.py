"""Where a draft's own keys and values are kept: the only thing that training and decoding do differently."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..core.cache import KVCache
from ..target.attention import attend


class SelfAttention(Protocol):
    """What a draft network calls in each of its layers. Another engine passes one that reads its own cache."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Store keys and values `(batch, kv_heads, queries, head_dim)` of a layer and attend; the outcome is
        `(batch, queries, heads x head_dim)`."""


class WholeSequence:
    """Training: the queries are whole sequences from position 0, and nothing is stored.

    Args:
        mask: `(batch, 1, queries, queries)`; None: causal.
    """

    def __init__(self, mask: Tensor | None = None) -> None:
        self.mask = mask

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return attend(q, k, v, self.mask, scale, causal=self.mask is None)


class Cached:
    """Decoding: keys and values are written to the scratch of the draft's cache.

    Args:
        mask: `(batch, 1, queries, slots)`; None: every slot.
        recent: where one query sees every slot, the newest slots that its window holds; 0: all.
    """

    def __init__(self, cache: KVCache, mask: Tensor | None, recent: int = 0) -> None:
        self.cache, self.mask, self.recent = cache, mask, recent

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = self.cache.write(layer, k, v)
        return attend(q, k[:, :, -self.recent :], v[:, :, -self.recent :], self.mask, scale)
