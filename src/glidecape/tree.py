"""`TokenTree`: a proposal. The only place that knows parent pointers.

A chain, CaPE's comb, a beam and the empty proposal are all values of this type. Rows share node numbers: node n is
added to every row at once, and is padding (`valid` False) where a row has none, so shapes never depend on the data.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .errors import InputError


class TokenTree:
    """A batch of token trees; node 0 is the root, the last emitted token, not yet in the target's cache.

    Attributes:
        tokens: `(batch, nodes)` int64.
        parents: `(batch, nodes)` int64; -1 for the root; a parent's number is smaller than its child's.
        depth: `(batch, nodes)` int64; the root is 0.
        valid: `(batch, nodes)` bool; False is padding.
        score: `(batch, nodes)` float; sum of draft log-probabilities from the root.
        sampled: `(batch, nodes)` bool; True: drawn at random from its parent's draft law. False: chosen
            deterministically (given the shared noise).
        grown_as: `(batch, nodes)` numbers that the nodes had before the tree was pruned; None: it was not.

    >>> tree = TokenTree(torch.tensor([5]))
    >>> a = tree.add(torch.tensor([[0]]), torch.tensor([[7]]), torch.tensor([[-0.1]]))
    >>> b = tree.add(a, torch.tensor([[8]]), torch.tensor([[-0.2]]))
    >>> tree.parents.tolist(), tree.depth.tolist(), tree.path_tokens(0, [0, 1, 2])
    ([[-1, 0, 1]], [[0, 1, 2]], [5, 7, 8])
    """

    def __init__(self, roots: Tensor) -> None:
        batch, device = roots.shape[0], roots.device
        self.tokens = roots.view(batch, 1).long()
        self.parents = torch.full((batch, 1), -1, device=device)
        self.depth = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.valid = torch.ones(batch, 1, dtype=torch.bool, device=device)
        self.score = torch.zeros(batch, 1, device=device)
        self.sampled = torch.zeros(batch, 1, dtype=torch.bool, device=device)
        self.grown_as: Tensor | None = None
        self._ancestors: Tensor | None = None
        # Draft laws that children were drawn from, kept for sampled parents only: (row, node) -> log-law (vocab,)
        self._laws: dict[tuple[int, int], Tensor] = {}

    @property
    def batch(self) -> int:
        return self.tokens.shape[0]

    @property
    def nodes(self) -> int:
        return self.tokens.shape[1]

    @property
    def num_drafted(self) -> Tensor:
        """Drafted tokens of each row, `(batch,)`: the root and padding do not count."""
        return self.valid.sum(1) - 1

    @property
    def deepest(self) -> Tensor:
        """Largest depth of each row's nodes, `(batch,)`; padding does not count."""
        return self.depth.masked_fill(~self.valid, 0).amax(1)

    def add(
        self,
        parents: Tensor,
        tokens: Tensor,
        log_prob: Tensor,
        valid: Tensor | None = None,
        sampled_from: Tensor | None = None,
    ) -> Tensor:
        """Add k nodes to every row; returns their numbers, `(batch, k)`, -1 where not valid.

        Args:
            parents: `(batch, k)` node numbers; -1 makes the child padding.
            tokens, log_prob: `(batch, k)`; the draft's log-probability of the token given its path.
            valid: `(batch, k)`; None: wherever the parent is a node.
            sampled_from: `(batch, k, vocab)` log-law each token was drawn from; None: chosen deterministically.
        """
        valid = parents >= 0 if valid is None else valid & (parents >= 0)
        at = parents.clamp(min=0)
        first, k = self.nodes, parents.shape[1]
        numbers = torch.arange(first, first + k, device=parents.device).expand(self.batch, k)
        self.tokens = torch.cat([self.tokens, tokens], 1)
        self.parents = torch.cat([self.parents, at], 1)
        self.depth = torch.cat([self.depth, self.depth.gather(1, at) + 1], 1)
        self.valid = torch.cat([self.valid, valid], 1)
        self.score = torch.cat([self.score, self.score.gather(1, at) + log_prob.float()], 1)
        drawn = valid if sampled_from is not None else torch.zeros_like(valid)
        self.sampled = torch.cat([self.sampled, drawn], 1)
        self._ancestors = None
        if sampled_from is not None:
            for row, column in drawn.nonzero().tolist():
                self._laws[row, int(at[row, column])] = sampled_from[row, column]
        return numbers.masked_fill(~valid, -1)

    @property
    def ancestors(self) -> Tensor:
        """`(batch, nodes, nodes)` bool; [n, m] is True where m is n or an ancestor of n. Made when asked for."""
        if self._ancestors is None:
            reach = torch.eye(self.nodes, device=self.parents.device).repeat(self.batch, 1, 1)
            below = self.parents[:, 1:, None]
            reach[:, 1:].scatter_(2, below, 1.0)
            steps = 1  # reach[n, m] > 0 where m is at most so many steps above n
            while steps < self.nodes - 1 and steps < int(self.depth.max()):
                # Kept at 0 and 1: the number of ways to a node doubles with each step, and overflows below depth 256.
                reach, steps = (reach @ reach).clamp_(max=1.0), 2 * steps
            self._ancestors = reach > 0
        return self._ancestors

    def draft_law(self, row: int, node: int) -> Tensor | None:
        """Log-law `(vocab,)` that the sampled children of `node` were drawn from, or None."""
        return self._laws.get((row, node))

    def positions(self, roots: Tensor) -> Tensor:
        """Absolute positions `(batch, nodes)`, given those of the roots `(batch,)`."""
        return roots[:, None] + self.depth

    def children(self, row: int) -> list[list[int]]:
        """For each node of a row its children in the order they were added; padding is nobody's child."""
        found: list[list[int]] = [[] for _ in range(self.nodes)]
        pairs = zip(self.parents[row].tolist(), self.valid[row].tolist(), strict=True)
        for node, (parent, valid) in enumerate(pairs):
            if valid and parent >= 0:
                found[parent].append(node)
        return found

    def path_tokens(self, row: int, path: list[int]) -> list[int]:
        return self.tokens[row, path].tolist()

    def origins(self, row: int, path: list[int]) -> list[str]:
        """Of each node after the root of `path`: "chain" if it is its parent's first child, else "sibling"."""
        children = self.children(row)
        return ["chain" if children[above][0] == node else "sibling" for above, node in pairwise(path)]

    def keep_best(self, count: int) -> TokenTree:
        """The root and the `count` best-scored nodes of each row, in their order; ties go to the earlier node.

        Raises:
            InputError: a node was sampled. Dropping a drawn token changes the law of the output.
        """
        if bool(self.sampled.any()):
            raise InputError("a tree with sampled nodes cannot be pruned: dropping a drawn token is not lossless")
        count = min(count, self.nodes - 1)
        score = self.score.masked_fill(~self.valid, float("-inf"))[:, 1:]
        # A child's score never exceeds its parent's, and a stable sort puts the earlier node first: parents stay.
        best = score.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(1).values + 1
        kept = torch.cat([best.new_zeros(self.batch, 1), best], 1)
        renumber = torch.full_like(self.parents, -1).scatter(
            1, kept, torch.arange(count + 1, device=kept.device).expand(self.batch, -1)
        )
        made = TokenTree(self.tokens[:, 0])
        for name in ("tokens", "depth", "valid", "score", "sampled"):
            setattr(made, name, getattr(self, name).gather(1, kept))
        made.grown_as = kept if self.grown_as is None else self.grown_as.gather(1, kept)
        parents = self.parents.gather(1, kept)
        made.parents = torch.where(parents < 0, -1, renumber.gather(1, parents.clamp(min=0)))
        return made
