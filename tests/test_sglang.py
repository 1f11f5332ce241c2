"""The tensors of GliDe inside SGLang, without SGLang: its rules are written out again here, as its sources describe them."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from glidecape.core.cache import KVCache
from glidecape.core.tree import TokenTree
from glidecape.core.verify import PointLaw, RandomChance, verify_points, verify_row
from glidecape.errors import InputError, UnsupportedError
from glidecape.integrations.sglang.pool import gather
from glidecape.integrations.sglang.trees import VerifyTensors, accepted_paths, verify_tensors
from test_verify_points import path_of, random_trees

ROWS = 25


# --- SGLang's rules, one row after the other


def walk_greedily(made: VerifyTensors, target_predict: torch.Tensor, depths: int):
    """`VerifyTreeGreedy` of SGLang 0.5.23 (eagle.cuh): predict, accept_index and the number of accepted drafts.

    Values that it leaves as they were are 77 here, so that nobody can rely on them.
    """
    rows, nodes = made.retrieve_index.shape
    index, child, sibling = (
        one.tolist() for one in (made.retrieve_index, made.retrieve_next_token, made.retrieve_next_sibling)
    )
    candidates, target = made.draft_token.view(rows, nodes).tolist(), target_predict.flatten().tolist()
    predict, accept_index, counts = [77] * (rows * nodes), [[-1] * depths for _ in range(rows)], []
    for row in range(rows):
        last, count, current = index[row][0], 0, 0
        accept_index[row][0] = last
        for _ in range(1, depths):
            current = child[row][current]
            while current != -1:
                if candidates[row][current] == target[last]:
                    predict[last] = target[last]
                    count += 1
                    last = accept_index[row][count] = index[row][current]
                    break
                current = sibling[row][current]
            if current == -1:
                break
        predict[last] = target[last]
        counts.append(count)
    return torch.tensor(predict), torch.tensor(accept_index), torch.tensor(counts)


def walk_by_chance(child, sibling, candidates, probs, depths: int):
    """`TreeSpeculativeSamplingTargetOnly` (sampling.cuh) with thresholds of 1, for one row: each outcome's probability.

    A coin is uniform and a node of a path has its own, so an interval of coins is as probable as it is long.

    Args:
        probs: `(nodes, vocab)`, the target's.
    """
    found: Counter[tuple[int, ...]] = Counter()

    def step(node: int, tokens: tuple[int, ...], mass: float) -> None:
        accumulated, rejected = 0.0, set()
        current = child[node] if len(tokens) < depths - 1 else -1
        while current != -1:
            token = candidates[current]
            below, accumulated = accumulated, accumulated + probs[node][token]
            if probs[node][token] > 0 and below < 1:
                step(current, (*tokens, token), mass * (min(accumulated, 1.0) - below))
            rejected.add(token)
            current = sibling[current]
        rest = [0.0 if token in rejected else p for token, p in enumerate(probs[node])]
        for token, p in enumerate(rest):
            if p > 0 and accumulated < 1:
                found[(*tokens, token)] += mass * (1 - accumulated) * p / sum(rest)

    step(0, (), 1.0)
    return found


def links_from_mask(mask: torch.Tensor, length: int):
    """`reconstruct_indices_from_tree_mask` for one row: positions, first children, next siblings, by its description."""
    n = len(mask)
    ancestors = [[j for j in range(i) if mask[i, j]] for i in range(n)]
    parent = [max(above, default=-1) for above in ancestors]
    child = [min((k for k in range(i + 1, n) if i in ancestors[k]), default=-1) for i in range(n)]
    sibling = [min((k for k in range(i + 1, n) if parent[k] == parent[i] >= 0), default=-1) for i in range(n)]
    return [len(above) + length for above in ancestors], child, sibling


def tree_masks(made: VerifyTensors, lengths: list[int]) -> list[torch.Tensor]:
    """The rows `(nodes, length + nodes)` of a FULL_MASK."""
    nodes = made.retrieve_index.shape[1]
    parts = made.custom_mask.split([nodes * (length + nodes) for length in lengths])
    return [part.view(nodes, -1) for part in parts]


def ragged(seed: int) -> tuple[TokenTree, torch.Tensor, list[int], int]:
    """Random trees, the target's choices at their nodes, committed tokens, and nodes to pad to."""
    tree, chosen = random_trees(seed, ROWS)
    lengths = torch.randint(0, 9, (ROWS,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tree, chosen, lengths, tree.nodes + seed % 4


def twins() -> VerifyTensors:
    """A root and two children of it with one token."""
    tree = TokenTree(torch.tensor([0]), 3)
    tree.add(torch.tensor([[0, 0]]), torch.tensor([[1, 1]]), torch.zeros(1, 2))
    return verify_tensors(tree, torch.tensor([4]), 3)


# --- trees


@pytest.mark.parametrize("part", range(4))
def test_sglang_s_walk_accepts_what_verify_accepts(part):
    lengths = []
    for seed in range(part * 30, part * 30 + 30):  # 4 x 30 batches of 25 rows
        tree, chosen, committed, nodes = ragged(seed)
        made = verify_tensors(tree, torch.tensor(committed), nodes)
        target = torch.nn.functional.pad(chosen, (0, nodes - tree.nodes), value=1)
        predict, accept_index, drafts = walk_greedily(made, target, tree.levels + 1)
        found = accepted_paths(predict, drafts + 1, accept_index, nodes)
        verdict = verify_points(tree, chosen)
        for row, (path, tokens) in enumerate(found):
            bonus = int(chosen[row, path[-1]])
            assert (path, bonus) == path_of(verdict, row)
            assert tokens == [*tree.path_tokens(row, path[1:]), bonus]
            law = chosen[row].tolist()
            assert (path, bonus) == verify_row(tree, row, lambda node, law=law: PointLaw(law[node]), RandomChance(0))
            lengths.append(len(path))
    assert len(lengths) == 750
    assert max(lengths) >= 5
    assert min(lengths) == 1


def test_the_comparison_sees_siblings_in_another_order():
    """Where two siblings have one token, the path shows which of them was tried first."""
    made = twins()
    swapped = replace(
        made,
        draft_token=torch.tensor([0, 1, 1]),
        retrieve_next_token=torch.tensor([[2, -1, -1]]),
        retrieve_next_sibling=torch.tensor([[-1, -1, 1]]),
    )
    paths = [walk_greedily(one, torch.ones(1, 3, dtype=torch.long), 2)[1].tolist() for one in (made, swapped)]
    assert paths == [[[0, 1]], [[0, 2]]]


def test_a_node_sees_the_committed_tokens_its_ancestors_and_itself():
    for seed in range(12):
        tree, _, committed, nodes = ragged(seed)
        made = verify_tensors(tree, torch.tensor(committed), nodes, committed)
        alone = verify_tensors(tree, torch.tensor(committed), nodes).custom_mask.view(ROWS, nodes, nodes)
        for row, mask in enumerate(tree_masks(made, committed)):
            length = committed[row]
            assert mask[:, :length].all()
            assert torch.equal(mask[:, length:], alone[row])
            child, sibling = made.retrieve_next_token[row].tolist(), made.retrieve_next_sibling[row].tolist()
            reached, waiting = {}, [(0, ())]
            while waiting:  # from the links, which the mask does not use
                node, above = waiting.pop()
                reached[node] = above
                below = child[node]
                while below != -1:
                    waiting.append((below, (*above, node)))
                    below = sibling[below]
            assert all(tree.valid[row, node] for node in reached)
            for node in range(nodes):
                wanted = {*reached.get(node, ()), node}
                assert set(mask[node, length:].nonzero()[:, 0].tolist()) == wanted
                assert made.positions[row * nodes + node] == length + len(reached.get(node, ()))


def test_sglang_makes_the_same_links_and_positions_of_our_mask():
    for seed in range(12):
        tree, _, committed, nodes = ragged(seed)
        made = verify_tensors(tree, torch.tensor(committed), nodes)
        for row, mask in enumerate(made.custom_mask.view(ROWS, nodes, nodes)):
            assert links_from_mask(mask, committed[row]) == (
                made.positions.view(ROWS, nodes)[row].tolist(),
                made.retrieve_next_token[row].tolist(),
                made.retrieve_next_sibling[row].tolist(),
            )


def test_a_tree_of_cape_in_sglang_s_layout():
    """Two rows, five nodes each: 1 with siblings 2 and 3 and a child 4; and a chain of one token, then padding."""
    tokens = torch.tensor([[[11, 12, 13], [14, 15, 16]], [[21, 22, 23], [24, 25, 26]]])
    valid = torch.tensor([[[1, 1, 1], [1, 0, 0]], [[1, 0, 0], [0, 0, 0]]], dtype=torch.bool)
    tree = TokenTree.comb(torch.tensor([10, 20]), tokens, torch.zeros(2, 2, 3), valid).pack(5)
    made = verify_tensors(tree, torch.tensor([2, 1]), 5, [2, 1])
    assert made.draft_token.tolist() == [10, 11, 12, 13, 14, 20, 21, 0, 0, 0]
    assert made.positions.tolist() == [2, 3, 3, 3, 4, 1, 2, 1, 1, 1]
    assert made.retrieve_index.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert made.retrieve_next_token.tolist() == [[1, 4, -1, -1, -1], [1, -1, -1, -1, -1]]
    assert made.retrieve_next_sibling.tolist() == [[-1, 2, 3, -1, -1], [-1, -1, -1, -1, -1]]
    assert [mask.int().tolist() for mask in tree_masks(made, [2, 1])] == [
        [
            [1, 1, 1, 0, 0, 0, 0],
            [1, 1, 1, 1, 0, 0, 0],
            [1, 1, 1, 0, 1, 0, 0],
            [1, 1, 1, 0, 0, 1, 0],
            [1, 1, 1, 1, 0, 0, 1],
        ],
        [
            [1, 1, 0, 0, 0, 0],
            [1, 1, 1, 0, 0, 0],
            [1, 0, 0, 1, 0, 0],
            [1, 0, 0, 0, 1, 0],
            [1, 0, 0, 0, 0, 1],
        ],
    ]


def law_of_first_two(tree, made, row, probs):
    """The law of the first two tokens that SGLang's rule for sampled rows emits."""
    nodes = made.retrieve_index.shape[1]
    by_node = [probs[tuple(tree.path_tokens(row, path_to(tree, row, node))[1:])] for node in range(tree.nodes)]
    links = made.retrieve_next_token, made.retrieve_next_sibling, made.draft_token.view(-1, nodes)
    law: Counter[tuple[int, ...]] = Counter()
    for tokens, p in walk_by_chance(*(one[row].tolist() for one in links), by_node, nodes).items():
        if len(tokens) > 1:
            law[tokens[:2]] += p
        else:  # the rest is plain decoding's
            for token, q in enumerate(probs[tokens]):
                law[(*tokens, token)] += p * q
    return law


def path_to(tree, row, node):
    above = [node]
    while tree.parents[row, above[0]] >= 0:
        above.insert(0, int(tree.parents[row, above[0]]))
    return above


class Probabilities(dict):
    """The target's law after each beginning, made up when it is asked for."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __missing__(self, tokens):
        self[tokens] = torch.rand(3, generator=self.generator, dtype=torch.float64).softmax(0).tolist()
        return self[tokens]


def test_sglang_s_rule_for_sampled_rows_emits_the_target_s_law():
    accepted = 0
    for seed in range(20):
        tree, _, committed, nodes = ragged(seed)
        made = verify_tensors(tree, torch.tensor(committed), nodes)
        for row in range(5):
            probs = Probabilities(100 * seed + row)
            law = law_of_first_two(tree, made, row, probs)
            for tokens, p in law.items():
                assert p == pytest.approx(probs[()][tokens[0]] * probs[tokens[:1]][tokens[1]], abs=1e-12)
            assert sum(law.values()) == pytest.approx(1)
            accepted += int(made.retrieve_next_token[row, 0]) > 0
    assert accepted > 50


def test_a_second_sibling_of_one_token_would_change_that_law():
    """Why `verify_tensors` links only the first: the token's probability would count twice."""
    made, law = twins(), [0.5, 0.3, 0.2]
    both = replace(made, draft_token=torch.tensor([0, 1, 1]), retrieve_next_sibling=torch.tensor([[-1, 2, -1]]))
    for one, wanted in ((made, 0.3), (both, 0.6)):
        links = one.retrieve_next_token[0], one.retrieve_next_sibling[0], one.draft_token
        found = walk_by_chance(*(numbers.tolist() for numbers in links), [law] * 3, 3)
        assert sum(p for tokens, p in found.items() if tokens[0] == 1) == pytest.approx(wanted)


def test_a_tree_with_too_many_nodes_is_refused():
    tree = TokenTree(torch.tensor([0]), 3)
    tree.add(torch.tensor([[0, 0]]), torch.tensor([[1, 2]]), torch.zeros(1, 2))
    with pytest.raises(InputError, match=r"3 nodes does not fit into 2: call tree\.pack\(2\) first"):
        verify_tensors(tree, torch.tensor([0]), 2)
    assert verify_tensors(tree.pack(2), torch.tensor([0]), 2).draft_token.tolist() == [0, 1]


# --- keys and values


def test_gathered_keys_and_values_are_those_of_a_contiguous_cache():
    generator = torch.Generator().manual_seed(0)
    lengths, kv_heads, head_dim = [5, 1, 12], 2, 6
    cache = KVCache([(kv_heads, head_dim)] * 2, len(lengths), 12)
    pools = [tuple(torch.full((41, kv_heads, head_dim), float("nan")) for _ in range(2)) for _ in range(2)]
    # Slots in no order, requests in no order, and slots of others past a row's own.
    free = (1 + torch.randperm(40, generator=generator)).tolist()
    req_to_token = torch.randint(0, 41, (6, 20), generator=generator, dtype=torch.int32)
    requests = torch.tensor([4, 1, 3])
    for layer, pool in enumerate(pools):
        written = torch.randn(2, len(lengths), kv_heads, 12, head_dim, generator=generator)
        cache.write(layer, *written)
        for row, length in enumerate(lengths):
            for token in range(length):
                if layer == 0:
                    req_to_token[requests[row], token] = free.pop()
                slot = int(req_to_token[requests[row], token])
                for buffer, one in zip(pool, written, strict=True):
                    buffer[slot] = one[row, :, token]
    cache.keep([list(range(length)) for length in lengths])
    for layer, pool in enumerate(pools):
        found = gather(pool, req_to_token, requests, max(lengths))
        for one, wanted in zip(found, cache.committed(layer), strict=True):
            assert one.shape == wanted.shape == (3, kv_heads, 12, head_dim)
            for row, length in enumerate(lengths):
                assert torch.equal(one[row, :, :length], wanted[row, :, :length])


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 2, 16, 6), torch.float32), ((48, 2, 6), torch.uint8), ((48, 2, 6), torch.float8_e4m3fn)]
)
def test_pools_of_other_layouts_are_refused(shape, dtype):
    pool = torch.zeros(shape, dtype=dtype)
    with pytest.raises(UnsupportedError, match="a slot a token"):
        gather((pool, pool), torch.zeros(1, 4, dtype=torch.int32), torch.tensor([0]), 2)
