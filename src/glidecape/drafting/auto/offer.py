"""What may be proposed for one row, and the choice of what is: the nodes most probable to be accepted, as many as they are
worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ...core.transfer import to_device, to_host_arrays
from ...core.tree import TokenTree
from .acceptance import Array, OnlineLogistic, drafted_features

LEAST = 0.02  # nodes that are less probable are never worth verifying


@dataclass
class Level:
    """The tokens that the draft ranked at one depth, `(batch, ranked)` each; `x`: their features, `first`: the chain's
    tokens `(batch, 1)`, on the device."""

    first: Tensor
    tokens: Array
    log_q: Array
    p: Array
    x: Array


def levels_of(
    ranked: Sequence[Tensor], depth: int, kinds: Sequence[int], recent: Array, model: OnlineLogistic | None
) -> list[Level]:
    """What the draft ranked at one or more depths from `depth` on.

    Args:
        ranked: tokens, scores, log-probabilities `(batch, depths, ranked)` and entropy `(batch, depths)`.
        kinds: of law, of each row; recent: of each row, how much more was accepted lately than was expected.
        model: tells acceptance; None: the draft's own probabilities are taken for it.
    """
    tokens, scores, log_q, entropy = to_host_arrays(*ranked)
    x = drafted_features(scores, log_q, entropy, depth, recent)
    p = np.exp(log_q) if model is None else np.stack([model.of(kind, x[i]) for i, kind in enumerate(kinds)])
    # Only one token follows a node.
    p = np.minimum(p / np.maximum(1.0, p.sum(2, keepdims=True)), 0.999)
    words, tokens = ranked[0], tokens.astype(np.int64)
    depths = range(words.shape[1])
    return [Level(words[:, k, :1], tokens[:, k], log_q[:, k], p[:, k], x[:, k]) for k in depths]


@dataclass
class Offer:
    """Nodes that may be proposed below a root; a parent stands before its children.

    Attributes:
        tokens, parents: of each node; the root is node 0.
        reach: probability that a node is accepted with all its ancestors; never above its parent's.
        log_q: the draft's log-probability of the token, 0 for a copied one.
        chain: the draft's first choices, depth by depth.
    """

    tokens: list[int] = field(default_factory=lambda: [-1])
    parents: list[int] = field(default_factory=lambda: [-1])
    reach: list[float] = field(default_factory=lambda: [1.0])
    log_q: list[float] = field(default_factory=lambda: [0.0])
    chain: list[int] = field(default_factory=list)

    def add(self, parent: int, token: int, reach: float, log_q: float = 0.0) -> int:
        """Add a node; its number."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.reach.append(min(reach, self.reach[parent]))
        self.log_q.append(log_q)
        return len(self.tokens) - 1

    def copy(self, words: Sequence[int], probability: Sequence[float]) -> None:
        """Add a chain of copied tokens, each with its probability given the one before. Where a node holds the token already,
        the larger of the two probabilities counts."""
        node = 0
        for word, p in zip(words, probability, strict=True):
            above, reach = node, self.reach[node] * p
            pairs = range(above + 1, len(self.tokens))
            node = next((n for n in pairs if self.parents[n] == above and self.tokens[n] == word), -1)
            if node < 0:
                node = self.add(above, word, reach)
            self.reach[node] = max(self.reach[node], reach)

    def best(self) -> list[int]:
        """All nodes but the root, the most probable first; a parent stands before its children."""
        return sorted(range(1, len(self.tokens)), key=lambda node: -self.reach[node])

    def numbered(self, kept: Sequence[int]) -> list[int]:
        """These nodes in the order in which they become nodes of the tree: the most probable path first, since slots of a path
        that is accepted from the first on need not move; then the others, parents before their children."""
        path, node = [], 0
        while below := [one for one in kept if self.parents[one] == node]:
            node = max(below, key=lambda one: self.reach[one])
            path.append(node)
        return path + sorted(set(kept) - set(path))


def offer_of(i: int, levels: Sequence[Level], copied: tuple[list[int], list[float]], cap: int, ranked: int) -> Offer:
    """What may be proposed to a row, its chain first.

    Args:
        i: the row.
        levels: what the draft ranked, by depth.
        copied: tokens, and the probability of each, given the one before.
        cap: depths, most.
        ranked: tokens after a node that are looked at, most.
    """
    offer, parent = Offer(), 0
    for level in levels[:cap]:
        tokens, p, log_q = (one[i, :ranked].tolist() for one in (level.tokens, level.p, level.log_q))
        if log_q[0] == -math.inf:  # nothing may follow
            break
        above = offer.reach[parent]
        first = offer.add(parent, tokens[0], above * p[0], log_q[0])
        for k in range(1, len(tokens)):
            if above * p[k] >= LEAST and log_q[k] > -math.inf:
                offer.add(parent, tokens[k], above * p[k], log_q[k])
        offer.chain.append(first)
        parent = first
    words, chance = copied
    if words:
        offer.copy(words[:cap], chance[:cap])
    return offer


def width_of(orders: Sequence[Sequence[float]], verify: NDArray[np.float64], rate: float) -> int:
    """How many nodes a row to verify: the number that gains most, at this rate, over its cost.

    Args:
        orders: of each row, the reach of its nodes, descending.
        verify: costs of verifying 1, 2, … nodes a row, the root counted.
        rate: tokens that a unit of cost is worth.

    The target runs as many nodes for each row as the widest row has, so all rows get the same number.
    """
    most = min(max(map(len, orders), default=0), len(verify) - 1)
    if most == 0:
        return 0
    gain = np.zeros(most + 1)
    for order in orders:
        own = np.cumsum(order[:most])
        gain[1 : len(own) + 1] += own
        gain[len(own) + 1 :] += own[-1] if len(own) else 0.0
    return int((gain - rate * verify[: most + 1]).argmax())


def copies_gain(chance: NDArray[np.float64], verify: NDArray[np.float64], rate: float) -> float:
    """What copied tokens with these probabilities, each given the one before, would bring over their cost without a draft."""
    if not len(chance):
        return 0.0
    gain = np.cumsum(np.cumprod(chance)) - rate * (verify[1 : len(chance) + 1] - verify[0])
    return max(0.0, float(gain.max()))


def tree_of(
    roots: Tensor, offers: list[Offer], kept: list[list[int]], width: int, levels: int, drafts: bool
) -> TokenTree:
    """The tree below `roots (batch,)` of the nodes that were kept, `width` a row at most.

    Args:
        levels: depths that were drafted; `drafts`: does a draft want to know which of its nodes are in the tree?
    """
    size, padding = 1 + width, [0, 0, 0, 0]
    tokens: list[list[list[int]]] = []
    scores: list[list[float]] = []
    memo: list[list[int]] = []
    for offer, nodes in zip(offers, kept, strict=True):
        place, numbers, score = {0: 0}, [[0, -1, 0, 1]], [0.0]
        for at, node in enumerate(nodes, 1):
            parent = place[offer.parents[node]]
            place[node] = at
            numbers.append([offer.tokens[node], parent, numbers[parent][2] + 1, 1])
            score.append(score[parent] + offer.log_q[node])
        missing = size - len(numbers)
        tokens.append(numbers + [padding] * missing)
        scores.append(score + [0.0] * missing)
        # The chain's nodes but the last were run, each in the scratch slot of its depth; without a draft not even the root.
        run = [0, *(place.get(node, -1) for node in offer.chain[: levels - 1])] if levels else [-1]
        memo.append(run + [-1] * (max(1, levels) - len(run)))
    array = np.array(tokens, dtype=np.int64).transpose(2, 0, 1)
    tree = TokenTree.of_host(roots, array[:3].copy(), array[3] > 0, np.array(scores, dtype=np.float32))
    if drafts:
        tree.memo = to_device(memo, roots.device)
    return tree


def reach_of(p: list[float], depths: int) -> list[float]:
    """The reach of nodes of a chain down to so many depths, from the probabilities of the first; the next are taken to be as
    probable as these were on average.

    >>> reach_of([0.5, 0.5], 3)
    [0.5, 0.25, 0.125]
    """
    reach = np.cumprod(p).tolist()
    mean = reach[-1] ** (1 / len(reach))
    return [*reach, *(reach[-1] * mean**more for more in range(1, 1 + depths - len(reach)))]
