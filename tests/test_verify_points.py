"""The fast verdict against its specification: `verify_points` on 10,000 random trees is what `verify_row` says of each."""

from __future__ import annotations

import pytest
import torch

from glidecape.core.tree import TokenTree
from glidecape.core.verify import PointLaw, RandomChance, Verdict, verdict_numbers, verify_points, verify_row
from glidecape.drafting.drafter import lone_roots
from glidecape.engine.round import _bonus_alone, _verify_points
from glidecape.errors import UnsupportedError

VOCAB = 3  # so few that siblings often hold the same token, and the target often agrees
ROWS = 50


def random_trees(seed: int, rows: int = ROWS) -> tuple[TokenTree, torch.Tensor]:
    """Trees of 1 to 40 nodes in 1 to 8 calls of `add`, padding in some rows; and the target's choice at each node."""
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator)

    tree = TokenTree(number(0, VOCAB, rows), capacity=41)
    known = torch.zeros(rows, 1, dtype=torch.long)
    for _ in range(int(number(0, 9, 1))):
        width = int(number(1, 6, 1))
        at = number(0, known.shape[1], rows, width)
        parents = known.gather(1, at)  # -1: the child is padding, too
        valid = torch.rand(rows, width, generator=generator) < 0.85
        added = tree.add(parents, number(0, VOCAB, rows, width), torch.zeros(rows, width), valid)
        # Nodes below the newest ones make trees deep.
        known = torch.cat([known, added, added], 1)
    return tree, number(0, VOCAB, rows, tree.nodes)


def path_of(verdict: Verdict, row: int) -> tuple[list[int], int]:
    path = verdict.path[row].tolist()
    length = int(verdict.length[row])
    assert all(node == -1 for node in path[length:])
    assert path[length - 1] == int(verdict.end[row])
    return path[:length], int(verdict.bonus[row])


def disagreements(tree: TokenTree, chosen: torch.Tensor, verdict: Verdict) -> int:
    count = 0
    for row in range(tree.batch):
        tokens = chosen[row].tolist()
        expected = verify_row(tree, row, lambda node, tokens=tokens: PointLaw(tokens[node]), RandomChance(0))
        path, bonus = path_of(verdict, row)
        count += (path, bonus) != expected
        origins = ["chain" if verdict.is_first[row, node] else "sibling" for node in path[1:]]
        count += origins != tree.origins(row, path)
    return count


@pytest.mark.parametrize("part", range(4))
def test_ten_thousand_random_trees_are_verified_as_one_by_one(part: int) -> None:
    lengths = []
    for seed in range(part * 50, part * 50 + 50):  # 4 x 50 batches of 50 rows
        tree, chosen = random_trees(seed)
        verdict = verify_points(tree, chosen)
        assert disagreements(tree, chosen, verdict) == 0, f"seed {seed}"
        lengths += verdict.length.tolist()
    assert len(lengths) == 2500
    assert max(lengths) >= 5
    assert min(lengths) == 1


@pytest.mark.parametrize("count", [1, 3, 41])
def test_a_packed_tree_has_the_verdict_of_the_whole_one(count: int) -> None:
    """Packing renumbers nodes: the path is the same under the numbers that they had."""
    for seed in range(40):
        tree, chosen = random_trees(seed)
        most = max(count, int(tree.valid.sum(1).max()))
        packed = tree.pack(min(most, tree.nodes))
        whole, small = verify_points(tree, chosen), verify_points(packed, chosen.gather(1, packed.grown_as))
        for row in range(tree.batch):
            path, bonus = path_of(small, row)
            assert (packed.grown_as[row, path].tolist(), bonus) == path_of(whole, row)
        assert torch.equal(packed.num_drafted, tree.num_drafted)


def test_ancestors_are_those_that_parent_pointers_give() -> None:
    for seed in range(30):
        tree, _ = random_trees(seed, rows=4)
        for one in (tree, tree.pack(int(tree.valid.sum(1).max()))):
            for row in range(4):
                for node in one.valid[row].nonzero()[:, 0].tolist():
                    above, at = set(), node
                    while at >= 0:
                        above.add(at)
                        at = int(one.parents[row, at])
                    assert set(one.ancestors[row, node].nonzero()[:, 0].tolist()) == above


def test_the_comparison_sees_a_wrong_verdict() -> None:
    """Another bonus token, and origins the wrong way round, are noticed."""
    tree, chosen = random_trees(1)
    right = verify_points(tree, chosen)
    for wrong in (
        Verdict(right.path, right.length, (right.bonus + 1) % VOCAB, right.end, right.is_first),
        Verdict(right.path, right.length, right.bonus, right.end, ~right.is_first),
    ):
        assert disagreements(tree, chosen, wrong) > 0


def test_without_a_proposal_the_bonus_is_what_the_verdict_says() -> None:
    generator = torch.Generator().manual_seed(3)
    for rows in (1, 5):
        tree = lone_roots(torch.randint(0, 9, (rows,), generator=generator))
        scores = torch.randint(0, 4, (rows, 1, 50), generator=generator).float()  # many are equal: the first counts
        asked = list(range(0, rows, 2))
        assert _bonus_alone(scores, asked) == _verify_points(tree, scores, asked, verdict_numbers)
        scores[0, 0, 7] = float("nan")
        with pytest.raises(UnsupportedError):
            _bonus_alone(scores, asked)
        assert _bonus_alone(scores, asked[1:]) == _verify_points(tree, scores, asked[1:], verdict_numbers)
