"""Stop policies: when drafting ends. Asked after the nodes of a depth were added.

`more(tree, depth, law) -> (batch,) bool or bool`: should rows draft another depth? It may look at a drawn token's law,
never drop the token. A new one is a class like these, and nothing else changes.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ..errors import InputError
from ..tree import TokenTree
from .law import DraftLaw


class StopPolicy(Protocol):
    cap: int

    def more(self, tree: TokenTree, depth: int, law: DraftLaw) -> Tensor | bool: ...


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


class Entropy:
    """SVIP: stop after the first token whose draft law was too uncertain, sqrt(c H) > threshold.

    Args:
        threshold: of sqrt(0.15 H), H in nats at temperature 1. The released 0.3 means H > 0.6 nat.
        cap: tokens at most; the drafter lowers it to the checkpoint's max lag.

    The uncertain token is kept, so a draft has at least one.

    Lossless: stopping depends on the path so far, and drops nothing.
    Source: SVIP paper, section 2.2, and its released code (c = 0.15, threshold 0.3, cap 40).
    """

    C = 0.15

    def __init__(self, threshold: float = 0.3, cap: int = 40) -> None:
        if threshold < 0 or cap < 1:
            raise InputError(f"SVIP's threshold must not be negative and its cap at least 1, not {threshold} and {cap}")
        self.threshold, self.cap = threshold, cap

    def more(self, tree: TokenTree, depth: int, law: DraftLaw) -> Tensor | bool:
        if depth >= self.cap:
            return False
        return (self.C * law.entropy[:, 0]).sqrt() <= self.threshold
