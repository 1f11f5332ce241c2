"""What an expansion is to the drafter.

A new one is a class in a file of its own beside this, and nothing else changes. How many nodes a call of `grow` adds
depends on the depth alone, never on what was drafted: where a row has fewer, its nodes are padding.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ...core.tree import TokenTree
from ..law import DraftLaw


class Expansion(Protocol):
    """How nodes are added.

    Attributes:
        draws: may its chain be drawn at random under the residual rule?
        may_end: may it leave every row without a node to go on from? Then the host asks after each depth.
    """

    draws: bool = False
    may_end: bool = False

    def budget(self, depth: int) -> int:
        """Most nodes that a proposal of so many depths has, the root included, or that the draft runs for it."""

    def capacity(self, depth: int) -> int:
        """Nodes that `grow` adds in so many depths, the root included; all that are verified, if it does not say otherwise."""
        return self.budget(depth)

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        """Add nodes below the frontier; returns those that the draft runs next, `(batch, width)`, -1 for none. No column
        ends the draft."""

    def finish(self, tree: TokenTree) -> TokenTree:
        """The tree to verify; may drop nodes that were chosen deterministically, and padding. By default it is the whole."""
        return tree
