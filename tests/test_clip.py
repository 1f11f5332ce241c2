"""Nothing after a stop token or past max_new_tokens is emitted, committed or counted, wherever in a path it falls."""

from __future__ import annotations

import pytest

from glidecape.core.params import SamplingParams
from glidecape.core.stats import RoundStats
from glidecape.drafting.drafter import Drafter, ModelDrafter, NoDraft
from glidecape.drafting.expansions.cape import Cape
from glidecape.drafting.expansions.chain import Chain
from glidecape.drafting.stop import FixedLength
from glidecape.engine.decode import generate
from toys import ToyDraft, ToyTarget, random_rule, run_checked, scripted_rule

# The target emits n at place n; 60 is in no text, and the draft's wrong first choice where a sibling is to be accepted.
VOCAB = 64
RIGHT = [[n] for n in range(40)]
SECOND = [[60, n] if n % 3 == 0 else [n] for n in range(40)]
PROMPT = [0, 1]


def target(eos: tuple[int, ...] = ()) -> ToyTarget:
    return ToyTarget(scripted_rule(RIGHT, VOCAB), VOCAB, eos)


METHODS = {
    "plain": NoDraft,
    "chain, always right": lambda: ModelDrafter(ToyDraft(scripted_rule(RIGHT, VOCAB), VOCAB), Chain(), FixedLength(5)),
    "chain, often wrong": lambda: ModelDrafter(ToyDraft(scripted_rule(SECOND, VOCAB), VOCAB), Chain(), FixedLength(5)),
    "cape, siblings accepted": lambda: ModelDrafter(
        ToyDraft(scripted_rule(SECOND, VOCAB), VOCAB), Cape((2,)), FixedLength(5)
    ),
}


def check(method: str, params: SamplingParams, expected: list[int], finish: str, eos: tuple[int, ...] = ()) -> None:
    """Run with all invariants checked each round, and compare tokens, end and counts."""
    drafter: Drafter = METHODS[method]()
    (found,), events, (ended,) = run_checked(target(eos), drafter, [PROMPT], params)
    assert (found, ended) == (expected, finish)
    assert [token for event in events for token in event.tokens] == expected
    assert [event.finish for event in events] == [None] * (len(events) - 1) + [finish]
    for event in events:
        assert event.stats.emitted == len(event.tokens) == len(event.origins) >= 1
        assert event.stats.accepted == sum(origin != "bonus" for origin in event.origins)
        assert event.stats.accepted <= event.stats.tested <= event.stats.accepted + 1


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("method", METHODS)
def test_a_stop_token_at_every_depth_ends_the_row(method: str, k: int) -> None:
    """With a draft that is always right, k = 1 .. 5 are the depths of an accepted path and 6 is the bonus token."""
    check(method, SamplingParams(stop_token_ids=(1 + k,)), list(range(2, 2 + k)), "stop")


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("method", METHODS)
def test_the_end_of_text_token_at_every_depth_ends_the_row(method: str, k: int) -> None:
    params = SamplingParams(max_new_tokens=12)
    check(method, params, list(range(2, 2 + k)), "stop", eos=(1 + k, 50))
    ignoring = SamplingParams(max_new_tokens=12, ignore_eos=True)
    check(method, ignoring, list(range(2, 14)), "length", eos=(1 + k, 50))


@pytest.mark.parametrize("count", range(1, 14))
@pytest.mark.parametrize("method", METHODS)
def test_max_new_tokens_is_met_exactly(method: str, count: int) -> None:
    check(method, SamplingParams(max_new_tokens=count), list(range(2, 2 + count)), "length")


@pytest.mark.parametrize("method", METHODS)
def test_the_first_of_several_stop_tokens_counts(method: str) -> None:
    check(method, SamplingParams(stop_token_ids=(7, 4, 5)), [2, 3, 4], "stop")


@pytest.mark.parametrize("method", METHODS)
def test_a_stop_token_as_last_allowed_token_is_a_stop_and_one_later_is_not(method: str) -> None:
    check(method, SamplingParams(stop_token_ids=(5,), max_new_tokens=4), [2, 3, 4, 5], "stop")
    check(method, SamplingParams(stop_token_ids=(5,), max_new_tokens=3), [2, 3, 4], "length")


@pytest.mark.parametrize("method", METHODS)
def test_a_stop_token_in_the_prompt_ends_nothing(method: str) -> None:
    check(method, SamplingParams(stop_token_ids=(0, 1), max_new_tokens=3), [2, 3, 4], "length")


def test_one_new_token_is_counted_once_even_when_more_were_accepted() -> None:
    """One token left: a draft of one is verified, its token is emitted and the bonus token after it is not."""
    method = "chain, always right"
    _, events, _ = run_checked(target(), METHODS[method](), [PROMPT], SamplingParams(max_new_tokens=1))
    assert [event.stats for event in events] == [RoundStats(drafted=1, accepted=1, emitted=1, tested=1, depth=1)]
    assert events[0].origins == ["chain"]


def test_accepted_tokens_after_a_stop_token_are_not_counted() -> None:
    _, events, _ = run_checked(
        target(), METHODS["chain, always right"](), [PROMPT], SamplingParams(stop_token_ids=(4,))
    )
    assert [event.stats for event in events] == [RoundStats(drafted=5, accepted=3, emitted=3, tested=3, depth=5)]


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_end_at_unequal_times_leave_the_others_alone(method: str) -> None:
    """Ragged prompts; rows end by stop token, by length, or in the middle of a path."""
    prompts = [[0], [0, 1, 2], [0, 1], [0, 1, 2, 3, 4, 5], [0]]
    params = [
        SamplingParams(stop_token_ids=(4,)),
        SamplingParams(max_new_tokens=9),
        SamplingParams(max_new_tokens=1),
        SamplingParams(max_new_tokens=1),
        SamplingParams(stop_token_ids=(14,), max_new_tokens=20),
    ]
    done = generate(target(), prompts, METHODS[method](), params)
    assert [one.tokens for one in done] == [[1, 2, 3, 4], list(range(3, 12)), [2], [6], list(range(1, 15))]
    assert [one.finish for one in done] == ["stop", "length", "length", "length", "stop"]
    found, _, _ = run_checked(target(), METHODS[method](), prompts, params)
    assert found == [one.tokens for one in done]


@pytest.mark.parametrize("sampling", ["noise", "residual"])
def test_sampled_text_is_cut_at_its_first_stop_token(sampling: str) -> None:
    """30 seeds: every row ends with its first stop token, or has all tokens and none."""
    toy = ToyTarget(random_rule("target"))
    drafter = ModelDrafter(ToyDraft(random_rule("target", sharpness=0.8)), Cape((2, 1)), FixedLength(4))
    ends = set()
    for seed in range(30):
        params = SamplingParams(1.0, seed=seed, stop_token_ids=(1,), max_new_tokens=6, sampling=sampling)
        (found,), _, (finish,) = run_checked(toy, drafter, [[2, 0]], params)
        ends.add(finish)
        assert (found.index(1) == len(found) - 1) if finish == "stop" else (1 not in found and len(found) == 6)
        if sampling == "noise":
            (plain,), _, _ = run_checked(toy, NoDraft(), [[2, 0]], params)
            assert found == plain
    assert ends == {"stop", "length"}
