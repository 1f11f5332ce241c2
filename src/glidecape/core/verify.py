"""Verify: the only place where tokens are accepted, a pure function of a tree, the target's law and chance.

`verify_row` is the specification, and serves laws of many tokens. `verify_points` does the same for a whole batch at once
where every law is a point, greedy or given the shared noise, without leaving the device.

At a node the children are tried in the order they were added. A child drawn from the draft's law q is accepted with
probability min(1, p/q); a child chosen deterministically counts as drawn from a point mass. A rejection leaves the
residual of p. When no child is left the bonus token is drawn from what remains.

With a one-hot law (greedy, or given the shared noise) this is matching, and with an empty tree ordinary sampling.

Source: Leviathan et al. 2023 (chains); SpecInfer and EAGLE (siblings). Exact enumeration in tests/test_exact_law.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .tree import TokenTree

# d comes from its logarithm, which leaves a residual of some 1e-15 even where it equals p.
ROUNDING = 1e-14


class Chance(Protocol):
    """Where randomness comes from; the exactness test enumerates it."""

    def bernoulli(self, probability: float) -> bool:
        """True with this probability."""

    def categorical(self, law: Tensor) -> int:
        """An index drawn with probabilities `law (vocab,)`, which sum to 1."""


class Law(Protocol):
    """The target's law at one node, as verify consumes it."""

    def of(self, token: int) -> float:
        """The probability of a token."""

    def without(self, drawn_from: Tensor | None, token: int) -> Law:
        """The residual after `token` was rejected: normalised relu(p - d), d a point mass if `drawn_from` is None."""

    def draw(self, chance: Chance) -> int:
        """A token drawn from the law."""


class PointLaw:
    """All mass on one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def of(self, token: int) -> float:
        return 1.0 if token == self.token else 0.0

    def without(self, drawn_from: Tensor | None, token: int) -> PointLaw:
        return self  # only other tokens are ever rejected

    def draw(self, chance: Chance) -> int:
        return self.token


class DenseLaw:
    """Probabilities `(vocab,)`, float64."""

    def __init__(self, p: Tensor) -> None:
        self.p = p

    def of(self, token: int) -> float:
        return float(self.p[token])

    def without(self, drawn_from: Tensor | None, token: int) -> DenseLaw:
        if drawn_from is None:
            rest = self.p.clone()
            rest[token] = 0.0
        else:
            rest = (self.p - drawn_from).clamp(min=0.0)
        mass = rest.sum()
        # Nothing left: p equals d, so this rejection has probability 0; keep p as it was.
        return DenseLaw(rest / mass) if mass > ROUNDING else self

    def draw(self, chance: Chance) -> int:
        return chance.categorical(self.p)


def verify_row(tree: TokenTree, row: int, law_at: Callable[[int], Law], chance: Chance) -> tuple[list[int], int]:
    """The accepted path of one row (root first) and its bonus token. `law_at(node)` is asked for reached nodes only."""
    tokens, sampled = tree.tokens[row].tolist(), tree.sampled[row].tolist()
    children = tree.children(row)
    node, path = 0, [0]
    while True:
        p = law_at(node)
        log_q = tree.draft_law(row, node)
        q = None if log_q is None else log_q.double().exp()
        for child in children[node]:
            token = tokens[child]
            drawn_from = q if sampled[child] else None
            d = 1.0 if drawn_from is None else float(drawn_from[token])
            if d > 0 and chance.bernoulli(min(1.0, p.of(token) / d)):
                node, path = child, [*path, child]
                break
            p = p.without(drawn_from, token)
            if drawn_from is not None:
                q = _without(drawn_from, token)
        else:
            return path, p.draw(chance)


@dataclass(frozen=True)
class Verdict:
    """What became of a batch of trees whose laws are points.

    Attributes:
        path: `(batch, levels + 1)` int64, accepted nodes by depth, the root first; -1 past the end.
        length: `(batch,)` nodes of the path, the root included.
        bonus: `(batch,)` bonus tokens.
        end: `(batch,)` last nodes of the paths.
        is_first: `(batch, nodes)` bool, nodes that are their parent's first child.
    """

    path: Tensor
    length: Tensor
    bonus: Tensor
    end: Tensor
    is_first: Tensor


def verify_points(tree: TokenTree, chosen: Tensor) -> Verdict:
    """Accept the path that follows the target's choices, in every row at once.

    Args:
        chosen: `(batch, nodes)` the token on which the law at each node has all its mass.

    Where two children of a node hold the same token the one added first is accepted, as in `verify_row`.
    """
    above = tree.parents.clamp(min=0)
    earlier = tree.earlier_siblings()
    same_token = tree.tokens[:, :, None] == tree.tokens[:, None, :]
    matches = (tree.tokens == chosen.gather(1, above)) & tree.valid & ~(earlier & same_token).any(2)
    matches[:, 0] = True
    accepted = ~(tree.ancestors & ~matches[:, None, :]).any(2)
    end = ((tree.depth + 1) * accepted).argmax(1, keepdim=True)
    on_path = tree.ancestors.gather(1, end[..., None].expand(-1, -1, tree.nodes))[:, 0]
    # Each node of the path goes to the column of its depth, all others to one column more, which is cut off.
    column = tree.depth.masked_fill(~on_path, tree.levels + 1)
    number = torch.arange(tree.nodes, device=chosen.device).expand(tree.batch, -1)
    path = torch.full((tree.batch, tree.levels + 2), -1, device=chosen.device).scatter(1, column, number)[:, :-1]
    length = tree.depth.gather(1, end)[:, 0] + 1
    return Verdict(path, length, chosen.gather(1, end)[:, 0], end[:, 0], ~earlier.any(2))


def verdict_numbers(tree: TokenTree, scores: Tensor) -> Tensor:
    """All that the host wants to know of the verdict on a batch whose laws are points, `(batch, count)` int64.

    Columns: length of the path, bonus token, drafted tokens, deepest depth, was the last node's child rejected, are the scores
    no numbers; then, `levels + 1` columns each, the path, its tokens, whether a node is its parent's first child, and the
    numbers that the nodes had before the tree was packed; then the tree's memo.

    Args:
        scores: `(batch, nodes, vocab)`; a node's law has all its mass on the largest.
    """
    best = scores.max(-1)
    verdict = verify_points(tree, best.indices)
    on_path = verdict.path.clamp(min=0)
    grown = on_path if tree.grown_as is None else tree.grown_as.gather(1, on_path)
    broken = (best.values.isnan().gather(1, on_path) & (verdict.path >= 0)).any(1)  # the largest score is NaN if any is
    rejected = (tree.valid & (tree.parents == verdict.end[:, None])).any(1)
    counts = torch.stack(
        [verdict.length, verdict.bonus, tree.num_drafted, tree.deepest, rejected.long(), broken.long()], 1
    )
    columns = [counts, verdict.path, tree.tokens.gather(1, on_path), verdict.is_first.gather(1, on_path).long(), grown]
    return torch.cat(columns if tree.memo is None else [*columns, tree.memo], 1)


def _without(q: Tensor, token: int) -> Tensor:
    """The draft's law for the next sibling drawn without replacement."""
    rest = q.clone()
    rest[token] = 0.0
    mass = rest.sum()
    return rest / mass if mass > 0 else rest


class RandomChance:
    """The chance of one row: a seeded generator of its own, independent of its neighbours."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)

    def bernoulli(self, probability: float) -> bool:
        if probability >= 1.0 or probability <= 0.0:
            return probability >= 1.0  # certain: nothing is drawn
        return float(torch.rand((), dtype=torch.float64, generator=self.generator)) < probability

    def categorical(self, law: Tensor) -> int:
        mass = law.double().cpu().cumsum(0)
        u = torch.rand((), dtype=torch.float64, generator=self.generator) * mass[-1]
        return int(torch.searchsorted(mass, u, right=True).clamp(max=law.shape[0] - 1))
