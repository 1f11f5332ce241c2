"""Rounds of a known size, run by `auto`'s own code, so that their time can be measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...batch.batch import Batch
from ...batch.row import Row
from ...costmodel import RoundCosts
from .acceptance import Array
from .drafter import AutoDrafter
from .state import Plan, RowState


@dataclass(frozen=True)
class Shape:
    """What a round proposes: depths drafted, by one program or not, and nodes verified a row; or the runner's own chain."""

    depths: int
    nodes: int
    whole: bool = False
    chain: bool = False


class FixedRounds(AutoDrafter):
    """An `AutoDrafter` whose every choice was made before; it learns nothing.

    Args:
        of: the drafter whose rounds are measured.

    Attributes:
        shape: of the next rounds.
    """

    def __init__(self, of: AutoDrafter) -> None:
        super().__init__(of.runner, of.prices, of.copying, of.ranked > 1, of.calibrated, of.priced)
        self.shape = Shape(0, 0)

    def _copy(self, row: Row, own: RowState) -> tuple[int, list[int]]:
        return 1, [0] * self.shape.nodes

    def _chances(self, plan: Plan, own: Sequence[RowState]) -> list[Array]:
        return [np.ones(len(words)) for _, words in plan.copies]

    def _best_chain(self, *_: object) -> tuple[int, float] | None:
        return (self.shape.depths, 0.0) if self.shape.chain else None

    def _settle(self, plan: Plan, choice: tuple[int, float] | None, alone: bool = True) -> None:
        super()._settle(plan, choice, alone)
        self._settled.rests = 0

    def _drafts(self, *_: object) -> bool:
        return self.shape.depths > 0

    def _nothing_pays(self, *_: object) -> bool:
        return self.shape.nodes == 0

    def _by_one_program(self, *_: object) -> bool:
        return self.shape.whole

    def _goes_on(self, depth: int, reach: Array, costs: RoundCosts, rate: float) -> bool:
        return depth < self.shape.depths

    def _width(self, *_: object) -> int:
        return self.shape.nodes

    def _learn_worth(self, *_: object) -> None:
        return None

    def _learn(self, batch: Batch, plan: Plan, outcomes: object) -> None:
        return None
