"""EAGLE-2's tree: grown by what the draft is confident of."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.tree import TokenTree
from ...errors import InputError
from ..law import DraftLaw
from .base import Expansion
from .beam import continuations


class EagleTree(Expansion):
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

    may_end = True

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


def check_size(top: int, total: int) -> None:
    """Raises InputError for a tree of no or too many nodes."""
    if not 1 <= top <= 64 or not 2 <= total <= 512:
        raise InputError(f"a tree takes a top of 1 to 64 and a total of 2 to 512 nodes, not {top} and {total}")
