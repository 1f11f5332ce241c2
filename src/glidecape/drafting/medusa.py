"""The drafter of Medusa heads: the laws of all depths are made in one call, before the tree is grown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from ..cache import KVCache
from ..state import DecodeState
from ..tree import TokenTree
from .drafter import DraftState, ModelDrafter
from .expansion import Expansion
from .stop import StopPolicy


@runtime_checkable
class DepthModel(Protocol):
    """A network that foretells every depth at once, from the target's last hidden states alone.

    Attributes:
        max_lag: deepest node it was trained for.
        reads_hidden: must the target's cache keep last hidden states?
    """

    max_lag: int
    reads_hidden: bool

    def all_depths(self, target_cache: KVCache) -> Tensor:
        """Logits `(batch, max_lag, vocab)` of the nodes one, two, … below the root."""


@dataclass
class MedusaState(DraftState):
    """A `DraftState` whose cache holds nothing; `logits (batch, depths, vocab)` are this round's."""

    logits: Tensor | None = None


class MedusaDrafter(ModelDrafter):
    """Medusa heads x expansion x stop policy: nodes of one depth share one draft law, whatever their parents are."""

    def __init__(self, model: DepthModel, expansion: Expansion, stop: StopPolicy) -> None:
        self.model: Any = model  # takes the place of the node-by-node model, which is what this drafter does without
        self.expansion, self.stop, self.cap = expansion, stop, min(stop.cap, model.max_lag)

    def admit(self, state: DecodeState) -> None:
        rows = len(state.rows)
        state.draft = MedusaState(KVCache([], rows, 0), [], self._first_lengths(rows))

    def _first_step(self, state: DecodeState, own: KVCache) -> Tensor:
        state.draft.logits = self.model.all_depths(state.cache)
        return state.draft.logits[:, :1]

    def _step(self, state: DecodeState, own: KVCache, tree: TokenTree, frontier: Tensor, roots: Tensor) -> Tensor:
        """The law of the frontier's depth for each of its nodes, `(batch, width, vocab)`."""
        return state.draft.logits[:, int(tree.depth.max()), None].expand(-1, frontier.shape[1], -1)

    def _trust(self, state: DecodeState, tree: TokenTree, paths: list[list[int]]) -> None:
        """Nothing was written."""
