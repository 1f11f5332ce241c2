"""Teacher-forced forwards of the target on whole windows, as training and evaluation take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.cache import KVCache
from ..core.masks import documents_mask
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
    def __call__(self, tokens: Tensor, begins: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Logits `(rows, length, vocab)` of whole windows.

        Args:
            begins: see `TeacherOutput`; None: all is one document.
            positions: `(rows, length)`; None: from zero, or from the beginning of each document that is kept apart.
        """
        if positions is None:
            positions = self._from_zero if begins is None else self._from_zero - begins
        self.positions = positions
        self.cache.truncate([0] * tokens.shape[0])
        apart = None if begins is None else documents_mask(begins)
        logits = self.target.forward(tokens, positions, self.cache, apart).logits
        self.cache.commit([tokens.shape[1]] * tokens.shape[0])
        return logits

    def features(self, tokens: Tensor) -> Tensor:
        """Last hidden states `(rows, length, hidden_size)` of the window that it ran last."""
        assert self.cache.hidden is not None, "this teacher does not keep them"
        return self.cache.hidden[: tokens.shape[0], : tokens.shape[1]]

    def run(
        self,
        tokens: Tensor,
        number: int,
        learned: Tensor | None = None,
        begins: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> TeacherOutput:
        """A batch with what the target says of it, in bfloat16 products; any number of drafts may learn from it until the
        next one is output."""
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16):
            return TeacherOutput(tokens, number, learned, self(tokens, begins, positions), self, begins)


@dataclass(frozen=True)
class TeacherOutput:
    """A batch of a training and the target's forward over it.

    Attributes:
        tokens: `(rows, length)`, this process's.
        number: of the batch in its run; what is drawn for it follows from it.
        learned: `(rows, length)` bool, the tokens to be learned, each by the position before it; None: all.
        logits: the target's, `(rows, length, vocab)`.
        teacher: holds the keys and values of the target's layers, and the positions of the tokens.
        begins: `(rows, length)` int64, the slot at which the document of each token begins, where no document sees another;
            None: all is one.
    """

    tokens: Tensor
    number: int
    learned: Tensor | None
    logits: Tensor
    teacher: Teacher
    begins: Tensor | None = None

    @property
    def rows(self) -> int:
        """Rows of the batch in all processes."""
        return len(self.tokens) * ranks().count

    @property
    def positions(self) -> Tensor:
        """`(rows, length)`; they begin anew with each document that is kept apart."""
        return self.teacher.positions

    @property
    def apart(self) -> Tensor | None:
        """`(rows, 1, length, length)` who sees whom, where documents are kept apart."""
        return None if self.begins is None else documents_mask(self.begins)[:, None]

    def counted(self) -> Tensor:
        """`(rows, length)` bool: positions whose next token is to be learned."""
        if self.learned is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        return nn.functional.pad(self.learned[:, 1:], (0, 1))


def previous(hidden: Tensor) -> Tensor:
    """`(batch, length, width)`: at each position the hidden state of the one before; zeros at the first."""
    return nn.functional.pad(hidden[:, :-1], (0, 0, 1, 0))
