"""EAGLE: a draft of one layer that predicts the target's last hidden states, its features.

At position j it reads the embedding of token j joined with the target's feature of position j - 1, and gives a guess of
the feature of position j, from which the target's own head makes logits. Below the root of a round it reads its own guess
at the node's parent in the place of the target's feature. Embedding and head are the target's, frozen.

Source: EAGLE and EAGLE-2 papers and their code (one layer without a norm before the attention, no final norm, a bias
after the joined input). Differs: positions are those of the tokens, where the code counts one less (rotary embeddings see
differences only), and the first token of a text has a feature of zeros before it, where the code leaves the token out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from ...target.packed import draft_products, pack
from ..layers import GatedFeedForward, SelfAttention, WholeSequence, linear, rotate, side_by_side, split_heads
from ..network import DraftNetwork
from .config import EagleConfig

if TYPE_CHECKING:
    from ...target.target import Target

KV = tuple[Tensor, Tensor]


class EagleLayer(nn.Module):
    def __init__(self, c: EagleConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.scale = c.heads, c.kv_heads, c.head_dim**-0.5
        self.q: nn.Linear | None = linear(c.hidden_size, c.heads * c.head_dim)
        self.kv = linear(c.hidden_size, 2 * c.kv_heads * c.head_dim)
        self.qkv: nn.Linear | None = None
        self.out = linear(c.heads * c.head_dim, c.hidden_size)
        self.ffn_norm = nn.RMSNorm(c.hidden_size, eps=c.eps)
        self.ffn = GatedFeedForward(c.hidden_size, c.ffn)

    def keys_values(self, x: Tensor, rotary: KV) -> KV:
        """`(batch, kv_heads, queries, head_dim)`."""
        k, v = self.kv(x).chunk(2, dim=-1)
        return rotate(split_heads(k, self.kv_heads), *rotary), split_heads(v, self.kv_heads)

    def serve(self) -> None:
        """Share one matmul among Q, K and V: with few rows, call overhead dominates it."""
        assert self.q is not None
        self.qkv, self.q = side_by_side(self.q, self.kv), None

    def _queries_keys_values(self, x: Tensor, rotary: KV) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is None:
            assert self.q is not None
            return rotate(split_heads(self.q(x), self.heads), *rotary), *self.keys_values(x, rotary)
        heads = split_heads(self.qkv(x), self.heads + 2 * self.kv_heads)
        turned = rotate(heads[:, : -self.kv_heads], *rotary)
        return turned[:, : self.heads], turned[:, self.heads :], heads[:, -self.kv_heads :]

    def forward(self, x: Tensor, rotary: KV, self_attention: SelfAttention) -> Tensor:
        """The residual stream `(batch, queries, hidden_size)` after the layer."""
        q, k, v = self._queries_keys_values(x, rotary)
        x = x + self.out(self_attention(0, q, k, v, self.scale))
        return x + self.ffn(self.ffn_norm(x))


class EagleModel(DraftNetwork):
    """The draft network."""

    kind: ClassVar[str] = "eagle"

    def __init__(self, config: EagleConfig) -> None:
        super().__init__()
        self.config, self.rotary_layer = config, config.layer
        self.join = nn.Linear(config.embed_width + config.hidden_size, config.hidden_size)
        self.layers = nn.ModuleList([EagleLayer(config)])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.join.bias)

    @classmethod
    def new(cls, config: EagleConfig, target: Target) -> EagleModel:
        """An untrained draft for a target, bound to it.

        Raises:
            UnsupportedError: the target does not rotate by cosines and sines.
        """
        return cls(config).bind(target)

    @property
    def dtype(self) -> torch.dtype:
        layer = cast("EagleLayer", self.layers[0])
        return layer.ffn_norm.weight.dtype

    def serve(self) -> EagleModel:
        """Make it ready for decoding: no gradients, and weights packed, those of the borrowed head too."""
        self.num_parameters = sum(one.numel() for one in self.parameters())  # packed weights are none
        self.eval().requires_grad_(False)
        cast("EagleLayer", self.layers[0]).serve()
        products = draft_products(self.dtype)
        pack(self, products)
        self.target_parts.serve(products)
        return self

    def embeddings(self, tokens: Tensor) -> Tensor:
        """`(batch, queries, embed_width)` of tokens `(batch, queries)`."""
        return self.target_parts.embed(tokens, self.dtype)

    def _joined(self, embeddings: Tensor, features: Tensor) -> Tensor:
        # The residual stream stays in the module's dtype, whatever autocast makes of a product.
        return self.join(torch.cat([embeddings, features.to(self.dtype)], -1)).to(self.dtype)

    def keys_values(self, tokens: Tensor, positions: Tensor, features: Tensor) -> KV:
        """All that it needs of committed tokens, `(batch, kv_heads, tokens, head_dim)`: they depend on no other token."""
        layer = cast("EagleLayer", self.layers[0])
        return layer.keys_values(self._joined(self.embeddings(tokens), features), self.rotary(positions)[0])

    def forward(self, embeddings: Tensor, rotary: KV, features: Tensor, self_attention: SelfAttention) -> Tensor:
        """Guessed features `(batch, queries, hidden_size)`.

        Args:
            embeddings: `(batch, queries, embed_width)`.
            rotary: cosines and sines of the queries' positions.
            features: `(batch, queries, hidden_size)` of the position before each query, true or guessed.
            self_attention: stores the queries' own keys and values, and attends.
        """
        return self.layers[0](self._joined(embeddings, features), rotary, self_attention)

    def hidden(
        self, tokens: Tensor, positions: Tensor, features: Tensor, self_attention: SelfAttention | None = None
    ) -> Tensor:
        """`forward` of tokens and positions `(batch, queries)`; without `self_attention` they are whole sequences."""
        attention = self_attention or WholeSequence()
        return self(self.embeddings(tokens), self.rotary(positions)[0], features, attention)

    def logits(self, hidden: Tensor) -> Tensor:
        """`(batch, queries, vocab)`."""
        return self.target_parts.logits(hidden)
