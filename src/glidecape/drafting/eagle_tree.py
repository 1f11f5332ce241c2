"""EAGLE's trees: EAGLE-2's, grown by what the draft is confident of, and EAGLE-1's, fixed beforehand."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..sampling import widen
from ..transfer import to_device
from ..tree import TokenTree
from .expansion import continuations
from .law import DraftLaw

FIRST = 0.6  # chance of the first choice that a static tree is made for


class EagleTree:
    """EAGLE-2: at each depth the `top` best nodes propose `top` tokens each; of all, the best `total` - 1 are verified.

    Args:
        top: nodes of a depth that the draft runs, and tokens that each of them proposes.
        total: nodes of the proposal, the root included.

    Nodes are ranked by the sum along their path of the log-softmax of the draft's ranks, as in a beam; ties go to the
    shallower node. A score never grows along a path, so a kept node's parent is kept, and a node outside the best
    `total` - 1 so far cannot come back: it is neither valid nor run, which changes no proposal. An unsure draft therefore
    stops early.

    Lossless: every node is chosen deterministically, so any of them may be dropped and verify takes the others for point
    masses.
    Source: EAGLE-2 paper, section 4 (top 10, total 60, depth 6). Differs: its code breaks ties by chance and runs the best
    nodes of a depth even where they are lost already.
    """

    draws, may_end = False, True

    def __init__(self, top: int = 10, total: int = 60) -> None:
        check_size(top, total)
        self.top, self.total = top, total

    def budget(self, depth: int) -> int:
        run = 1 + self.top * (depth - 1)  # slots of the draft's own cache
        return max(run, min(self.total, 1 + self.top + (depth - 1) * self.top**2))

    def capacity(self, depth: int) -> int:
        return 1 + self.top + (depth - 1) * min(self.top**2, self.total - 1)

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        """The new depth's best nodes, in order of descending score."""
        # Places ascend, so no node past the first `total` - 1 is ever valid.
        parents, tokens, own, total = (x[:, : self.total - 1] for x in continuations(tree, frontier, law, self.top))
        known = tree.score.masked_fill(~tree.valid, float("-inf"))[:, 1:]
        ahead = (known[:, None] >= total[..., None]).sum(-1)  # earlier nodes go first at equal scores
        place = ahead + torch.arange(total.shape[1], device=total.device)
        valid = total.isfinite() & (place < self.total - 1)
        return tree.add(parents, tokens, own, valid)[:, : self.top]

    def finish(self, tree: TokenTree) -> TokenTree:
        return tree.keep_best(self.total - 1)


class StaticTree:
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

    draws, may_end = False, False

    def __init__(self, top: int = 10, total: int = 60, depth: int = 5) -> None:
        check_size(top, total)
        self.levels = _levels(static_paths(top, total, depth))

    def budget(self, depth: int) -> int:
        return 1 + sum(len(level.choices) for level in self.levels[:depth])

    def capacity(self, depth: int) -> int:
        return self.budget(depth)

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        """All of the shape's next depth; those of its nodes that have children, too, are the new frontier."""
        level, vocab = self.levels[tree.levels], law.rank.shape[-1]
        choices = to_device(level.choices, frontier.device)
        best = widen(law.rank).log_softmax(-1).topk(min(max(level.choices) + 1, vocab), dim=-1)
        at = choices.clamp(max=vocab - 1)
        parents = to_device(level.parents, frontier.device)
        tokens, own = best.indices[:, parents, at], best.values[:, parents, at].float()
        # A token outside the draft's processed law has no rank: its score is -inf.
        added = tree.add(frontier[:, parents], tokens, own, own.isfinite() & (choices < vocab))
        return added[:, to_device(level.goes_on, frontier.device).long()]

    def finish(self, tree: TokenTree) -> TokenTree:
        return tree


@dataclass(frozen=True)
class Level:
    """The nodes of one depth of a static tree, in order.

    Attributes:
        parents: of each node, a column of the frontier above.
        choices: of each node, counted from 0: which of its parent's tokens it is.
        goes_on: which of them have children.
    """

    parents: list[int]
    choices: list[int]
    goes_on: list[int]


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
        levels.append(Level(parents, [path[-1] for path in here], goes_on))
        frontier = [here[i] for i in goes_on]
    return levels


def check_size(top: int, total: int) -> None:
    """Raises InputError for a tree of no or too many nodes."""
    if not 1 <= top <= 64 or not 2 <= total <= 512:
        raise InputError(f"a tree takes a top of 1 to 64 and a total of 2 to 512 nodes, not {top} and {total}")
