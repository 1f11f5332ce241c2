"""The drafter of Medusa heads: the laws of all depths are made in one call, before the tree is grown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..batch.batch import Batch
from ..batch.row import Outcome
from ..core.cache import KVCache
from ..core.tree import TokenTree
from ..drafts.base import DepthModel, Step
from .drafter import DraftState, ModelDrafter
from .expansions.base import Expansion
from .stop import StopPolicy


@dataclass
class MedusaState(DraftState):
    """A `DraftState` whose cache holds nothing; `logits (batch, depths, vocab)` are this round's."""

    logits: Tensor | None = None


class MedusaDrafter(ModelDrafter):
    """Medusa heads x expansion x stop policy: nodes of one depth share one draft law, whatever their parents are."""

    def __init__(self, model: DepthModel, expansion: Expansion, stop: StopPolicy) -> None:
        self.model: Any = model  # takes the place of the node-by-node model, which is what this drafter does without
        self.expansion, self.stop = expansion, stop
        self.cap = self.limit = min(stop.cap, model.max_lag)

    def begin(self, rows: int, capacity: int) -> MedusaState:
        state = self._begin(KVCache([], rows, 0), rows)
        return MedusaState(state.own, lengths=state.lengths, first=state.first)

    def read(self, batch: Batch, chunk: int = 512) -> None:
        """There is nothing to catch up with."""

    def first_step(self, batch: Batch, own: KVCache) -> Step:
        batch.draft.logits = self.model.all_depths(batch.cache)
        return Step(batch.draft.logits[:, :1])

    def _step(self, batch: Batch, own: KVCache, tree: TokenTree, frontier: Tensor) -> Step:
        """The law of the frontier's depth for each of its nodes."""
        return Step(batch.draft.logits[:, tree.levels, None].expand(-1, frontier.shape[1], -1))

    def next_step(self, batch: Batch, own: KVCache, tokens: Tensor, depth: int) -> Step:
        return Step(batch.draft.logits[:, depth, None])

    def _trust(self, draft: DraftState, outcomes: Sequence[Outcome]) -> None:
        """Nothing was written."""
