"""Verify on random batches of trees against the rule written down the obvious way, in fractions: the same law of outcomes.

An outcome is an accepted path and a bonus token. The shipped `verify_row` is run through every random choice it can make;
the obvious one multiplies fractions along the way.
"""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glidecape.core.tree import TokenTree
from glidecape.core.verify import DenseLaw, verify_row
from toys import EnumeratingChance

VOCAB = 4
Weights = list[int]
Outcome = tuple[tuple[int, ...], int]


def normalised(weights: list[Fraction]) -> list[Fraction] | None:
    total = sum(weights)
    return [w / total for w in weights] if total > 0 else None


def fractions(weights: Weights) -> list[Fraction]:
    made = normalised([Fraction(w) for w in weights])
    assert made is not None
    return made


class Node:
    """A tree as people draw it: a token, how it was chosen, children in order."""

    def __init__(self, number: int, token: int, sampled: bool) -> None:
        self.number, self.token, self.sampled = number, token, sampled
        self.children: list[Node] = []


def obvious(root: Node, p_of: dict[int, Weights], q_of: dict[int, Weights]) -> Counter[Outcome]:
    """The law of (path, bonus) by the rule: try children in order, each on what is left; then draw from what is left."""
    law: Counter[Outcome] = Counter()

    def walk(node: Node, path: tuple[int, ...], reach: Fraction) -> None:
        p, q = fractions(p_of[node.number]), fractions(q_of[node.number])
        for child in node.children:
            x = child.token
            d = q if child.sampled else [Fraction(t == x) for t in range(VOCAB)]
            accept = min(Fraction(1), p[x] / d[x]) if d[x] else Fraction(0)
            if accept:
                walk(child, (*path, child.number), reach * accept)
            reach *= 1 - accept
            p = normalised([max(Fraction(0), a - b) for a, b in zip(p, d, strict=True)]) or p
            if child.sampled:
                q = normalised([w if t != x else Fraction(0) for t, w in enumerate(q)]) or q
        for token in range(VOCAB):
            if reach * p[token]:
                law[path, token] += reach * p[token]  # type: ignore[assignment]

    walk(root, (0,), Fraction(1))
    return law


weights = st.lists(st.integers(0, 4), min_size=VOCAB, max_size=VOCAB).filter(any)


@st.composite
def batches(draw: st.DrawFn) -> tuple[TokenTree, list[Node], list[dict[int, Weights]], list[dict[int, Weights]]]:
    """Rows with trees of their own, padded to one number of nodes; laws of the target and the draft at each node."""
    rows = draw(st.integers(1, 3))
    count = draw(st.integers(0, 6))
    laws = st.lists(weights, min_size=count + 1, max_size=count + 1)
    target, draft = ([dict(enumerate(draw(laws))) for _ in range(rows)] for _ in "pq")
    tree = TokenTree(torch.zeros(rows, dtype=torch.long))
    nodes = [{0: Node(0, 0, False)} for _ in range(rows)]
    for number in range(1, count + 1):
        sampled = draw(st.booleans())
        parents, tokens = [], []
        for known in nodes:
            parent = draw(st.sampled_from([-1, *known]))
            taken = {child.token for child in known[parent].children} if parent >= 0 else set()
            free = [token for token in range(VOCAB) if token not in taken]
            parents.append(parent if free else -1)
            tokens.append(draw(st.sampled_from(free)) if free else 0)
            if parents[-1] >= 0:
                known[number] = Node(number, tokens[-1], sampled)
                known[parent].children.append(known[number])
        logs = [[fractions(q[max(0, parent)])] for q, parent in zip(draft, parents, strict=True)]
        drawn_from = torch.tensor([[[float(x) for x in law] for law in row] for row in logs], dtype=torch.float64).log()
        at, one = torch.tensor(parents)[:, None], torch.tensor(tokens)[:, None]
        tree.add(at, one, torch.zeros(rows, 1), sampled_from=drawn_from if sampled else None)
    return tree, [known[0] for known in nodes], target, draft


def shipped(tree: TokenTree, row: int, p_of: dict[int, Weights]) -> Counter[Outcome]:
    law: Counter[Outcome] = Counter()
    script: list[int] | None = []
    while script is not None:
        chance = EnumeratingChance(script)
        at = {n: torch.tensor([float(x) for x in fractions(w)], dtype=torch.float64) for n, w in p_of.items()}
        path, bonus = verify_row(tree, row, lambda node, at=at: DenseLaw(at[node]), chance)
        law[tuple(path), bonus] += chance.weight  # type: ignore[assignment]
        script = chance.next_script()
    return law


def check(case: tuple[TokenTree, list[Node], list[dict[int, Weights]], list[dict[int, Weights]]]) -> None:
    tree, roots, target, draft = case
    for row, root in enumerate(roots):
        right, found = obvious(root, target[row], draft[row]), shipped(tree, row, target[row])
        for outcome in {*right, *found}:
            assert abs(float(right[outcome]) - found[outcome]) < 1e-12, (row, outcome)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(batches())
def test_random_trees_have_the_outcomes_of_the_obvious_rule(case) -> None:
    check(case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=10_000, deadline=None)
@given(batches())
def test_ten_thousand_random_trees_have_the_outcomes_of_the_obvious_rule(case) -> None:
    check(case)


def test_no_law_is_made_of_rounding_errors() -> None:
    """p equals q, which the tree holds as logarithms, so a rejection leaves nothing; q could not draw this token."""
    law = torch.tensor([4 / 9, 0.0, 4 / 9, 1 / 9], dtype=torch.float64)
    tree = TokenTree(torch.zeros(1, dtype=torch.long))
    tree.add(torch.tensor([[0]]), torch.tensor([[1]]), torch.zeros(1, 1), sampled_from=law.log()[None, None])
    assert (law - law.log().exp()).clamp(min=0).sum() > 0
    weights = {0: [4, 0, 4, 1], 1: [1, 1, 1, 1]}
    root = Node(0, 0, False)
    root.children.append(Node(1, 1, True))
    check((tree, [root], [weights], [weights]))


def test_a_wrong_residual_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check sees faults: p minus q where it should be p minus the point mass."""
    right = DenseLaw.without
    monkeypatch.setattr(
        DenseLaw, "without", lambda self, d, token: right(self, self.p.flip(0) if d is None else d, token)
    )
    with pytest.raises(AssertionError):
        test_random_trees_have_the_outcomes_of_the_obvious_rule()
