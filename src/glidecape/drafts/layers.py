"""Building blocks of draft networks: layers, and the attention to their own keys and values, which is the only thing that
training and decoding do differently."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.cache import KVCache
from ..target.attention import attend


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

    def __init__(self, cache: KVCache, mask: Tensor | None, recent: int = 0) -> None:
        self.cache, self.mask, self.recent = cache, mask, recent

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        k, v = self.cache.write(layer, k, v)
        return attend(q, k[:, :, -self.recent :], v[:, :, -self.recent :], self.mask, scale)
