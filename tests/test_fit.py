"""SVIP's fitted threshold: on rounds written by hand, and on toys whose draft is right exactly where it is sure."""

from __future__ import annotations

import pytest
import torch

from glidecape.drafting.drafter import ModelDrafter, NoDraft
from glidecape.drafting.expansion import Beam, Cape, Chain
from glidecape.drafting.stop import Entropy, FixedLength
from glidecape.errors import InputError
from glidecape.fit import Costs, Recorded, best_threshold, fit_threshold, record, with_fitted_threshold
from glidecape.sampling import SamplingParams
from toys import ToyDraft, ToyTarget, run_checked, scripted_rule

VOCAB = 64
TARGET = ToyTarget(scripted_rule([[n % 50] for n in range(200)], VOCAB), VOCAB)


def moody(context: tuple[int, ...]) -> torch.Tensor:
    """Sure and right, but at every fourth place, where it is wrong and unsure."""
    logits = torch.zeros(VOCAB, dtype=torch.float64)
    if len(context) % 4 == 0:
        logits[63] = 3.0
    else:
        logits[len(context) % 50] = 30.0
    return logits


DRAFT = ToyDraft(moody, VOCAB)
PARAMS = SamplingParams(max_new_tokens=60)


def test_a_round_is_cut_after_the_first_uncertain_depth() -> None:
    one = Recorded((0.1, 0.5, 0.2, 0.7), (1, 2, 3, 4, 5), accepted=3)
    assert [one.length(h) for h in (0.0, 0.1, 0.4, 0.5, 0.6, 0.7)] == [1, 2, 2, 4, 4, 5]


def test_the_best_threshold_by_hand() -> None:
    """Two kinds of rounds. Above 0.2 the second costs 3 draft steps for nothing; below 0.1 the first loses 3 tokens."""
    rounds = [Recorded((0.1, 0.1, 0.1), (1, 2, 3, 4), 4), Recorded((0.25, 0.1, 0.1), (1, 2, 3, 4), 0)]
    fit = best_threshold(rounds, Costs(draft=0.1, node=0.0))
    assert fit.threshold == pytest.approx(0.1)
    # 5 + 1 tokens for 1 + 0.4 and 1 + 0.1
    assert fit.speedup == pytest.approx(6 / 2.5)
    assert (fit.acceptance_length, fit.drafted) == (3.0, 2.5)
    table = dict(fit.table)
    assert table[0.26] == pytest.approx(6 / 2.8)
    assert table[0.0] == pytest.approx(3 / 2.2)
    assert best_threshold(rounds, Costs(0.0, 0.1)).speedup == pytest.approx(6 / 2.5)


def test_drafting_that_costs_nothing_goes_on_and_drafting_that_costs_much_ends_at_once() -> None:
    rounds = record(TARGET, DRAFT, [[0], [0, 1, 2]], PARAMS, cap=8)
    assert best_threshold(rounds, Costs(9.0, 0.0)).threshold == 0.0
    assert best_threshold(rounds, Costs(9.0, 0.0)).drafted == pytest.approx(1.0)
    free = best_threshold(rounds, Costs(0.0, 0.0))
    assert free.speedup == max(s for _, s in free.table) == dict(free.table)[free.table[-1][0]]


@pytest.mark.parametrize("expansion", [Chain(), Cape((2,)), Beam(3)], ids=["chain", "cape", "beam"])
def test_what_is_recorded_are_the_rounds_of_drafts_that_never_stop(expansion) -> None:
    rounds = record(TARGET, DRAFT, [[0]], PARAMS, expansion, cap=6)
    _, events, _ = run_checked(TARGET, ModelDrafter(DRAFT, expansion, FixedLength(6)), [[0]], PARAMS)
    long = [event.stats for event in events][: len(rounds)]
    assert [(r.nodes[-1], r.accepted) for r in rounds] == [(s.drafted, s.accepted) for s in long]
    assert len(rounds) >= len(events) - 2  # the last rounds may have room for one token only


def test_the_fitted_threshold_stops_where_the_draft_is_wrong() -> None:
    fit = fit_threshold(TARGET, DRAFT, [[0], [0, 1, 2]], PARAMS, cap=8, costs=Costs(0.2, 0.02))
    _, events, _ = run_checked(TARGET, ModelDrafter(DRAFT, Chain(), Entropy(fit.threshold, 8)), [[0]], PARAMS)
    assert all(event.stats.drafted - event.stats.accepted <= 1 for event in events), "it drafted on after a wrong token"
    assert sum(event.stats.emitted for event in events) / len(events) > 3.5
    assert fit.acceptance_length > 3.5


def test_costs_are_measured_where_none_are_given() -> None:
    fit = fit_threshold(TARGET, DRAFT, [[0]], PARAMS, cap=4)
    assert fit.costs.draft > 0
    assert fit.costs.node >= 0
    assert fit.speedup > 0


def test_a_drafter_gets_its_fitted_threshold_and_keeps_the_rest() -> None:
    drafter = ModelDrafter(DRAFT, Beam(3), Entropy(0.3, 8, "mean"))
    fitted, fit = with_fitted_threshold(TARGET, drafter, [[0]], PARAMS)
    assert isinstance(fitted.stop, Entropy)
    assert (fitted.stop.threshold, fitted.stop.cap, fitted.stop.over) == (fit.threshold, 8, "mean")
    assert (fitted.model, fitted.expansion) == (drafter.model, drafter.expansion)
    for other in (NoDraft(), ModelDrafter(DRAFT, Chain(), FixedLength(3))):
        with pytest.raises(InputError, match=r"choose a method with \+svip"):
            with_fitted_threshold(TARGET, other, [[0]], PARAMS)


def test_nothing_to_fit_on_is_one_sentence() -> None:
    with pytest.raises(InputError, match="give calibration prompts"):
        fit_threshold(TARGET, DRAFT, [])
    with pytest.raises(InputError, match="at least 3 new tokens"):
        fit_threshold(TARGET, DRAFT, [[0]], SamplingParams(max_new_tokens=1))
