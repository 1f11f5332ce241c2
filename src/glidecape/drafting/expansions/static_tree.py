"""EAGLE-1's and Medusa's trees, whose shape is fixed beforehand."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.tree import TokenTree
from ..law import DraftLaw
from .base import Expansion
from .eagle_tree import check_size

FIRST = 0.6  # chance of the first choice that a static tree is made for


class StaticTree(Expansion):
    """A tree whose shape is fixed beforehand: which of the draft's choices, first to `top`-th, each node continues with.

    Args:
        top: most children of a node.
        total: nodes of the proposal at the full depth, the root included.
        depth: of the whole tree; a stop policy may end it above.

    The shape is that of the `total` best nodes if the draft's k-th choice were right with probability 0.6 / k^2 everywhere,
    which adds up to 0.99 over all k; ties go to the shallower node, then to the better choices.

    Lossless: every node is chosen deterministically, so verify takes it for a point mass.
    Source: EAGLE-1 and Medusa. Differs: their shapes are tables, searched for on their own models; ours is this formula.
    """

    def __init__(self, top: int = 10, total: int = 60, depth: int = 5) -> None:
        check_size(top, total)
        self.levels = _levels(static_paths(top, total, depth))

    def budget(self, depth: int) -> int:
        return 1 + sum(len(level.choices) for level in self.levels[:depth])

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        """All of the shape's next depth; those of its nodes that have children, too, are the new frontier."""
        level, vocab = self.levels[tree.levels].to(frontier.device), law.rank.shape[-1]
        self.levels[tree.levels] = level  # stays on the device
        best, ranks, _ = law.first(level.most)
        at = level.choices.clamp(max=vocab - 1)
        tokens, own = best[:, level.parents, at], (ranks - law.norm[..., None])[:, level.parents, at].float()
        # A token outside the draft's processed law has no rank: its score is -inf.
        added = tree.add(frontier[:, level.parents], tokens, own, own.isfinite() & (level.choices < vocab))
        return added[:, level.goes_on]


@dataclass(frozen=True)
class Level:
    """The nodes of one depth of a static tree, in order.

    Attributes:
        parents: `(nodes,)` of each node, a column of the frontier above.
        choices: `(nodes,)` of each node, counted from 0: which of its parent's tokens it is.
        goes_on: which of them have children.
        most: most children of a parent.
    """

    parents: Tensor
    choices: Tensor
    goes_on: Tensor
    most: int

    def to(self, device: torch.device) -> Level:
        if self.parents.device == device:
            return self
        parents, choices, goes_on = (
            one.to(device, non_blocking=True) for one in (self.parents, self.choices, self.goes_on)
        )
        return Level(parents, choices, goes_on, self.most)


def static_paths(top: int, total: int, depth: int) -> list[tuple[int, ...]]:
    """The choices, counted from 0, that lead to each node of a static tree but its root; best node first.

    >>> static_paths(top=3, total=6, depth=3)
    [(0,), (0, 0), (0, 0, 0), (1,), (0, 1)]
    """
    found: list[tuple[int, ...]] = []
    waiting: list[tuple[float, int, tuple[int, ...]]] = [(-FIRST, 1, (0,))]
    while waiting and len(found) < total - 1:
        path = heapq.heappop(waiting)[2]
        found.append(path)
        beside, below = (*path[:-1], path[-1] + 1), (*path, 0)
        for other in (beside, below):
            if other[-1] < top and len(other) <= depth:
                chance = FIRST ** len(other) / math.prod((k + 1) ** 2 for k in other)
                heapq.heappush(waiting, (-chance, len(other), other))
    return found


def _levels(paths: list[tuple[int, ...]]) -> list[Level]:
    levels: list[Level] = []
    frontier: list[tuple[int, ...]] = [()]
    for depth in range(1, max(len(path) for path in paths) + 1):
        here = sorted(path for path in paths if len(path) == depth)
        parents = [frontier.index(path[:-1]) for path in here]
        with_children = {path[:-1] for path in paths if len(path) == depth + 1}
        goes_on = [i for i, path in enumerate(here) if path in with_children]
        choices = [path[-1] for path in here]
        as_numbers = torch.LongTensor
        levels.append(Level(as_numbers(parents), as_numbers(choices), as_numbers(goes_on), max(choices) + 1))
        frontier = [here[i] for i in goes_on]
    return levels
