"""Expansions: how nodes are added below the frontier.

A new one is a class like these, and nothing else changes. How many nodes a call of `grow` adds depends on the depth alone,
never on what was drafted: where a row has fewer, its nodes are padding.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError
from ..sampling import widen
from ..transfer import to_device, to_host
from ..tree import TokenTree
from .law import DraftLaw


class Expansion(Protocol):
    """How nodes are added.

    Attributes:
        draws: may its chain be drawn at random under the residual rule?
        may_end: may it leave every row without a node to go on from? Then the host asks after each depth.
    """

    draws: bool
    may_end: bool

    def budget(self, depth: int) -> int:
        """Most nodes that a proposal of so many depths has, the root included, or that the draft runs for it."""

    def capacity(self, depth: int) -> int:
        """Nodes that `grow` adds in so many depths, the root included."""

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        """Add nodes below the frontier; returns those that the draft runs next, `(batch, width)`, -1 for none. No column
        ends the draft."""

    def finish(self, tree: TokenTree) -> TokenTree:
        """The tree to verify; may drop nodes that were chosen deterministically, and padding."""


class Chain:
    """One node a depth: the draft's first choice, or a token drawn from its law under the residual rule.

    Lossless: a drawn node is marked `sampled` and verified by min(1, p/q); otherwise it is a point mass.
    """

    draws, may_end = True, False

    def budget(self, depth: int) -> int:
        return 1 + depth

    def capacity(self, depth: int) -> int:
        return self.budget(depth)

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
        part = (law.confidence[:, :1] * len(self.bins)).long().clamp(0, len(self.bins) - 1)
        siblings = to_device(self.bins, part.device)[part]
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

    draws, may_end = False, False

    def __init__(self, beams: int = 4) -> None:
        if not 1 <= beams <= 64:
            raise InputError(f"a beam expansion has 1 to 64 beams, not {beams}")
        self.beams = beams

    def budget(self, depth: int) -> int:
        return 1 + depth * self.beams

    def capacity(self, depth: int) -> int:
        return self.budget(depth)

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        """The new nodes in order of descending score."""
        parents, tokens, own, total = (one[:, : self.beams] for one in continuations(tree, frontier, law, self.beams))
        return tree.add(parents, tokens, own, total.isfinite())

    def finish(self, tree: TokenTree) -> TokenTree:
        return tree
