"""EAGLE's trees and Medusa's drafter, on numbers small enough to check by eye or by the obvious way."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from glidecape.core.params import SamplingParams
from glidecape.core.tree import TokenTree
from glidecape.drafting.drafter import ModelDrafter, NoDraft
from glidecape.drafting.expansions.eagle_tree import EagleTree
from glidecape.drafting.expansions.static_tree import StaticTree, static_paths
from glidecape.drafting.law import DraftLaw
from glidecape.drafting.medusa import MedusaDrafter
from glidecape.drafting.stop import Entropy, FixedLength, Heuristic
from glidecape.engine.decode import start
from glidecape.engine.round import run_round
from glidecape.errors import InputError
from toys import Rule, ToyDraft, ToyHeads, ToyTarget, check_invariants, random_rule, run_checked, scripted_rule

Path = tuple[int, ...]


def proposal(expansion, rule: Rule, vocab: int, depth: int, prompts=((0,),), draft=ToyDraft) -> TokenTree:
    target = ToyTarget(scripted_rule([[0]], vocab), vocab)
    drafter = ModelDrafter(draft(rule, vocab), expansion, FixedLength(depth))
    state = start(target, drafter, [list(p) for p in prompts], SamplingParams(max_new_tokens=50))
    return drafter.propose(state)


def paths_of(tree: TokenTree, row: int = 0) -> set[Path]:
    """The tokens below the root that lead to each valid node."""
    found: dict[int, Path] = {0: ()}
    for node in range(1, tree.nodes):
        if tree.valid[row, node]:
            found[node] = (*found[int(tree.parents[row, node])], int(tree.tokens[row, node]))
    return set(found.values()) - {()}


def by_the_paper(rule: Rule, prompt: Path, top: int, total: int, depth: int) -> set[Path]:
    """EAGLE-2 as its paper tells it: every level whole, then all nodes reranked; ties to the shallower node."""
    level: list[tuple[float, Path]] = [(0.0, ())]
    everything: list[tuple[float, Path]] = []
    for _ in range(depth):
        made = []
        for score, path in level:
            log_q = rule(prompt + path).log_softmax(-1)
            made += [(score + float(log_q[token]), (*path, int(token))) for token in log_q.topk(top).indices]
        everything += made
        level = sorted(made, key=lambda node: -node[0])[:top]
    return {path for _, path in sorted(everything, key=lambda node: (-node[0], len(node[1])))[: total - 1]}


@pytest.mark.parametrize(("top", "total", "depth"), [(2, 5, 3), (3, 12, 4), (4, 40, 3), (4, 9, 5), (1, 9, 4)])
@pytest.mark.parametrize("sharpness", [0.5, 2.0, 6.0])
def test_a_tree_is_the_paper_s_though_lost_nodes_are_never_run(top, total, depth, sharpness) -> None:
    rule = random_rule(f"{top}{total}{depth}", 8, sharpness)
    tree = proposal(EagleTree(top, total), rule, 8, depth)
    assert paths_of(tree) == by_the_paper(rule, (0,), top, total, depth)
    assert all(path[:-1] in paths_of(tree) | {()} for path in paths_of(tree))


def test_rows_of_a_batch_have_the_trees_that_they_have_alone() -> None:
    rule, prompts = random_rule("rows", 8, 2.0), [(0,), (3, 1, 2), (5, 5)]
    tree = proposal(EagleTree(3, 10), rule, 8, 4, prompts)
    for row, prompt in enumerate(prompts):
        assert paths_of(tree, row) == by_the_paper(rule, prompt, 3, 10, 4)


def grown(expansion, laws: list[list[list[float]]]) -> TokenTree:
    """A tree grown from probabilities: of each depth those below its frontier nodes."""
    tree, frontier = TokenTree(torch.tensor([9])), torch.tensor([[0]])
    for law in laws:
        law = [*law, *[law[-1]] * (frontier.shape[1] - len(law))]  # the other columns are padding
        logits = torch.tensor([law])[:, : frontier.shape[1]].log()
        frontier = expansion.grow(tree, frontier, DraftLaw(logits, logits, frontier))
    return expansion.finish(tree)


def test_equal_scores_go_to_the_shallower_node_and_a_sure_child_never_outlives_its_parent() -> None:
    """Below a (0.5) everything is sure: its descendants score 0.5 as it does, and so does its sibling b."""
    sure = [1.0, 0.0, 0.0]
    for total, wanted in ((2, {(0,)}), (3, {(0,), (1,)}), (4, {(0,), (1,), (0, 0)}), (5, {(0,), (1,), (0, 0), (1, 0)})):
        tree = grown(EagleTree(3, total), [[[0.5, 0.5, 0.0]], [sure, sure, sure], [sure, sure, sure]])
        assert paths_of(tree) == wanted
    chain = grown(EagleTree(3, 4), [[sure], [sure], [sure]])
    assert paths_of(chain) == {(0,), (0, 0), (0, 0, 0)}
    assert chain.parents.tolist() == [[-1, 0, 1, 2]]
    full, root = EagleTree(3, 2), torch.tensor([[0]])
    tree, law = TokenTree(torch.tensor([9])), torch.tensor([[sure]]).log()
    below = full.grow(tree, root, DraftLaw(law, law, root))
    assert full.grow(tree, below, DraftLaw(law, law, below)).tolist() == [[-1]]  # as good as its parent, and too late


def test_an_unsure_draft_stops_early() -> None:
    """With equal chances 10 of the first depth fill the proposal: no deeper step could add a node."""

    class Counting(ToyDraft):
        steps = 0

        def step(self, *args, **more):
            Counting.steps += 1
            return super().step(*args, **more)

    def flat(context: Path) -> torch.Tensor:
        return torch.zeros(16, dtype=torch.float64)

    tree = proposal(EagleTree(10, 11), flat, 16, 6, draft=Counting)
    assert (tree.nodes, int(tree.depth.max()), Counting.steps) == (11, 1, 2)
    Counting.steps = 0
    assert int(proposal(EagleTree(10, 11), random_rule("sure", 16, 20.0), 16, 6, draft=Counting).depth.max()) == 6
    assert Counting.steps == 6


@pytest.mark.parametrize("expansion", [EagleTree(4, 7), EagleTree(2, 40), StaticTree(3, 9, 4)])
def test_a_draft_keeps_what_it_ran_of_the_accepted_path(expansion) -> None:
    """The draft's second choice is right at every third place, so accepted nodes lie behind pruned ones in its cache."""
    target = ToyTarget(scripted_rule([[n] for n in range(60)], 64), 64)
    model = ToyDraft(scripted_rule([[63, n] if n % 3 == 2 else [n, 62] for n in range(60)], 64), 64)
    drafter = ModelDrafter(model, expansion, FixedLength(4))
    state = start(target, drafter, [[0], [0, 1, 2]], SamplingParams(max_new_tokens=30))
    siblings = 0
    for _ in range(5):
        before = [len(row.tokens) for row in state.rows]
        events = run_round(target, drafter, state)
        check_invariants(state)
        for event, known, trusted in zip(events, before, state.draft.own.host_lengths, strict=True):
            assert event.stats.accepted >= 1
            # The root and every accepted node above the deepest that was run.
            assert trusted >= known + min(event.stats.accepted, 4) - 1
            siblings += "sibling" in event.origins
    assert siblings


def test_pruning_remembers_the_numbers_that_nodes_had() -> None:
    tree = TokenTree(torch.tensor([9]))
    tree.add(torch.tensor([[0, 0, 0]]), torch.tensor([[1, 2, 3]]), torch.tensor([[-1.0, -3.0, -2.0]]))
    tree.add(torch.tensor([[3]]), torch.tensor([[4]]), torch.tensor([[-0.5]]))
    best = tree.keep_best(3)
    assert best.grown_as is not None
    assert best.grown_as.tolist() == [[0, 1, 3, 4]]
    again = best.keep_best(2)
    assert again.grown_as is not None
    assert again.grown_as.tolist() == [[0, 1, 3]]


# --- the static tree


def test_a_static_tree_has_the_best_nodes_of_its_formula() -> None:
    def chance(path: Path) -> float:
        return 0.6 ** len(path) / math.prod((k + 1) ** 2 for k in path)

    for top, total, depth in ((3, 14, 3), (2, 9, 5), (10, 60, 5)):
        paths = static_paths(top, total, depth)
        everything = [p for n in range(1, depth + 1) for p in itertools.product(range(min(top, 6)), repeat=n)]
        if top < 6:
            ranked = sorted(everything, key=lambda path: (-chance(path), len(path), path))
            assert paths == ranked[: total - 1]
        assert len(paths) == len(set(paths)) == total - 1
        assert max(map(len, paths)) <= depth
        for path in paths:  # a node's parent and better siblings are there, too
            assert path[:-1] in [(), *paths]
            assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in paths


def test_a_static_tree_takes_the_choices_of_its_shape() -> None:
    """Choices 0, 1, 2 of a context are its length, and one and two more."""
    rule = scripted_rule([[n, n + 1, n + 2] for n in range(20)], 32)
    tree = proposal(StaticTree(3, 9, 3), rule, 32, 3)
    assert paths_of(tree) == {tuple(1 + i + k for i, k in enumerate(p)) for p in static_paths(3, 9, 3)}
    assert tree.nodes == StaticTree(3, 9, 3).budget(3) == 9
    # Nodes with children that don't come first of their depth; they alone are run.
    wide = proposal(StaticTree(3, 40, 4), rule, 32, 4)
    assert paths_of(wide) == {tuple(1 + i + k for i, k in enumerate(p)) for p in static_paths(3, 40, 4)}
    shallow = proposal(StaticTree(3, 9, 3), rule, 32, 1)
    assert paths_of(shallow) == {path for path in paths_of(tree) if len(path) == 1}
    narrow = proposal(StaticTree(10, 60, 3), scripted_rule([[0, 1]] * 20, 2), 2, 3)
    assert {token for path in paths_of(narrow) for token in path} == {0, 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EagleTree(0, 60), "top of 1 to 64 and a total of 2 to 512 nodes, not 0 and 60"),
        (lambda: EagleTree(10, 1), "not 10 and 1"),
        (lambda: StaticTree(65, 60), "not 65 and 60"),
    ],
)
def test_trees_of_no_or_too_many_nodes_are_refused(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("expansion", [EagleTree(4, 30), EagleTree(8, 9), StaticTree(4, 30, 5)])
def test_a_proposal_and_the_draft_s_slots_stay_within_the_budget(expansion) -> None:
    for rule in (random_rule("flat", 16, 0.5), random_rule("sharp", 16, 6.0)):
        target = ToyTarget(scripted_rule([[0]], 16), 16)
        drafter = ModelDrafter(ToyDraft(rule, 16), expansion, FixedLength(5))
        state = start(target, drafter, [[0]], SamplingParams(max_new_tokens=50))
        assert drafter.propose(state).nodes <= drafter.budget(99)
        assert state.draft.own.scratch <= drafter.budget(99)


# --- SVIP by depth


def test_svip_ends_a_tree_where_the_best_the_mean_or_the_surest_node_is_uncertain() -> None:
    """Below token 0, the likelier one, the draft hesitates; below token 1 it is sure."""

    def rule(context: Path) -> torch.Tensor:
        logits = torch.full((4,), -9.0, dtype=torch.float64)
        if len(context) == 1:
            logits[:2] = torch.tensor([0.5, 0.0])
        else:
            logits[: 2 if context[1] == 0 else 1] = 0.0
        return logits

    def depth(over: str, threshold: float) -> int:
        target = ToyTarget(scripted_rule([[0]], 4), 4)
        drafter = ModelDrafter(ToyDraft(rule, 4), EagleTree(2, 30), Entropy(threshold, 4, over))
        state = start(target, drafter, [[0]], SamplingParams(max_new_tokens=50))
        return int(drafter.propose(state).depth.max())

    # sqrt(0.15 H): 0.315 at the root, 0.32 below token 0, 0.02 below token 1.
    assert {over: depth(over, 0.318) for over in Entropy.OVER} == {"best": 2, "mean": 4, "min": 4}
    assert {over: depth(over, 0.25) for over in Entropy.OVER} == {"best": 1, "mean": 1, "min": 1}


# --- Medusa


def test_heads_decode_what_plain_decoding_does_whatever_the_expansion_and_the_stop_policy() -> None:
    target = ToyTarget(random_rule("target", 5, 3.0), 5)
    prompts = [[0], [1, 2, 3], [4, 4]]
    params = [SamplingParams(temperature=t, seed=i, max_new_tokens=14) for i, t in enumerate((0.0, 1.0, 1.0))]
    plain = [run_checked(target, NoDraft(), [p], [o])[0][0] for p, o in zip(prompts, params, strict=True)]
    for stop in (FixedLength(3), Heuristic(2, 4), Entropy(0.5, 4)):
        drafter = MedusaDrafter(ToyHeads(random_rule("draft", 5, 2.0)), StaticTree(3, 12, 4), stop)
        assert run_checked(target, drafter, prompts, params)[0] == plain


def test_nodes_of_a_depth_follow_that_depth_s_head() -> None:
    """Head d says token d, then token d + 10, whatever was drafted above."""

    def rule(context: Path) -> torch.Tensor:
        logits = torch.full((32,), -9.0, dtype=torch.float64)
        logits[-context[-1]], logits[10 - context[-1]] = 0.0, -1.0
        return logits

    drafter = MedusaDrafter(ToyHeads(rule, max_lag=3), StaticTree(2, 60, 3), FixedLength(8))
    assert drafter.cap == 3
    target = ToyTarget(scripted_rule([[0]], 32), 32)
    state = start(target, drafter, [[7], [7, 7]], SamplingParams(max_new_tokens=50))
    tree = drafter.propose(state)
    assert (
        paths_of(tree)
        == paths_of(tree, 1)
        == {p for n in (1, 2, 3) for p in itertools.product(*[(d, d + 10) for d in range(n)])}
    )
