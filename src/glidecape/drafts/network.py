"""What a draft takes from its target: embedding, head and rotary embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor, nn

from ..errors import InputError, UnsupportedError
from ..target.packed import PackedLinear, packable
from ..target.placement import runs_on

if TYPE_CHECKING:
    from ..target.target import Target

KV = tuple[Tensor, Tensor]
MAX_TABLE = 65_536


def rotates_by_length(target: Target) -> bool:
    """Does its rotary embedding depend on how long the longest sequence of a batch is?"""
    scaling = str(getattr(target.text_config, "rope_parameters", None))
    return "dynamic" in scaling or "longrope" in scaling


class TargetRotary(nn.Module):
    """cos and sin as the target layer makes them, scaled rotary included.

    They are looked up in a table made once, except where they depend on the sequence's length (dynamic scaling) or the
    context is very long. A target that does not rotate gives its draft the common base of 10,000 for its own heads and
    None for the cross-attention.

    Raises:
        UnsupportedError: the target does not rotate by cosines and sines.
    """

    cos: Tensor | None
    sin: Tensor | None

    def __init__(self, target: Target, layer: int) -> None:
        super().__init__()
        # Not those of a composite model's other parts: pictures rotate, too.
        parts = target.model.get_decoder().named_modules()
        self.rotary = next((m for n, m in parts if n.split(".")[-1] == "rotary_emb"), None)
        kinds = getattr(target.text_config, "layer_types", None)
        self.by_kind = {"layer_type": kinds[layer]} if kinds and self._needs_kind(target) else {}
        self.head_dim = target.shapes[layer][1]
        # Room past the context: nodes beyond it are drafted at a limit, and clipped.
        self.size = target.context + 256
        self.fixed = self.size <= MAX_TABLE and not rotates_by_length(target)
        # Buffers, so that compiled programs read them where they lie.
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self._make(torch.zeros(1, 1, dtype=torch.long, device=target.device))  # refuse now, not while decoding

    def _needs_kind(self, target: Target) -> bool:
        if self.rotary is None:
            return False
        one = torch.zeros(1, 1, dtype=torch.long, device=target.device)
        try:
            self.rotary(torch.zeros(1, 1, 1, device=target.device), one)
        except (TypeError, AttributeError):
            return True
        return False

    def _make(self, positions: Tensor) -> KV:
        if self.rotary is not None:
            like = torch.zeros(1, device=positions.device)
            made = self.rotary(like, positions, **self.by_kind)
            if not isinstance(made, tuple) or len(made) != 2:
                raise UnsupportedError("this target rotates by complex numbers, which a GliDe draft does not read yet")
            cos, sin = made
        else:
            half = torch.arange(0, self.head_dim, 2, device=positions.device) / self.head_dim
            angle = (positions[..., None] * 10_000.0**-half).repeat(1, 1, 2)
            cos, sin = angle.cos(), angle.sin()
        if cos.device != positions.device:  # of a target that is split over devices
            cos, sin = (one.to(positions.device, non_blocking=True) for one in (cos, sin))
        low, high = sin.chunk(2, dim=-1)
        return cos, torch.cat([-low, high], dim=-1)

    def forward(self, positions: Tensor) -> tuple[KV, KV | None]:
        """(cos, sin) for the draft's own heads, and for its cross-attention, each `(batch, queries, rotary_dim)`.

        (a, b) turns into (a cos - b sin, b cos + a sin); the minus is in the first half of `sin` here.
        """
        if not self.fixed:
            found = self._make(positions)
        else:
            if self.cos is None or self.sin is None or self.cos.device != positions.device:
                cos, sin = self._make(torch.arange(self.size, device=positions.device)[None])
                self.cos, self.sin = cos[0], sin[0]
            at = positions.clamp(max=self.size - 1)
            found = self.cos[at], self.sin[at]
        return found, found if self.rotary is not None else None


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
        self.split = target.placed  # then the head may be on another device than the draft

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeddings `(batch, queries, embed_width)` of tokens `(batch, queries)`."""
        return self.embedding(tokens).to(dtype)

    def logits(self, hidden: Tensor, kept: Tensor | None = None) -> Tensor:
        """`(batch, queries, vocab or draft_vocab)` from hidden states of the target's width."""
        if self._served is not None:
            return self._served(hidden)
        if self.split:
            return self._logits_there(hidden, kept)
        if kept is None:
            return self.head(hidden.to(self.embedding.weight.dtype))
        bias = None if self.head.bias is None else self.head.bias[kept]
        return nn.functional.linear(hidden.to(self.head.weight.dtype), self.head.weight[kept], bias)

    def _logits_there(self, hidden: Tensor, kept: Tensor | None) -> Tensor:
        """The same, where the head is."""
        there = hidden.to(runs_on(self.head), non_blocking=True)
        found = self.head(there.to(self.target.dtype)).to(hidden.device, non_blocking=True)
        return found if kept is None else found[..., kept]

    def serve(self, products: torch.dtype, kept: Tensor | None = None) -> None:
        """Pack a copy of the head for decoding, if it is to be multiplied in another dtype than the target's, or in part.

        Raises:
            UnsupportedError: part of a head is needed whose weights a quantizer keeps in a form of its own.
        """
        if kept is not None and not isinstance(self.head, PackedLinear):
            weight = self.head.weight
            if not weight.is_floating_point() or weight.shape[-1] != self.target.hidden_size:
                raise UnsupportedError(
                    "this draft proposes from a part of the vocabulary, and no part of the target's head can be read, because "
                    "it is quantized: leave the head out of the quantization"
                )
        if self.split or not (isinstance(self.head, PackedLinear) or packable(self.head)):
            return
        # Unpacks a copy where the head is packed and not tied: once is enough.
        weight, bias = self.head.weight, self.head.bias
        if kept is not None:
            weight, bias = weight[kept], None if bias is None else bias[kept]
        if weight.dtype != products or kept is not None:
            self._served = PackedLinear(weight, bias, products)


class LentParts(Protocol):
    """What a draft takes from its target; `TargetParts`, or what another engine lends of its own model."""

    @property
    def rotary(self) -> Any:
        """`(cos, sin)` for the draft's own heads and for its cross-attention by positions; see `TargetRotary`."""

    def embed(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeddings `(batch, queries, embed_width)` of tokens `(batch, queries)`."""

    def logits(self, hidden: Tensor, kept: Tensor | None = None) -> Tensor:
        """`(batch, queries, vocab or draft_vocab)` from hidden states of the target's width."""

    def serve(self, products: torch.dtype, kept: Tensor | None = None) -> None:
        """Get ready for decoding with products in this dtype."""


class DraftNetwork(nn.Module):
    """A draft's own weights. `forward` takes and gives tensors, and knows neither a target nor a cache.

    `bind` joins it to a target, from which it takes embedding, head and rotary embedding: they are no parameters of it.
    `borrow` takes them from anything else that lends them.
    """

    rotary_layer: int | None = None
    _target_parts: LentParts | None = None

    def bind(self, target: Target) -> Self:
        """Take what it needs from this target, and go to its device.

        Raises:
            UnsupportedError: the target cannot give what the configuration asks for.
        """
        return self.borrow(TargetParts(target, self.rotary_layer)).to(target.device)

    def borrow(self, parts: LentParts) -> Self:
        """Take these parts of a target, whatever engine has loaded it."""
        self._target_parts = parts
        return self

    @property
    def target_parts(self) -> LentParts:
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
