"""Expansions: how nodes are added below the frontier.

An expansion has `draws` (may its chain be drawn at random under the residual rule?), `budget(depth)`, the most nodes that a
proposal of so many depths has, the root included, or that the draft runs for it, and `grow(tree, frontier, law) ->
frontier`: nodes that the draft runs next, `(batch, width)`, -1 for none; no column ends the draft. `finish(tree)` may prune,
deterministic nodes only. A new one is a class like these, and nothing else changes.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError
from ..sampling import widen
from ..tree import TokenTree
from .law import DraftLaw


class Expansion(Protocol):
    draws: bool

    def budget(self, depth: int) -> int: ...

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor: ...

    def finish(self, tree: TokenTree) -> TokenTree: ...


class Chain:
    """One node a depth: the draft's first choice, or a token drawn from its law under the residual rule.

    Lossless: a drawn node is marked `sampled` and verified by min(1, p/q); otherwise it is a point mass.
    """

    draws = True

    def budget(self, depth: int) -> int:
        return 1 + depth

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        first = law.rank.argmax(-1)
        if law.drawn is None:
            return tree.add(frontier, first, law.log_q.gather(2, first[..., None])[..., 0])
        # Greedy and shared-noise rows beside residual ones: each row adds exactly one of the two nodes.
        random = law.drawn >= 0
        token = torch.where(random, law.drawn, first)
        log_prob = law.log_q.gather(2, token[..., None])[..., 0]
        assert law.drawn_law is not None
        added = tree.add(frontier, token, log_prob, sampled_from=law.drawn_law)
        tree.sampled[:, -1:] &= random
        return added

    def finish(self, tree: TokenTree) -> TokenTree:
        return tree


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

    PAPER = (7, 7, 7, 5, 5, 5, 3, 3, 1, 1)
    SMALL = (3, 3, 3, 2, 2, 1, 1, 1, 0, 0)  # for CPUs, where 32 nodes cost several times one node (dev/LOG.md)

    def __init__(self, bins: tuple[int, ...] = PAPER) -> None:
        if not bins or min(bins) < 0 or max(bins) > 64:
            raise InputError(f"CaPE's bins must be one or more numbers of siblings from 0 to 64, not {bins}")
        self.bins, self.most = bins, max(bins)

    def budget(self, depth: int) -> int:
        return 1 + depth * (1 + self.most)

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        part = (law.confidence[:, 0] * len(self.bins)).long().clamp(0, len(self.bins) - 1)
        siblings = [self.bins[i] for i in part.tolist()]
        if not any(siblings):
            return super().grow(tree, frontier, law)
        rank, drawn = law.rank[:, 0], law.drawn
        if drawn is not None:  # a drawn token comes first, whatever its rank
            at = drawn.clamp(min=0)
            rank = rank.scatter(1, at, torch.where(drawn >= 0, float("inf"), rank.gather(1, at)))
        best = rank.topk(min(1 + max(siblings), rank.shape[-1]), dim=-1)
        number = torch.arange(best.indices.shape[1], device=rank.device)
        # A token outside the draft's processed law has no rank: the target's own top-k or top-p rarely holds it.
        valid = (best.values > float("-inf")) & (frontier >= 0)
        valid &= number <= torch.tensor(siblings, device=rank.device)[:, None]
        keep = max(1, int(valid.sum(1).max()))  # valid ones come first: the rest would be padding in every row
        tokens = best.indices[:, :keep]
        log_prob = law.log_q[:, 0].gather(1, tokens)
        drawn_law = None if law.drawn_law is None else law.drawn_law.expand(-1, keep, -1)
        added = tree.add(frontier.expand(-1, keep), tokens, log_prob, valid[:, :keep], drawn_law)
        if drawn is not None:
            tree.sampled[:, -keep:] &= (drawn >= 0) & (number[:keep] == 0)
        return added[:, :1]


def continuations(tree: TokenTree, frontier: Tensor, law: DraftLaw, each: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `each` first-ranked tokens of every frontier node, best path first; each `(batch, width x each)`.

    Returns:
        Their parents, tokens, log-softmax of the ranks, and the sum of those along the path: -inf below no node, and for a
        token outside the draft's processed law, which has no rank. Ties go to the earlier parent and the better token.
    """
    best = widen(law.rank).log_softmax(-1).topk(min(each, law.rank.shape[-1]), dim=-1)
    above = tree.score.gather(1, frontier.clamp(min=0))
    total = (above[..., None] + best.values.float()).masked_fill((frontier < 0)[..., None], float("-inf")).flatten(1)
    order = total.sort(dim=1, descending=True, stable=True)
    parents = frontier.gather(1, order.indices // best.values.shape[2])
    tokens = best.indices.flatten(1).gather(1, order.indices)
    return parents, tokens, best.values.flatten(1).gather(1, order.indices), order.values


class Beam:
    """Beam expansion: at each depth the `beams` best nodes by cumulative score, all of which stay in the tree.

    A node's score is the sum along its path of the log-softmax of the draft's ranks: greedy, the draft's own
    log-probabilities; under shared noise those of the logits with the noise in them, so that a token the noise favours
    scores high; under the residual rule the processed log-law.

    The draft's cache is only written at its end: a node finds its ancestors through the mask, and the accepted path is
    moved once a round.

    Lossless: every node is chosen deterministically, so verify takes it for a point mass, siblings one after the other.
    Source: the baseline of the GliDe paper, section 5.1 (4 beams, merged into a prefix tree). Differs: it keeps the nodes
    that a beam search discards on its way, as LongSpec does (appendix D): they are drafted already, and cost the target
    a few nodes more.
    """

    draws = False

    def __init__(self, beams: int = 4) -> None:
        if not 1 <= beams <= 64:
            raise InputError(f"a beam expansion has 1 to 64 beams, not {beams}")
        self.beams = beams

    def budget(self, depth: int) -> int:
        return 1 + depth * self.beams

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        """The new nodes in order of descending score."""
        parents, tokens, own, total = (one[:, : self.beams] for one in continuations(tree, frontier, law, self.beams))
        return tree.add(parents, tokens, own, total.isfinite())

    def finish(self, tree: TokenTree) -> TokenTree:
        return tree
