"""Verify: accepted and rejected tokens, residuals and siblings, on numbers small enough to check by eye."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from glidecape.core.params import SamplingParams
from glidecape.core.stats import RoundStats, Stats
from glidecape.core.tree import TokenTree
from glidecape.core.verify import DenseLaw, PointLaw, RandomChance, verify_row
from glidecape.drafting.drafter import ModelDrafter
from glidecape.drafting.expansions.cape import Cape
from glidecape.drafting.expansions.chain import Chain
from glidecape.drafting.stop import FixedLength
from glidecape.engine.decode import decode
from toys import ToyDraft, ToyTarget, run_checked, scripted_rule

P = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
Q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


class Scripted:
    """A `Chance` that gives the answers it was told to and remembers what it was asked."""

    def __init__(self, *answers: bool, draw: int = 0) -> None:
        self.answers, self.drawn = list(answers), draw
        self.asked: list[float] = []
        self.law: list[float] | None = None

    def bernoulli(self, probability: float) -> bool:
        self.asked.append(round(probability, 9))
        return self.answers.pop(0)

    def categorical(self, law: Tensor) -> int:
        self.law = [round(x, 9) for x in law.tolist()]
        return self.drawn


def tree_of(*nodes: tuple[int, int, bool], q: Tensor = Q) -> TokenTree:
    """One row; each node is (parent, token, sampled). Sampled nodes are drawn from `q`."""
    tree = TokenTree(torch.tensor([0]))
    for parent, token, sampled in nodes:
        law = q.log()[None, None] if sampled else None
        tree.add(torch.tensor([[parent]]), torch.tensor([[token]]), torch.zeros(1, 1), sampled_from=law)
    return tree


def dense(node: int) -> DenseLaw:
    return DenseLaw(P)


@pytest.mark.parametrize(("token", "probability"), [(0, 0.25), (1, 0.666666667), (2, 1.0), (3, 1.0)])
def test_a_drawn_token_is_accepted_with_probability_min_1_p_over_q(token: int, probability: float) -> None:
    chance = Scripted(True, draw=3)
    assert verify_row(tree_of((0, token, True)), 0, dense, chance) == ([0, 1], 3)
    assert chance.asked == [probability]
    assert chance.law == [0.1, 0.2, 0.3, 0.4]  # the bonus token of an accepted leaf comes from p itself


def test_a_rejected_drawn_token_leaves_the_residual_of_p_minus_q() -> None:
    chance = Scripted(False, draw=3)
    assert verify_row(tree_of((0, 0, True)), 0, dense, chance) == ([0], 3)
    assert chance.law == [0, 0, 0.25, 0.75]  # relu(p - q) = 0, 0, 0.1, 0.3


@pytest.mark.parametrize(("token", "rest"), [(3, [1 / 6, 2 / 6, 3 / 6, 0]), (0, [0, 2 / 9, 3 / 9, 4 / 9])])
def test_a_deterministic_token_is_a_point_mass(token: int, rest: list[float]) -> None:
    chance = Scripted(False, draw=1)
    assert verify_row(tree_of((0, token, False)), 0, dense, chance) == ([0], 1)
    assert chance.asked == [round(float(P[token]), 9)]
    assert chance.law == [round(x, 9) for x in rest]


def test_a_token_never_drawn_and_never_wanted_is_rejected_for_certain() -> None:
    chance = RandomChance(0)
    law = DenseLaw(torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64))
    for seed in range(20):
        assert verify_row(tree_of((0, 1, True)), 0, lambda node: law, RandomChance(seed)) == ([0], 2)
    assert verify_row(tree_of((0, 1, False), (0, 2, False)), 0, lambda node: law, chance) == ([0, 2], 2)


def test_a_token_outside_the_law_it_claims_to_be_drawn_from_is_rejected_without_asking() -> None:
    q = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64)
    chance = Scripted(draw=3)
    assert verify_row(tree_of((0, 0, True), q=q), 0, dense, chance) == ([0], 3)
    assert chance.asked == []


def test_siblings_are_tried_in_the_order_they_were_added_each_on_what_is_left() -> None:
    tree = tree_of((0, 0, True), (0, 3, False), (0, 2, False))
    chance = Scripted(False, False, False)
    assert verify_row(tree, 0, dense, chance) == ([0], 0)
    # 0.1/0.4; then of (0, 0, 0.25, 0.75) token 3; then of (0, 0, 1, 0) token 2, certain, had chance not lied.
    assert chance.asked == [0.25, 0.75, 1.0]
    chance = Scripted(False, True, draw=1)
    assert verify_row(tree, 0, dense, chance) == ([0, 2], 1)
    chance = Scripted(False, False)
    verify_row(tree_of((0, 1, False), (0, 0, False)), 0, dense, chance)
    assert chance.asked == [0.2, 0.125]
    chance = Scripted(False, False)
    verify_row(tree_of((0, 0, False), (0, 1, False)), 0, dense, chance)
    assert chance.asked == [0.1, round(2 / 9, 9)]


def test_a_second_drawn_sibling_is_tried_against_q_without_the_first() -> None:
    chance = Scripted(False, False, draw=3)
    verify_row(tree_of((0, 0, True), (0, 2, True)), 0, dense, chance)
    # After token 0: p = (0, 0, 1/4, 3/4), q = (0, 3, 2, 1)/6. Token 2: (1/4)/(2/6) = 3/4. Then relu(p - q) is all token 3.
    assert chance.asked == [0.25, 0.75]
    assert chance.law == [0, 0, 0, 1]


def test_an_accepted_sibling_is_walked_down_and_the_rest_is_not_looked_at() -> None:
    tree = tree_of((0, 0, False), (0, 1, False), (1, 2, False), (2, 3, False), (4, 2, False))
    chance, asked = Scripted(False, True, True, True), []

    def law_at(node: int) -> DenseLaw:
        asked.append(node)
        return DenseLaw(P)

    path, _ = verify_row(tree, 0, law_at, chance)
    assert path == [0, 2, 4, 5]
    assert tree.path_tokens(0, path) == [0, 1, 3, 2]
    assert tree.origins(0, path) == ["sibling", "chain", "chain"]
    assert asked == [0, 2, 4, 5]


def test_padding_is_never_accepted() -> None:
    tree = tree_of((0, 3, False), (0, 2, False))
    tree.valid[0, 1] = False
    chance = Scripted(True)
    assert verify_row(tree, 0, dense, chance)[0] == [0, 2]
    assert chance.asked == [0.3]


def test_an_empty_tree_is_ordinary_sampling() -> None:
    chance = Scripted(draw=2)
    assert verify_row(TokenTree(torch.tensor([0])), 0, dense, chance) == ([0], 2)
    assert chance.law == P.tolist()


def test_point_law_makes_verify_plain_matching() -> None:
    wanted = [2, 0, 1, 3, 3]  # after each node
    tree = tree_of((0, 1, False), (0, 2, False), (2, 0, False), (3, 2, False))
    path, bonus = verify_row(tree, 0, lambda node: PointLaw(wanted[node]), RandomChance(0))
    assert (path, bonus) == ([0, 2], 1)
    law = PointLaw(2)
    assert [law.of(token) for token in range(4)] == [0, 0, 1, 0]
    assert law.without(None, 1).draw(RandomChance(0)) == 2


def test_dense_law_keeps_p_when_nothing_is_left() -> None:
    law = DenseLaw(P)
    assert law.without(P.clone(), 1) is law
    one = DenseLaw(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert one.without(None, 1) is one
    assert torch.allclose(law.without(None, 3).p, torch.tensor([1, 2, 3, 0], dtype=torch.float64) / 6)
    assert torch.equal(P, law.p)  # nothing was changed in place


def test_random_chance_is_reproducible_and_seeds_differ() -> None:
    def draws(seed: int) -> list[float]:
        chance = RandomChance(seed)
        return [chance.categorical(P) for _ in range(40)] + [chance.bernoulli(0.5) for _ in range(40)]

    assert draws(5) == draws(5)
    assert draws(-5) == draws(-5)
    assert draws(5) != draws(6)


def test_random_chance_draws_nothing_for_a_certain_answer() -> None:
    one, other = RandomChance(1), RandomChance(1)
    assert one.bernoulli(1.0)
    assert not one.bernoulli(0.0)
    assert [one.categorical(P) for _ in range(20)] == [other.categorical(P) for _ in range(20)]


def test_random_chance_never_draws_a_token_without_probability() -> None:
    law = torch.tensor([0, 0.5, 0, 0.5, 0], dtype=torch.float64)
    chance = RandomChance(2)
    assert {chance.categorical(law) for _ in range(2000)} == {1, 3}


def test_random_chance_has_the_law_it_is_asked_for() -> None:
    """20,000 draws, seed fixed; with fresh seeds each count would leave 5.5 standard errors with probability 4e-8."""
    chance, n = RandomChance(3), 20_000
    counts = torch.tensor([chance.categorical(P) for _ in range(n)]).bincount(minlength=4).double()
    assert (((counts / n - P) / (P * (1 - P) / n).sqrt()).abs() < 5.5).all()
    heads = sum(chance.bernoulli(0.3) for _ in range(n)) / n
    assert abs(heads - 0.3) < 5.5 * (0.3 * 0.7 / n) ** 0.5


# --- counts: a target that emits 1 2 3 4 5 6 7 8 9 10, and drafts that are right at known places


def decode_scripted(draft: list[list[int]], length: int, bins: tuple[int, ...] | None = None) -> tuple[list, Stats]:
    """Greedy, prompt [0], drafts of 3 tokens; `draft[n]` are the draft's choices after n tokens."""
    target = ToyTarget(scripted_rule([[n] for n in range(20)], vocab=32), vocab=32)
    model = ToyDraft(scripted_rule(draft, vocab=32), vocab=32)
    drafter = ModelDrafter(model, Chain() if bins is None else Cape(bins), FixedLength(3))
    stats = Stats()
    params = SamplingParams(max_new_tokens=length)
    events = list(decode(target, drafter, [[0]], params, stats))  # type: ignore[arg-type]
    assert [token for event in events for token in event.tokens] == list(range(1, length + 1))
    return events, stats


RIGHT = [[n] for n in range(20)]


def wrong_at(*places: int, sibling: bool = False) -> list[list[int]]:
    return [([31, n] if sibling else [31]) if n in places else [n] for n in range(20)]


def test_counts_when_the_draft_is_always_right() -> None:
    events, stats = decode_scripted(RIGHT, 8)
    assert [event.stats for event in events] == [RoundStats(3, 3, 4, 3, 3)] * 2
    assert events[0].origins == ["chain", "chain", "chain", "bonus"]
    assert (stats.rounds, stats.acceptance_length, stats.alpha, stats.draft_efficiency) == (2, 4.0, 1.0, 1.0)
    assert stats.lengths == {4: 2}


def test_counts_when_the_draft_is_never_right() -> None:
    events, stats = decode_scripted(wrong_at(*range(20)), 5)
    # Three drafts of 3, then 2 tokens left: a draft of 1 (and its bonus), then 1 left: a draft of 1.
    assert [event.stats for event in events] == [
        RoundStats(3, 0, 1, 1, 3),
        RoundStats(3, 0, 1, 1, 3),
        RoundStats(2, 0, 1, 1, 2),
        RoundStats(1, 0, 1, 1, 1),
        RoundStats(1, 0, 1, 1, 1),
    ]
    assert all(event.origins == ["bonus"] for event in events)
    assert (stats.acceptance_length, stats.alpha, stats.draft_efficiency) == (1.0, 0.0, 0.0)


def test_counts_when_the_draft_is_sometimes_right() -> None:
    """Tokens 3, 4 and 8 are drafted wrong. Rounds: 1 2 x | 3, x | 4, 5 6 7 x cut | 8, 9 10 (11)."""
    events, stats = decode_scripted(wrong_at(3, 4, 8), 10)
    assert [event.tokens for event in events] == [[1, 2, 3], [4], [5, 6, 7, 8], [9, 10]]
    assert [event.stats for event in events] == [
        RoundStats(drafted=3, accepted=2, emitted=3, tested=3, depth=3),
        RoundStats(drafted=3, accepted=0, emitted=1, tested=1, depth=3),
        RoundStats(
            drafted=3, accepted=3, emitted=4, tested=3, depth=3
        ),  # no rejection: all three drafted were accepted
        RoundStats(drafted=1, accepted=1, emitted=2, tested=1, depth=1),  # two tokens left: a draft of one
    ]
    assert (stats.rounds, stats.drafted, stats.accepted, stats.emitted, stats.tested) == (4, 10, 6, 10, 8)
    assert (stats.acceptance_length, stats.alpha, stats.draft_efficiency) == (2.5, 0.75, 0.6)
    assert stats.as_dict()["alpha"] == 0.75
    assert events[-1].finish == "length"


def test_counts_with_an_accepted_sibling() -> None:
    """CaPE of one sibling: token 2 is the draft's second choice, so it is accepted as a leaf and ends the round."""
    events, stats = decode_scripted(wrong_at(2, sibling=True), 6, bins=(1,))
    assert [event.tokens for event in events] == [[1, 2, 3], [4, 5, 6]]
    assert events[0].origins == ["chain", "sibling", "bonus"]
    assert events[0].stats == RoundStats(drafted=6, accepted=2, emitted=3, tested=2, depth=3)
    assert events[1].stats == RoundStats(drafted=4, accepted=2, emitted=3, tested=2, depth=2)
    assert stats.alpha == 1.0


def test_counts_of_nothing_are_zero() -> None:
    stats = Stats()
    assert (stats.acceptance_length, stats.alpha, stats.draft_efficiency, stats.tokens_per_s) == (0, 0, 0, 0)


def test_scripted_decoding_keeps_the_invariants() -> None:
    target = ToyTarget(scripted_rule(RIGHT, vocab=32), vocab=32)
    model = ToyDraft(scripted_rule(wrong_at(2, 5, 6, sibling=True), vocab=32), vocab=32)
    found, _, _ = run_checked(
        target, ModelDrafter(model, Cape((2,)), FixedLength(3)), [[0], [0, 0, 0]], SamplingParams(max_new_tokens=9)
    )
    assert found == [list(range(1, 10)), list(range(3, 12))]
