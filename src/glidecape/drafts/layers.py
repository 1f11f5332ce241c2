"""Building blocks of draft networks: layers, and the attention to their own keys and values, which is the only thing that
training and decoding do differently."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.cache import SlotCache
from ..core.masks import slot_positions, tree_mask, window_mask
from ..target.attention import attend
from ..target.operators import no_mask, path_attention
from .base import Queries


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Without bias."""
    return nn.Linear(inputs, outputs, bias=False)


def side_by_side(*parts: nn.Linear) -> nn.Linear:
    """One product in the place of several of one input, their outputs joined; without gradients."""
    weight = torch.cat([part.weight.detach() for part in parts])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    return joined


class GatedFeedForward(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = linear(width, 2 * hidden)
        self.down = linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`(batch, queries, heads x head_dim)` to `(batch, heads, queries, head_dim)`, a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout; only the first `cos.shape[-1]` dimensions turn (partial rotary).

    Args:
        x: `(batch, heads, queries, head_dim)`.
        cos, sin: `(batch, queries, rotary_dim)`; the first half of `sin` is negated (see `network.TargetRotary`).
    """
    size = cos.shape[-1]
    turned = x if size == x.shape[-1] else x[..., :size]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turned = torch.addcmul(turned * cos, turned.roll(size // 2, -1), sin)
    return turned if size == x.shape[-1] else torch.cat([turned, x[..., size:]], dim=-1)


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

    def __init__(self, cache: SlotCache, mask: Tensor | None, recent: int = 0) -> None:
        self.cache, self.mask, self.recent = cache, mask, recent

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = self.cache.write(layer, k, v)
        return attend(q, k[:, :, -self.recent :], v[:, :, -self.recent :], self.mask, scale)


class ByPosition:
    """The same in a compiled program: a query reads its own path by position.

    Args:
        queries: what is run, with their `ancestors`.
        seen: `(batch, 1, queries, positions)` which positions a query may read; None: its whole path.
    """

    def __init__(self, cache: SlotCache, queries: Queries, seen: Tensor | None) -> None:
        self.cache, self.queries, self.seen = cache, queries, no_mask() if seen is None else seen

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = self.cache.write(layer, k, v)
        ancestors = self.queries.ancestors
        assert ancestors is not None
        where = self.cache.lengths, self.queries.scratch_positions, ancestors
        return path_attention(q, k, v, *where, self.seen, scale, 0.0).flatten(2)


def decoding_attention(own: SlotCache, queries: Queries, window: int = 0) -> SelfAttention:
    """The self-attention of a step that decodes. `window`: positions that a query looks back, itself included; 0: all."""
    positions, scratch = queries.positions, queries.scratch_positions
    count, keys = positions.shape[1], own.longest + scratch.shape[1]
    if torch.compiler.is_exporting():
        if queries.ancestors is None:
            chain = torch.ones(count, scratch.shape[1], dtype=torch.bool, device=scratch.device)
            chain = chain.tril(scratch.shape[1] - count).repeat(positions.shape[0], 1, 1)
            queries = replace(queries, ancestors=chain)
        at = torch.arange(keys, device=positions.device)[None]
        return ByPosition(own, queries, window_mask(positions, at, window) if window else None)
    mask = tree_mask(own, queries.ancestors, count)
    if not window or keys <= window:
        return Cached(own, mask)
    if mask is None and count == 1:
        return Cached(own, None, window)
    seen = window_mask(positions, slot_positions(own.lengths, scratch, keys), window)
    return Cached(own, seen if mask is None else seen & mask)
