"""`TokenTree`: a proposal. The only place that knows parent pointers.

A chain, CaPE's comb, a beam and the empty proposal are all values of this type. Rows share node numbers: node n is added
to every row at once, and is padding (`valid` False) where a row has none. So shapes depend on the expansion alone, never
on what was drafted.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from .transfer import to_host


class TokenTree:
    """A batch of token trees in preallocated memory; node 0 is the root, the last emitted token, not yet in the cache.

    Args:
        roots: `(batch,)` tokens.
        capacity: nodes that fit, the root included.

    Attributes:
        nodes: nodes added so far, padding and the root included.
        levels: calls of `add` so far; no node is deeper.
        grown_as: `(batch, nodes)` numbers that the nodes had before `take`; None: they are the first numbers.
        memo: `(batch, any)` int64 that the drafter wants back on the host when the tree was verified; None: nothing.

    >>> tree = TokenTree(torch.tensor([5]), capacity=3)
    >>> a = tree.add(torch.tensor([[0]]), torch.tensor([[7]]), torch.tensor([[-0.1]]))
    >>> b = tree.add(a, torch.tensor([[8]]), torch.tensor([[-0.2]]))
    >>> tree.parents.tolist(), tree.depth.tolist(), tree.path_tokens(0, [0, 1, 2])
    ([[-1, 0, 1]], [[0, 1, 2]], [5, 7, 8])
    """

    def __init__(self, roots: Tensor, capacity: int = 64) -> None:
        batch, device = roots.shape[0], roots.device
        # tokens, parents, depth in one tensor: they are made, gathered and sent to the host together.
        self._numbers = torch.zeros(3, batch, capacity, dtype=torch.long, device=device)
        self._numbers[0, :, 0] = roots
        self._numbers[1, :, 0] = -1
        self._valid = torch.zeros(batch, capacity, dtype=torch.bool, device=device)
        self._valid[:, 0] = True
        self._known_score: Tensor | None = torch.zeros(batch, capacity, device=device)
        # Of a comb, the log-probabilities that its scores are made of when they are asked for.
        self._given: Tensor | None = None
        self._sampled: Tensor | None = None
        own = torch.eye(capacity, dtype=torch.bool, device=device)[None]
        self._ancestors = own if batch == 1 else own.expand(batch, -1, -1).clone()
        self.capacity, self.nodes, self.levels = capacity, 1, 0
        self.grown_as: Tensor | None = None
        self.memo: Tensor | None = None
        # Draft laws that children were drawn from, kept for sampled parents only: (row, node) -> log-law (vocab,)
        self._laws: dict[tuple[int, int], Tensor] = {}

    @classmethod
    def of(cls, numbers: Tensor, valid: Tensor, ancestors: Tensor, levels: int) -> TokenTree:
        """A tree of these tensors themselves: tokens, parents and depths `(3, batch, nodes)`, and the attributes' others."""
        made = object.__new__(cls)
        made._numbers, made._valid, made._ancestors, made._sampled = numbers, valid, ancestors, None
        made._known_score = made._given = None
        made.capacity = made.nodes = numbers.shape[2]
        made.levels, made.grown_as, made.memo, made._laws = levels, None, None, {}
        return made

    @classmethod
    def of_host(
        cls, roots: Tensor, numbers: NDArray[np.int64], valid: NDArray[np.bool_], score: NDArray[np.float32]
    ) -> TokenTree:
        """A tree of numbers on the host, all nodes chosen deterministically: tokens, parents, depths `(3, batch, nodes)`, and
        `valid` and `score` `(batch, nodes)`, arrays of numpy; the roots' tokens may be anything."""
        device, ancestors = roots.device, np.stack([_ancestors(tuple(row)) for row in numbers[1].tolist()])
        arrays = numbers, valid, ancestors, score
        sent = [torch.from_numpy(one).to(device, non_blocking=True) for one in arrays]
        made = cls.of(sent[0], sent[1], sent[2], int(numbers[2].max()))
        made._numbers[0, :, 0] = roots
        made._known_score = sent[3]
        return made

    @property
    def numbers(self) -> Tensor:
        """Tokens, parents and depths, `(3, batch, nodes)`."""
        return self._numbers[:, :, : self.nodes]

    @classmethod
    def comb(cls, roots: Tensor, tokens: Tensor, log_prob: Tensor, valid: Tensor | None = None) -> TokenTree:
        """The tree of one chain a row, each node of it with siblings, all chosen deterministically.

        Args:
            tokens, log_prob: `(batch, depths, width)`; the first of each depth is the chain's, the others are leaves.
            valid: of the same shape, or of width 1 for all of a depth; False: padding. None: all are nodes.
        """
        (batch, depths, width), device = tokens.shape, roots.device
        parents, depth, ancestors, whole = _comb(batch, depths, width, device)
        numbers = torch.stack([torch.cat([roots[:, None], tokens.flatten(1)], 1), parents, depth])
        if valid is not None:
            whole = torch.cat([whole[:, :1], valid.expand(-1, -1, width).flatten(1)], 1)
        made = cls.of(numbers, whole, ancestors, depths)
        made._given = log_prob
        return made

    @property
    def batch(self) -> int:
        return self._valid.shape[0]

    @property
    def tokens(self) -> Tensor:
        """`(batch, nodes)` int64."""
        return self._numbers[0, :, : self.nodes]

    @property
    def parents(self) -> Tensor:
        """`(batch, nodes)` int64; -1 for the root; a parent's number is smaller than its child's."""
        return self._numbers[1, :, : self.nodes]

    @property
    def depth(self) -> Tensor:
        """`(batch, nodes)` int64; the root is 0."""
        return self._numbers[2, :, : self.nodes]

    @property
    def valid(self) -> Tensor:
        """`(batch, nodes)` bool; False is padding."""
        return self._valid[:, : self.nodes]

    @property
    def _score(self) -> Tensor:
        if self._known_score is None:
            assert self._given is not None, "a tree of these tensors has no scores"
            above = self._given[:, :, 0].cumsum(1) - self._given[:, :, 0]
            below = (above[..., None] + self._given).flatten(1)
            self._known_score = torch.cat([below.new_zeros(len(below), 1), below], 1)
        return self._known_score

    @property
    def score(self) -> Tensor:
        """`(batch, nodes)` float; sum of draft log-probabilities from the root."""
        return self._score[:, : self.nodes]

    @property
    def sampled(self) -> Tensor:
        """`(batch, nodes)` bool; True: drawn at random from its parent's draft law. False: chosen deterministically
        (given the shared noise)."""
        if self._sampled is None:
            self._sampled = torch.zeros_like(self._valid)
        return self._sampled[:, : self.nodes]

    @property
    def ancestors(self) -> Tensor:
        """`(batch, nodes, nodes)` bool; [n, m] is True where m is n or an ancestor of n."""
        return self._ancestors[:, : self.nodes, : self.nodes]

    @property
    def num_drafted(self) -> Tensor:
        """Drafted tokens of each row, `(batch,)`: the root and padding do not count."""
        return self.valid.sum(1) - 1

    @property
    def deepest(self) -> Tensor:
        """Largest depth of each row's nodes, `(batch,)`; padding does not count."""
        return (self.depth * self.valid).amax(1)

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
            tokens: `(batch, k)`.
            log_prob: `(batch, k)`; the draft's log-probability of the token given its path.
            valid: `(batch, k)`; None: wherever the parent is a node.
            sampled_from: `(batch, k, vocab)` log-law each token was drawn from; None: chosen deterministically.
        """
        first, last = self.nodes, self.nodes + parents.shape[1]
        assert last <= self.capacity, f"a tree of {self.capacity} nodes has no room for {last}"
        valid = parents >= 0 if valid is None else valid & (parents >= 0)
        at = parents.clamp(min=0)
        self._numbers[0, :, first:last] = tokens
        self._numbers[1, :, first:last] = at
        self._numbers[2, :, first:last] = self._numbers[2].gather(1, at) + 1
        self._valid[:, first:last] = valid
        self._score[:, first:last] = self._score.gather(1, at) + log_prob
        above = self._ancestors[:, :first, :first]
        self._ancestors[:, first:last, :first] = above.gather(1, at[..., None].expand(-1, -1, first))
        self.nodes, self.levels = last, self.levels + 1
        if sampled_from is not None:
            self.sampled[:, first:last] = valid
            for row, column in valid.nonzero().tolist():
                self._laws[row, int(at[row, column])] = sampled_from[row, column]
        numbers = torch.arange(first, last, device=parents.device).expand(self.batch, -1)
        return numbers.masked_fill(~valid, -1)

    def draft_law(self, row: int, node: int) -> Tensor | None:
        """Log-law `(vocab,)` that the sampled children of `node` were drawn from, or None."""
        return self._laws.get((row, node))

    def positions(self, roots: Tensor) -> Tensor:
        """Absolute positions `(batch, nodes)`, given those of the roots `(batch,)`."""
        return roots[:, None] + self.depth

    def children(self, row: int) -> list[list[int]]:
        """For each node of a row its children in the order they were added; padding nodes are never listed."""
        children: list[list[int]] = [[] for _ in range(self.nodes)]
        pairs = zip(self.parents[row].tolist(), self.valid[row].tolist(), strict=True)
        for node, (parent, valid) in enumerate(pairs):
            if valid and parent >= 0:
                children[parent].append(node)
        return children

    def earlier_siblings(self) -> Tensor:
        """`(batch, nodes, nodes)` bool; [n, m] is True where m was added before n, to the same parent, and is no padding."""
        same = self.parents[:, :, None] == self.parents[:, None, :]
        return (same & self.valid[:, None, :]).tril(-1)

    def path_tokens(self, row: int, path: list[int]) -> list[int]:
        return self.tokens[row, path].tolist()

    def origins(self, row: int, path: list[int]) -> list[str]:
        """Of each node after the root of `path`: "chain" if it is its parent's first child, else "sibling"."""
        children = self.children(row)
        return ["chain" if children[above][0] == node else "sibling" for above, node in pairwise(path)]

    def listed(self, row: int) -> tuple[list[int], list[int], list[int], list[float]]:
        """A row's nodes on the host, padding left out, to be shown: their numbers, their tokens, the place in these lists of
        each one's parent (-1 for the root's), and the draft's probability of each token given its path."""
        above = self.parents[row].clamp(min=0)
        given = (self.score[row] - self.score[row, above]).exp()
        numbers = torch.stack([*self.numbers[:2, row].double(), self.valid[row].double(), given.double()])
        tokens, parents, valid, given = to_host(numbers)
        nodes = [node for node in range(self.nodes) if valid[node]]
        place = {-1: -1} | {node: k for k, node in enumerate(nodes)}
        return (
            nodes,
            [int(tokens[node]) for node in nodes],
            [place[int(parents[node])] for node in nodes],
            [given[node] for node in nodes],
        )

    def take(self, kept: Tensor) -> TokenTree:
        """The tree of these nodes `(batch, count)`: ascending numbers, the root first, each node's parent among them."""
        count = kept.shape[1]
        number = torch.arange(count, device=kept.device).expand(self.batch, -1)
        renumbered = torch.full_like(self.parents, -1).scatter(1, kept, number)
        made = TokenTree(self.tokens[:, 0], count)
        made.nodes, made.levels, made.memo = count, self.levels, self.memo
        made._numbers[:] = self._numbers.gather(2, kept.expand(3, -1, -1))
        parents = made._numbers[1]
        made._numbers[1] = torch.where(parents < 0, -1, renumbered.gather(1, parents.clamp(min=0)))
        made._valid[:] = self._valid.gather(1, kept)
        made._known_score = self._score.gather(1, kept)
        rows = self._ancestors.gather(1, kept[..., None].expand(-1, -1, self.capacity))
        made._ancestors[:] = rows.gather(2, kept[:, None].expand(-1, count, -1))
        made.grown_as = kept if self.grown_as is None else self.grown_as.gather(1, kept)
        if self._sampled is not None:
            made._sampled = self._sampled.gather(1, kept)
            made._laws = {(row, int(renumbered[row, node])): law for (row, node), law in self._laws.items()}
        return made

    def keep_best(self, count: int) -> TokenTree:
        """The root and the `count` best-scored nodes of each row, in their order; ties go to the earlier node.

        Raises:
            InputError: a node was sampled. Dropping a drawn token changes the law of the output.
        """
        if self._sampled is not None and bool(self._sampled.any()):
            raise InputError("a tree with sampled nodes cannot be pruned: dropping a drawn token is not lossless")
        score = self.score.masked_fill(~self.valid, float("-inf"))[:, 1:]
        # A child's score never exceeds its parent's, and a stable sort puts the earlier node first: parents stay.
        best = score.sort(dim=1, descending=True, stable=True).indices[:, : min(count, self.nodes - 1)]
        return self.take(torch.cat([best.new_zeros(self.batch, 1), best.sort(1).values + 1], 1))

    def pack(self, count: int) -> TokenTree:
        """The first `count` nodes of each row that are no padding, or all of them and then padding."""
        # Padding sorts last, so a row of fewer nodes ends in padding, whose parents may be cut off: they become the root.
        order = (~self.valid).to(torch.int8).sort(dim=1, stable=True).indices
        packed = self.take(order[:, :count])
        packed._numbers[1, :, 1:].clamp_(min=0)
        return packed


@lru_cache(maxsize=64)
def _comb(batch: int, depths: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """Parents and depths of the nodes of a comb, `(batch, nodes)`, who is whose ancestor, and that no node is padding."""
    number = torch.arange(1 + depths * width)
    depth = (number + width - 1) // width
    parents = (1 + (depth - 2) * width).clamp(min=0)
    parents[0] = -1
    chain = (number == 0) | ((number - 1) % width == 0)
    ancestors = (chain & (depth < depth[:, None])) | (number == number[:, None])
    of_row = parents, depth, ancestors, number >= 0
    return tuple(one.to(device, non_blocking=True).expand(batch, *one.shape).contiguous() for one in of_row)


@lru_cache(maxsize=4096)
def _ancestors(parents: tuple[int, ...]) -> NDArray[np.bool_]:
    """Who is whose ancestor, `(nodes, nodes)` of numpy; a node is its own, the root's parent is -1."""
    found = np.eye(len(parents), dtype=bool)
    for node in range(1, len(parents)):
        found[node] |= found[parents[node]]
    return found
