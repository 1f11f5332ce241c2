"""The draft's law at the frontier, as expansions and stop policies see it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..core.sampling import log_law, widen
from ..core.tree import TokenTree
from ..drafts.base import Ranked, Step


@dataclass
class DraftLaw:
    """Draft logits at the frontier, and the token order that the sampling mode makes of them.

    Attributes:
        logits: `(batch, width, vocab)`, raw but for a row's constraint: -inf for a token that it forbids.
        rank: `(batch, width, vocab)`; nodes are chosen in descending rank. Greedy: the logits, penalties applied.
            Shared noise: the processed log-law plus the noise of the *next* position. Residual: the processed log-law.
        nodes: `(batch, width)` the frontier, numbers of tree nodes, -1 for none.
        drawn: `(batch, width)` tokens drawn at random (residual rows), -1 in rows that draw nothing; None if no row does.
        drawn_law: `(batch, width, vocab)` log-law that they were drawn from.
        ranked: the first tokens by rank, where a compiled program has found them.
    """

    logits: Tensor
    rank: Tensor
    nodes: Tensor
    drawn: Tensor | None = None
    drawn_law: Tensor | None = None
    ranked: Ranked | None = None

    @cached_property
    def log_q(self) -> Tensor:
        """Log-probabilities at temperature 1, full vocabulary: confidence, entropy and scores come from these."""
        return widen(self.logits).log_softmax(-1)

    @cached_property
    def entropy(self) -> Tensor:
        """`(batch, width)`, in nats."""
        return torch.special.entr(self.log_q.exp()).sum(-1) if self.ranked is None else self.ranked.entropy

    @cached_property
    def confidence(self) -> Tensor:
        """Largest probability, `(batch, width)`."""
        return self.log_q.amax(-1).exp() if self.ranked is None else self.ranked.confidence

    @cached_property
    def norm(self) -> Tensor:
        """logsumexp of the ranks, `(batch, width)`."""
        return widen(self.rank).logsumexp(-1) if self.ranked is None else self.ranked.norm

    def first(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The `count` first tokens by rank, or the whole vocabulary: tokens, ranks and log-probabilities at temperature 1,
        `(batch, width, count)` each, best first."""
        count = min(count, self.rank.shape[-1])
        if self.ranked is not None and count <= self.ranked.tokens.shape[-1]:
            tokens, scores, log_q = (one[..., :count] for one in self.ranked[:3])
            return tokens, scores, log_q
        best = self.rank.max(-1, keepdim=True) if count == 1 else self.rank.topk(count)
        return best.indices, best.values, self.log_q.gather(2, best.indices)


def draft_law(batch: Batch, tree: TokenTree, frontier: Tensor, step: Step, depth: int, draws: bool) -> DraftLaw:
    """Rank the tokens that may follow the frontier nodes `(batch, width)`, all of them at one depth.

    `draws`: the expansion draws a chain (residual rows only); otherwise every node is deterministic. Nothing is drawn
    where the frontier is no node: a row that stopped must not use up its chance because a neighbour drafts on.
    """
    if step.scores is not None:
        return DraftLaw(step.logits, step.scores, frontier, ranked=step.ranked)
    laws = batch.laws
    logits = laws.masked(tree, step.logits, frontier)
    adjusted = laws.adjusted(tree, logits, frontier)
    depths = frontier.new_full((1, 1), depth)
    rank = laws.scores(adjusted, batch.cache.host_lengths, batch.root_positions, depths, depth)
    if not laws.residual or not draws:
        return DraftLaw(logits, rank, frontier)
    drawn = torch.full(logits.shape[:2], -1, device=logits.device)
    law = torch.zeros_like(rank, dtype=torch.float64)
    for i in laws.residual:
        law[i] = log_law(adjusted[i].double(), batch.rows[i].params)
        for column in (frontier[i] >= 0).nonzero()[:, 0].tolist():
            drawn[i, column] = batch.rows[i].chance.categorical(law[i, column].exp())
    return DraftLaw(logits, rank, frontier, drawn, law)
