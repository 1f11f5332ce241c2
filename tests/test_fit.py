"""SVIP's fitted threshold: on rounds written by hand, and on toys whose draft is right exactly where it is sure."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from glidecape import fit as fit_module
from glidecape.core.params import NOISE, RESIDUAL, SamplingParams
from glidecape.core.stats import Stats
from glidecape.costmodel import RoundCosts
from glidecape.drafting.drafter import ModelDrafter, NoDraft
from glidecape.drafting.expansions.beam import Beam
from glidecape.drafting.expansions.cape import Cape
from glidecape.drafting.expansions.chain import Chain
from glidecape.drafting.stop import Entropy, FixedLength
from glidecape.errors import InputError
from glidecape.fit import best_threshold, fit_threshold, record, with_fitted_threshold
from glidecape.replay import Recorded, replay
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
    """A text of six tokens. Above 0.2 the last round costs 3 draft steps for nothing; below 0.1 the first one becomes three."""
    sure, unsure = Recorded((0.1, 0.1, 0.1), (1, 2, 3, 4), 4), Recorded((0.25, 0.1, 0.1), (1, 2, 3, 4), 0)
    never = Recorded((9.0, 9.0, 9.0), (1, 2, 3, 4), 0)
    text = [sure, never, Recorded((0.1,), (1, 2), 1), never, Recorded((0.1,), (1, 2), 0), unsure]
    fit = best_threshold([text], RoundCosts.linear(draft=0.1, node=0.0))
    assert fit.threshold == pytest.approx(0.1)
    # Rounds at 0 and 5: 5 + 1 tokens for 1 + 0.4 and 1 + 0.1.
    assert fit.speedup == pytest.approx(6 / 2.5)
    assert (fit.acceptance_length, fit.drafted) == (3.0, 2.5)
    table = dict(fit.table)
    assert table[0.26] == pytest.approx(6 / 2.8)
    assert table[0.0] == pytest.approx(6 / 4.4)  # rounds at 0, 2, 4 and 5, of one depth each
    assert best_threshold([text], RoundCosts.linear(0.0, 0.1)).speedup == pytest.approx(6 / 2.5)
    assert best_threshold([text], RoundCosts.linear(0.1, 0.0, start=0.5)).speedup == pytest.approx(6 / 3.5)
    assert best_threshold([text, text], RoundCosts.linear(0.1, 0.0)).speedup == pytest.approx(6 / 2.5)


def test_drafting_that_costs_nothing_goes_on_and_drafting_that_costs_much_ends_at_once() -> None:
    rounds = record(TARGET, DRAFT, [[0], [0, 1, 2]], PARAMS, cap=8)
    assert best_threshold(rounds, RoundCosts.linear(9.0, 0.0)).threshold == 0.0
    assert best_threshold(rounds, RoundCosts.linear(9.0, 0.0)).drafted == pytest.approx(1.0)
    free = best_threshold(rounds, RoundCosts.linear(0.0, 0.0))
    best = max(s for _, s in free.table)
    assert best == dict(free.table)[free.table[-1][0]]
    near = [(t, s) for t, s in free.table if s >= 0.99 * best]
    assert (free.threshold, free.speedup) == near[0]


@pytest.mark.parametrize("expansion", [Chain(), Cape((2,)), Beam(3)], ids=["chain", "cape", "beam"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_from_the_record_follow_the_rounds_of_any_threshold(expansion, temperature) -> None:
    """Walk the record as the fit does, and decode with that threshold: the same rounds, to their end."""
    params = replace(PARAMS, temperature=temperature, seed=3)
    (text,) = record(TARGET, DRAFT, [[0]], params, expansion, cap=6)
    assert len(text) == 60
    lengths = set()
    for threshold in (0.0, 0.3, 0.6, 99.0):
        _, events, _ = run_checked(TARGET, ModelDrafter(DRAFT, expansion, Entropy(threshold, 6)), [[0]], params)
        rounds = replay(text, lambda draft, h=threshold: draft.length(h))
        walked = [(one.nodes[-1], one.accepted) for one in rounds]
        assert walked == [(event.stats.drafted, event.stats.accepted) for event in events]
        lengths.add(len(walked))
    assert len(lengths) > 1, "the thresholds made no difference"


def test_under_the_residual_rule_the_record_is_that_of_shared_noise() -> None:
    made = [
        record(TARGET, DRAFT, [[0]], replace(PARAMS, temperature=1.0, seed=3, sampling=sampling), cap=4)
        for sampling in (RESIDUAL, NOISE)
    ]
    assert made[0] == made[1]


def test_the_fitted_threshold_stops_where_the_draft_is_wrong() -> None:
    fit = fit_threshold(TARGET, DRAFT, [[0], [0, 1, 2]], PARAMS, cap=8, costs=RoundCosts.linear(0.2, 0.02))
    _, events, _ = run_checked(TARGET, ModelDrafter(DRAFT, Chain(), Entropy(fit.threshold, 8)), [[0]], PARAMS)
    assert all(event.stats.drafted - event.stats.accepted <= 1 for event in events), "it drafted on after a wrong token"
    assert sum(event.stats.emitted for event in events) / len(events) > 3.5
    assert fit.acceptance_length > 3.5


def test_costs_are_measured_where_none_are_given() -> None:
    fit = fit_threshold(TARGET, DRAFT, [[0]], PARAMS, cap=4)
    assert 0 <= fit.costs.draft < 100  # microseconds beside noise: on a busy machine the line may be flat
    assert fit.costs.verify(2) >= 1
    assert fit.costs.start >= 0
    assert fit.speedup > 0


def test_costs_lie_on_the_lines_through_short_and_long_drafts() -> None:
    plain = Stats(rounds=10, emitted=10, total_s=10.0)
    # A round of the short one: 0.3 for 1 depth, 1.1 for 2 nodes. Of the long one: 0.7 for 5, 1.3 for 10.
    short = Stats(rounds=4, drafted=8, depths=4, draft_s=1.2, total_s=5.6)
    long = Stats(rounds=2, drafted=20, depths=10, draft_s=1.4, total_s=4.0)
    draft, node, begin = fit_module._from_timed(plain, short, long)
    assert (draft, node) == (pytest.approx(0.1), pytest.approx(0.025))
    costs = RoundCosts.linear(draft, node, begin)
    assert costs.start == pytest.approx(0.2 + 0.05)
    assert costs.of(1, 2) == pytest.approx(1.4)
    assert costs.of(5, 10) == pytest.approx(2.0)
    one = RoundCosts.linear(*fit_module._from_timed(plain, short, short))
    assert one.of(1, 2) == pytest.approx(1.4)


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
