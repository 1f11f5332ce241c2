"""How a draft is trained and judged, teacher-forced on whole windows of text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...drafting.methods import AnyDraft, base_for
from ...drafts.checkpoint import KINDS, save_network
from ...target.target import Target
from ..lags import lag_visible
from ..ranks import own_rows
from ..recipe import DraftRecipe
from ..teacher import Teacher, TeacherOutput


class DraftTraining(ABC):
    """A draft of one kind in training.

    Attributes:
        module: its network.
        reads_hidden: does it read the target's last hidden states?
        lags: at how many lags it is judged.
        deepest: a window's first positions, at which it is not judged: they have no such lag.
        laws: laws that it gives a position.
        shortest: tokens of a window, at least.
    """

    reads_hidden: bool = False
    lags: int = 1
    deepest: int = 8
    laws: int = 1
    shortest: int = 2

    def __init__(self, module: Any) -> None:
        self.module = module

    @staticmethod
    @abstractmethod
    def new(target: Target, recipe: DraftRecipe, text: np.ndarray | None) -> nn.Module:
        """The untrained network of a recipe, float32, on the target's device.

        Args:
            text: token ids of the training text, for a reduced vocabulary.

        Raises:
            InputError, UnsupportedError: the recipe does not fit the target.
        """

    @abstractmethod
    def loss(self, output: TeacherOutput, recipe: DraftRecipe) -> Tensor:
        """Mean loss over a batch that the target has run on; lags and noise are drawn for its number."""

    @abstractmethod
    def logits_by_lag(self, tokens: Tensor, teacher: Teacher) -> Iterator[Tensor]:
        """Teacher-forced logits `(batch, length, vocab)` of the token after each position, at lags 1 .. `lags`; the first
        positions have no such lag and hold anything. The teacher has run on these tokens."""

    def visible(self, output: TeacherOutput, recipe: DraftRecipe) -> Tensor:
        """Target keys `(rows, length)` of its own document that each position of this process's rows may read, drawn for the
        batch's number."""
        shape = output.rows, output.tokens.shape[1]
        drawn = own_rows(lag_visible(recipe.lags, recipe.seed, output.number, *shape, self.deepest))
        seen = drawn.to(output.tokens.device)
        # A round that began in an earlier document sees nothing of this one.
        return seen if output.begins is None else (seen - output.begins).clamp(min=0)

    @property
    def layers(self) -> list[nn.Module]:
        """Its parts that run through torch.compile: what stands around a network's layers asks tensors for numbers, which a
        compiled graph cannot."""
        return list(self.module.layers)

    def joined(self) -> tuple[str, AnyDraft]:
        """The base of its methods, such as "glide" or "vanilla", and the network joined to the decode loop, unpacked."""
        self.module.eval()
        return base_for(self.module.kind), KINDS[self.module.kind][2](self.module)

    def save(self, out: Path, target: Target, command: str, figures: dict[str, Any]) -> None:
        """Write it, as `load_draft` reads it; weights in bfloat16.

        Raises:
            CheckpointError: see `save_network`.
        """
        save_network(out, self.module, target, command, figures, torch.bfloat16)
