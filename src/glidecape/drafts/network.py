"""What a draft takes from its target: embedding, head and rotary embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..target.packed import PackedLinear, packable
from .rotary import KV, TargetRotary

if TYPE_CHECKING:
    from ..target.target import Target


class TargetParts:
    """No module on purpose: what is lent is no parameter of the draft, and not in its checkpoint.

    Where a reduced vocabulary is meant, `kept (draft_vocab,)` names the rows of the head that are used.
    """

    def __init__(self, target: Target, rotary_layer: int | None = None) -> None:
        """With a `rotary_layer`, `rotary` makes the cosines and sines of that layer of the target.

        Raises:
            UnsupportedError: that layer does not rotate by cosines and sines.
        """
        self.target = target
        self.rotary = None if rotary_layer is None else TargetRotary(target, rotary_layer)
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


class DraftNetwork(nn.Module):
    """A draft's own weights. `forward` takes and gives tensors, and knows neither a target nor a cache.

    `bind` joins it to a target, from which it takes embedding, head and rotary embedding: they are no parameters of it.
    """

    rotary_layer: int | None = None
    _target_parts: TargetParts | None = None

    def bind(self, target: Target) -> Self:
        """Take what it needs from this target, and go to its device.

        Raises:
            UnsupportedError: the target cannot give what the configuration asks for.
        """
        self._target_parts = TargetParts(target, self.rotary_layer)
        return self.to(target.device)

    @property
    def target_parts(self) -> TargetParts:
        """What it took.

        Raises:
            InputError: nothing yet.
        """
        if self._target_parts is None:
            raise InputError(f"this {type(self).__name__} knows no target yet: call bind(target) first")
        return self._target_parts

    def rotary(self, positions: Tensor) -> tuple[KV, KV | None]:
        """See `TargetRotary`, for positions `(batch, queries)`."""
        assert self.target_parts.rotary is not None
        return self.target_parts.rotary(positions)
