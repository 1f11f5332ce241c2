"""Building blocks of draft models, small and plain."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        cos, sin: `(batch, queries, rotary_dim)`; the first half of `sin` is negated (see `rotary.TargetRotary`).
    """
    size = cos.shape[-1]
    turned = x if size == x.shape[-1] else x[..., :size]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    turned = torch.addcmul(turned * cos, turned.roll(size // 2, -1), sin)
    return turned if size == x.shape[-1] else torch.cat([turned, x[..., size:]], dim=-1)
