"""Teacher-forced forwards of the target on whole windows, as training and evaluation take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.cache import KVCache
from ..target.target import Target
from .ranks import ranks


class Teacher:
    """The frozen target on whole windows: logits and, through one reused cache, the keys and values of its layers.

    Args:
        hidden: keep its last hidden states in the cache, too.

    Attributes:
        positions: `(rows, length)` of the tokens that it ran last.
    """

    def __init__(self, target: Target, rows: int, length: int, hidden: bool = False) -> None:
        self.target = target.model.requires_grad_(False) and target
        self.cache: KVCache = target.new_cache(rows, length, hidden=hidden)
        self.positions = self._from_zero = torch.arange(length, device=target.device).expand(rows, -1)

    @torch.no_grad()
    def __call__(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Logits `(rows, length, vocab)` of whole windows at these positions; None: from zero."""
        self.positions = self._from_zero if positions is None else positions
        self.cache.truncate([0] * tokens.shape[0])
        logits = self.target.forward(tokens, self.positions, self.cache).logits
        self.cache.commit([tokens.shape[1]] * tokens.shape[0])
        return logits

    def features(self, tokens: Tensor) -> Tensor:
        """Last hidden states `(rows, length, hidden_size)` of the window that it ran last."""
        assert self.cache.hidden is not None, "this teacher does not keep them"
        return self.cache.hidden[: tokens.shape[0], : tokens.shape[1]]

    def run(
        self, tokens: Tensor, number: int, learned: Tensor | None = None, positions: Tensor | None = None
    ) -> TeacherOutput:
        """A batch with what the target says of it, in bfloat16 products; any number of drafts may learn from it until the
        next one is output."""
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            return TeacherOutput(tokens, number, learned, self(tokens, positions), self)


@dataclass(frozen=True)
class TeacherOutput:
    """A batch of a training and the target's forward over it.

    Attributes:
        tokens: `(rows, length)`, this process's.
        number: of the batch in its run; what is drawn for it follows from it.
        learned: `(rows, length)` bool, the tokens to be learned, each by the position before it; None: all.
        logits: the target's, `(rows, length, vocab)`.
        teacher: holds the keys and values of the target's layers, and the positions of the tokens.
    """

    tokens: Tensor
    number: int
    learned: Tensor | None
    logits: Tensor
    teacher: Teacher

    @property
    def rows(self) -> int:
        """Rows of the batch in all processes."""
        return len(self.tokens) * ranks().count

    def counted(self) -> Tensor:
        """`(rows, length)` bool: positions whose next token is to be learned."""
        if self.learned is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        return nn.functional.pad(self.learned[:, 1:], (0, 1))


def previous(hidden: Tensor) -> Tensor:
    """`(batch, length, width)`: at each position the hidden state of the one before; zeros at the first."""
    return nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0))
