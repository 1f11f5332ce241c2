"""The chain: one node a depth."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.tree import TokenTree
from ...drafts.base import Ranked
from ..law import DraftLaw
from .base import Expansion


class Chain(Expansion):
    """One node a depth: the draft's first choice, or a token drawn from its law under the residual rule.

    Attributes:
        width: tokens at a depth, most, the chain's own included.

    Lossless: a drawn node is marked `sampled` and verified by min(1, p/q); otherwise it is a point mass.
    """

    draws, width = True, 1

    def budget(self, depth: int) -> int:
        return 1 + depth

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        first, _, log_prob = (one[..., 0] for one in law.first(1))
        if law.drawn is None:
            return tree.add(frontier, first, log_prob)
        # Greedy and shared-noise rows beside residual ones: each row adds exactly one of the two nodes.
        random = law.drawn >= 0
        token = torch.where(random, law.drawn, first)
        log_prob = law.log_q.gather(2, token[..., None])[..., 0]
        assert law.drawn_law is not None
        added = tree.add(frontier, token, log_prob, sampled_from=law.drawn_law)
        tree.sampled[:, -1:] &= random
        return added

    def comb(self, roots: Tensor, ranked: Ranked, depths: Tensor | None) -> TokenTree:
        """The tree of a chain that was drafted whole.

        Args:
            ranked: of each depth, the `width` first tokens `(batch, depths, width)`.
            depths: `(batch, depths)` bool, which of them the row has; None: all.
        """
        return TokenTree.comb(roots, ranked.tokens, ranked.log_q, None if depths is None else depths[..., None])
