"""CaPE: a chain with siblings where the draft is unsure."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.transfer import to_host
from ...core.tree import TokenTree
from ...drafts.base import Ranked
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
        self.bins, self.width = bins, 1 + max(bins)
        self._siblings = torch.tensor(bins)  # stays on the device of the last call

    def budget(self, depth: int) -> int:
        return 1 + depth * self.width

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        drawn = law.drawn
        if drawn is None:
            tokens, ranks, log_prob = (one[:, 0] for one in law.first(self.width))
        else:  # a drawn token comes first, whatever its rank
            rank, at = law.rank[:, 0], drawn.clamp(min=0)
            rank = rank.scatter(1, at, torch.where(drawn >= 0, float("inf"), rank.gather(1, at)))
            ranks, tokens = rank.topk(min(self.width, rank.shape[-1]))
            log_prob = law.log_q[:, 0].gather(1, tokens)
        valid = self._offered(ranks, law.confidence[:, :1]) & (frontier >= 0)
        width = tokens.shape[1]
        drawn_law = None if law.drawn_law is None else law.drawn_law.expand(-1, width, -1)
        added = tree.add(frontier.expand(-1, width), tokens, log_prob, valid, drawn_law)
        if drawn is not None:
            tree.sampled[:, -width:] &= (drawn >= 0) & (torch.arange(width, device=tokens.device) == 0)
        return added[:, :1]

    def _offered(self, ranks: Tensor, confidence: Tensor) -> Tensor:
        """Which of the first tokens become nodes: `ranks (…, tokens)`, best first, at a confidence `(…, 1)`."""
        part = (confidence * len(self.bins)).long().clamp(0, len(self.bins) - 1)
        self._siblings = self._siblings.to(part.device, non_blocking=True)
        number = torch.arange(ranks.shape[-1], device=ranks.device)
        # A token outside the draft's processed law has no rank: the target's own top-k or top-p rarely holds it.
        return (ranks > float("-inf")) & (number <= self._siblings[part])

    def comb(self, roots: Tensor, ranked: Ranked, depths: Tensor | None) -> TokenTree:
        valid = self._offered(ranked.scores, ranked.confidence[..., None])
        valid = valid if depths is None else valid & depths[..., None]
        return self.finish(TokenTree.comb(roots, ranked.tokens, ranked.log_q, valid))

    def finish(self, tree: TokenTree) -> TokenTree:
        """Padding is dropped, so that the target runs no more nodes than the row with the most has."""
        return tree.pack(to_host(tree.valid.sum(1).amax()))
