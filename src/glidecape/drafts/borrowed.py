"""The target's embedding and head, lent to a draft."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..target.packed import PackedLinear, packable

if TYPE_CHECKING:
    from ..target.target import Target


class Borrowed:
    """No module on purpose: what is lent is no parameter of the draft, and not in its checkpoint.

    Where a reduced vocabulary is meant, `kept (draft_vocab,)` names the rows of the head that are used.
    """

    def __init__(self, target: Target) -> None:
        self.embedding: Any = target.model.get_input_embeddings()
        self.head: Any = target.model.get_output_embeddings()
        self._served: nn.Module | None = None

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeddings `(batch, queries, embed_width)` of tokens `(batch, queries)`."""
        return self.embedding(tokens).to(dtype)

    def logits(self, hidden: Tensor, kept: Tensor | None = None) -> Tensor:
        """`(batch, queries, vocab or draft_vocab)` from hidden states of the target's width."""
        if self._served is not None:
            return self._served(hidden)
        if kept is None:
            return self.head(hidden.to(self.embedding.weight.dtype))
        bias = None if self.head.bias is None else self.head.bias[kept]
        return nn.functional.linear(hidden.to(self.head.weight.dtype), self.head.weight[kept], bias)

    def serve(self, products: torch.dtype, kept: Tensor | None = None) -> None:
        """Pack a copy of the head for decoding, if it is to be multiplied in another dtype than the target's, or in part."""
        if not (isinstance(self.head, PackedLinear) or packable(self.head)):
            return
        # Unpacks a copy where the head is packed and not tied: once is enough.
        weight, bias = self.head.weight, self.head.bias
        if kept is not None:
            weight, bias = weight[kept], None if bias is None else bias[kept]
        if weight.dtype != products or kept is not None:
            self._served = PackedLinear(weight, bias, products)
