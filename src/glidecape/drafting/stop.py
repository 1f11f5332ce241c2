"""Stop policies: when drafting ends. Asked after the nodes of a depth were added.

`more(tree, depth, law) -> (batch,) bool or bool`: should rows draft another depth? It may look at a drawn token's law,
never drop the token. A new one is a class like these, and nothing else changes.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..core.tree import TokenTree
from ..errors import InputError
from .law import DraftLaw


class StopPolicy(Protocol):
    """When drafting ends.

    Attributes:
        cap: tokens at most, whatever `more` says; the drafter lowers it to the draft's max lag.
    """

    cap: int

    def more(self, tree: TokenTree, depth: int, law: DraftLaw) -> Tensor | bool:
        """Should rows draft on, `(batch,)` bool, or one answer for all? Asked after the nodes of `depth` were added.

        Args:
            tree: what was drafted so far. In a chain the newest tokens are `tree.tokens[:, -1]`.
            law: the draft's law at the nodes above them. It may be looked at; a drawn token must never be dropped.
        """


class AdaptiveStop(StopPolicy, Protocol):
    """A stop policy whose length changes from round to round; the drafter keeps each row's length beside its cache."""

    start: int

    def next_length(self, length: int, all_accepted: bool) -> int:
        """A row's next length, given this round's and whether it was accepted down to its deepest node."""


class FixedLength:
    """Draft `length` tokens, always.

    Lossless: it looks at nothing.
    """

    def __init__(self, length: int = 5) -> None:
        if length < 1:
            raise InputError(f"a draft has at least 1 token, not {length}; use method plain to draft none")
        self.cap = length

    def more(self, tree: TokenTree, depth: int, law: DraftLaw) -> bool:
        return depth < self.cap


class Heuristic:
    """transformers' heuristic length: 2 more after a round that was accepted to its end, else 1 less, at least 1.

    Args:
        start: length of a row's first round.
        cap: tokens at most; the drafter lowers it to the checkpoint's max lag.

    Each row has its own length, and every prompt begins at `start`.

    Lossless: the length depends on earlier rounds only.
    Source: transformers' `num_assistant_tokens_schedule="heuristic_transient"`; start and cap are those of the SVIP
    paper's baseline. Differs: a round shortened by the row's limit counts as accepted if all it had was; with several
    nodes a depth, an accepted node of the last depth counts.
    """

    def __init__(self, start: int = 5, cap: int = 40) -> None:
        if start < 1 or cap < 1:
            raise InputError(f"the heuristic length starts and ends at 1 or more, not {start} and {cap}")
        self.start, self.cap = min(start, cap), cap

    def more(self, tree: TokenTree, depth: int, law: DraftLaw) -> bool:
        return depth < self.cap

    def next_length(self, length: int, all_accepted: bool) -> int:
        return length + 2 if all_accepted else max(1, length - 1)


class Entropy:
    """SVIP: stop after the first token whose draft law was too uncertain, sqrt(c H) > threshold.

    Args:
        threshold: of sqrt(0.15 H), H in nats at temperature 1. The released 0.3 means H > 0.6 nat.
        cap: tokens at most; the drafter lowers it to the checkpoint's max lag.
        over: whose H, where the frontier has several nodes (beam): "best", the one of the highest score; "mean", over the
            frontier, weighted by the nodes' draft probabilities; or "min", the most certain one's.

    The uncertain token is kept, so a draft has at least one.

    Lossless: stopping depends on the path so far, and drops nothing.
    Source: SVIP paper, section 2.2, and its released code (c = 0.15, threshold 0.3, cap 40).
    """

    C = 0.15
    OVER = ("best", "mean", "min")

    def __init__(self, threshold: float = 0.3, cap: int = 40, over: str = "best") -> None:
        if not threshold >= 0 or cap < 1:
            raise InputError(f"SVIP's threshold must not be negative and its cap at least 1, not {threshold} and {cap}")
        if over not in self.OVER:
            raise InputError(f"SVIP's entropy is taken over one of {', '.join(self.OVER)}, not '{over}'")
        self.threshold, self.cap, self.over = threshold, cap, over

    def more(self, tree: TokenTree, depth: int, law: DraftLaw) -> Tensor | bool:
        if depth >= self.cap:
            return False
        return (self.C * self.uncertainty(tree, law)).sqrt() <= self.threshold

    def uncertainty(self, tree: TokenTree, law: DraftLaw) -> Tensor:
        """The entropy that decides, `(batch,)` in nats; anything in rows without a frontier."""
        if law.nodes.shape[1] == 1:
            return law.entropy[:, 0]
        score = tree.score.gather(1, law.nodes.clamp(min=0)).masked_fill(law.nodes < 0, float("-inf"))
        if self.over == "best":
            return law.entropy.gather(1, score.argmax(1, keepdim=True))[:, 0]
        if self.over == "min":
            return law.entropy.masked_fill(law.nodes < 0, float("inf")).amin(1)
        # A row that stopped has no frontier; its weights must be numbers all the same.
        weight = score.masked_fill((law.nodes < 0).all(1, keepdim=True), 0.0).softmax(1)
        return (weight * law.entropy).sum(1)
