"""CaPE: a chain with siblings where the draft is unsure."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.transfer import to_host
from ...core.tree import TokenTree
from ...errors import InputError
from ..law import DraftLaw
from ..options import PAPER_BINS
from .chain import Chain


class Cape(Chain):
    """CaPE: a chain, and at each depth siblings of its node, more of them where the draft is less confident.

    Args:
        bins: siblings by confidence, the draft's largest probability p at temperature 1: bins[i] for p in the i-th of
            `len(bins)` equal parts of [0, 1]. The default is the paper's: 7 up to 0.3, 5 up to 0.6, 3 up to 0.8, then 1.

    Siblings are leaves; an accepted one ends the round.

    Lossless: siblings are point masses tried after the chain's node.
    Source: GliDe paper, section 4.2. Differs: under the residual rule the chain is drawn and its siblings are the most
    probable other tokens; the paper is greedy only.
    """

    def __init__(self, bins: tuple[int, ...] = PAPER_BINS) -> None:
        if not bins or min(bins) < 0 or max(bins) > 64:
            raise InputError(f"CaPE's bins must be one or more numbers of siblings from 0 to 64, not {bins}")
        self.bins, self.most = bins, max(bins)
        self._siblings = torch.tensor(bins)  # stays on the device of the last call

    def budget(self, depth: int) -> int:
        return 1 + depth * (1 + self.most)

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        part = (law.confidence[:, :1] * len(self.bins)).long().clamp(0, len(self.bins) - 1)
        self._siblings = self._siblings.to(part.device, non_blocking=True)
        siblings = self._siblings[part]
        rank, drawn = law.rank[:, 0], law.drawn
        if drawn is not None:  # a drawn token comes first, whatever its rank
            at = drawn.clamp(min=0)
            rank = rank.scatter(1, at, torch.where(drawn >= 0, float("inf"), rank.gather(1, at)))
        best = rank.topk(min(1 + self.most, rank.shape[-1]), dim=-1)
        number = torch.arange(best.indices.shape[1], device=rank.device)
        # A token outside the draft's processed law has no rank: the target's own top-k or top-p rarely holds it.
        valid = (best.values > float("-inf")) & (frontier >= 0)
        valid &= number <= siblings
        log_prob = law.log_q[:, 0].gather(1, best.indices)
        width = len(number)
        drawn_law = None if law.drawn_law is None else law.drawn_law.expand(-1, width, -1)
        added = tree.add(frontier.expand(-1, width), best.indices, log_prob, valid, drawn_law)
        if drawn is not None:
            tree.sampled[:, -width:] &= (drawn >= 0) & (number == 0)
        return added[:, :1]

    def finish(self, tree: TokenTree) -> TokenTree:
        """Padding is dropped, so that the target runs no more nodes than the row with the most has."""
        return tree.pack(to_host(tree.valid.sum(1).amax()))
