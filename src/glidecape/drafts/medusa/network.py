"""Medusa-1: heads that each predict one token further ahead, all from one of the target's last hidden states.

Head k, a residual block and a vocabulary head, guesses the token k places after the root from the hidden state of the
token before the root. No head sees the root or another head's token, so all depths are made in one call.

Source: Medusa paper, section 2.1 (Medusa-1: the target stays frozen). Differs: all heads share the target's own vocabulary
head, frozen, where theirs have one each, which are most of their weights; a block begins as the identity, as theirs do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...target.packed import draft_products, pack
from ..network import DraftNetwork
from .config import MedusaConfig

if TYPE_CHECKING:
    from ...target.target import Target


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.linear(x))


class MedusaModel(DraftNetwork):
    """The heads."""

    kind: ClassVar[str] = "medusa"

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([ResidualBlock(config.hidden_size) for _ in range(config.heads)])
        self._served_dtype: torch.dtype | None = None

    @classmethod
    def new(cls, config: MedusaConfig, target: Target) -> MedusaModel:
        """Untrained heads for a target, bound to it."""
        return cls(config).bind(target)

    @property
    def dtype(self) -> torch.dtype:
        return self._served_dtype or next(self.parameters()).dtype

    def serve(self) -> MedusaModel:
        """Make it ready for decoding: no gradients, and weights packed, those of the borrowed head too."""
        self.num_parameters = sum(one.numel() for one in self.parameters())  # packed weights are none
        self.eval().requires_grad_(False)
        self._served_dtype = self.dtype  # packed weights are no parameters
        products = draft_products(self.dtype)
        pack(self, products)
        self.target_parts.serve(products)
        return self

    def head_logits(self, number: int, hidden: Tensor) -> Tensor:
        """Logits `(batch, queries, vocab)` of one head, from hidden states `(batch, queries, hidden_size)`."""
        return self.target_parts.logits(self.layers[number](hidden.to(self.dtype)))

    def forward(self, hidden: Tensor) -> Tensor:
        """What every head makes of hidden states `(batch, hidden_size)`, for `logits`: `(batch, heads, hidden_size)`."""
        hidden = hidden.to(self.dtype)
        return torch.stack([layer(hidden) for layer in self.layers], 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """`(batch, heads, vocab)`."""
        return self.target_parts.logits(hidden)
