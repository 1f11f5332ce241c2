"""Beam expansion, and the ranking of continuations that trees share."""

from __future__ import annotations

from torch import Tensor

from ...core.tree import TokenTree
from ...errors import InputError
from ..law import DraftLaw
from .base import Expansion


def continuations(tree: TokenTree, frontier: Tensor, law: DraftLaw, each: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `each` first-ranked tokens of every frontier node, best path first; each `(batch, width x each)`.

    Returns:
        Their parents, tokens, log-softmax of the ranks, and the sum of those along the path: -inf below no node, and for a
        token outside the draft's processed law, which has no rank. Ties go to the earlier parent and the better token.
    """
    best, ranks, _ = law.first(each)
    own = (ranks - law.norm[..., None]).float()
    above = tree.score.gather(1, frontier.clamp(min=0))
    total = (above[..., None] + own).masked_fill((frontier < 0)[..., None], float("-inf")).flatten(1)
    order = total.sort(dim=1, descending=True, stable=True)
    parents = frontier.gather(1, order.indices // best.shape[2])
    tokens = best.flatten(1).gather(1, order.indices)
    return parents, tokens, own.flatten(1).gather(1, order.indices), order.values


class Beam(Expansion):
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
