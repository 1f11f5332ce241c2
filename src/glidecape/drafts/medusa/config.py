"""The configuration of Medusa heads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..card import STRICT, Lag, Size, Vocabulary

if TYPE_CHECKING:
    from ...target.target import Target


@dataclass(frozen=True)
class MedusaConfig:
    """Stored in a draft's checkpoint.

    Attributes:
        heads: their number, and so the deepest node.
        vocab_size, hidden_size: the target's.
    """

    __pydantic_config__ = STRICT
    heads: Lag
    vocab_size: Vocabulary
    hidden_size: Size

    @classmethod
    def for_target(cls, target: Target, heads: int = 5) -> MedusaConfig:
        return cls(heads, target.vocab_size, target.hidden_size)
