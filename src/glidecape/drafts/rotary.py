"""The target's own rotary embedding, for a draft that reads its rotated keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UnsupportedError

if TYPE_CHECKING:
    from ..target.target import Target

KV = tuple[Tensor, Tensor]
MAX_TABLE = 65_536


class TargetRotary:
    """cos and sin as the target layer makes them, scaled rotary included.

    They are looked up in a table made once, except where they depend on the sequence's length (dynamic scaling) or the
    context is very long. A target that does not rotate gives its draft the common base of 10,000 for its own heads and
    None for the cross-attention.

    Raises:
        UnsupportedError: the target does not rotate by cosines and sines.
    """

    def __init__(self, target: Target, layer: int) -> None:
        # Not those of a composite model's other parts: pictures rotate, too.
        parts = target.model.get_decoder().named_modules()
        self.rotary = next((m for n, m in parts if n.split(".")[-1] == "rotary_emb"), None)
        kinds = getattr(target.text_config, "layer_types", None)
        self.by_kind = {"layer_type": kinds[layer]} if kinds and self._needs_kind(target) else {}
        self.head_dim = target.shapes[layer][1]
        scaling = str(getattr(target.text_config, "rope_parameters", None))
        # Room past the context: nodes beyond it are drafted at a limit, and clipped.
        self.size = target.context + 256
        self.fixed = self.size <= MAX_TABLE and "dynamic" not in scaling and "longrope" not in scaling
        self.table: KV | None = None
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
        low, high = sin.chunk(2, dim=-1)
        return cos, torch.cat([-low, high], dim=-1)

    def __call__(self, positions: Tensor) -> tuple[KV, KV | None]:
        """(cos, sin) for the draft's own heads, and for its cross-attention, each `(batch, queries, rotary_dim)`.

        (a, b) turns into (a cos - b sin, b cos + a sin); the minus is in the first half of `sin` here.
        """
        if not self.fixed:
            found = self._make(positions)
        else:
            if self.table is None or self.table[0].device != positions.device:
                cos, sin = self._make(torch.arange(self.size, device=positions.device)[None])
                self.table = cos[0], sin[0]
            at = positions.clamp(max=self.size - 1)
            found = self.table[0][at], self.table[1][at]
        return found, found if self.rotary is not None else None
