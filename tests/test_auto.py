"""`auto`: its prices, its estimates, and what it makes of them; its losslessness is enumerated in test_exact_law.py."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import glidecape
from glidecape import MethodOptions, SamplingParams, Target, costs, generate, load_draft, make_drafter
from glidecape.core.stats import Stats
from glidecape.costmodel import Prices
from glidecape.costs import measured_prices, prices_of
from glidecape.disturbance import Share
from glidecape.drafting.auto.acceptance import OnlineLogistic
from glidecape.drafting.auto.drafter import DEPTH, AutoDrafter
from glidecape.drafting.auto.offer import Offer, width_of
from glidecape.drafting.auto.rate import LONGEST, RARELY, TRIED, Settled, Worth
from glidecape.drafting.auto.reliability import Bin, Offered, calibration_error
from glidecape.drafting.auto.timing import COPIES, MEMORY, PLAIN, WHOLE, Timing
from glidecape.drafts.glide.adapter import GlideDraft
from glidecape.drafts.glide.config import GlideConfig
from glidecape.drafts.glide.network import GlideModel
from glidecape.engine.decode import decode
from glidecape.errors import InputError
from glidecape.interface.load import WORTH, prepared, set_prices
from glidecape.target.packages import FOLDER
from glidecape.timed import forgotten_round, unread_batch

CHEAP = Prices((1,), (1,), (1, 31), (((1.0, 1.3),),), ((0.05,),), ((0.02,),))
DEAR = Prices((1,), (1,), (1, 31), (((1.0, 31.0),),), ((1.0,),), ((0.5,),))
PROMPTS = [[5, 9, 13, 40], [7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17], [3]]


@pytest.fixture(scope="module")
def target(world) -> Target:
    return Target.from_pretrained(world["target"])


def auto(target: Target, world, prices: Prices | None = None, base: str = "glide") -> AutoDrafter:
    made = make_drafter(f"{base}+auto", None if base == "lookup" else load_draft(world[base], target))
    assert isinstance(made, AutoDrafter)
    if prices is not None:
        made.set_prices([prices, prices])
    return made


@pytest.mark.parametrize("base", ["glide", "eagle", "medusa", "lookup"])
@pytest.mark.parametrize("prices", [CHEAP, DEAR], ids=["cheap", "dear"])
def test_text_is_plain_decoding_s_in_a_mixed_batch(target, world, base: str, prices: Prices) -> None:
    params = [
        SamplingParams(max_new_tokens=40, ignore_eos=True),
        SamplingParams(1.0, seed=3, max_new_tokens=40, ignore_eos=True),
        SamplingParams(0.8, seed=4, top_p=0.9, repetition_penalty=1.2, max_new_tokens=40, ignore_eos=True),
    ]
    drafter = auto(target, world, prices, base)
    for _ in range(2):  # what it has learned changes its proposals, and no text
        found = generate(target, PROMPTS, drafter, params)
        assert [one.tokens for one in found] == [one.tokens for one in generate(target, PROMPTS, None, params)]


def drafted(target: Target, drafter: AutoDrafter, tokens: int = 60) -> Stats:
    stats = Stats()
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    for _ in decode(target, drafter, PROMPTS[:1], params, stats):
        pass
    return stats


def test_prices_decide_how_much_is_proposed(target, world) -> None:
    cheap, dear = (drafted(target, auto(target, world, prices)) for prices in (CHEAP, DEAR))
    assert cheap.drafted > 2 * dear.drafted
    assert cheap.rounds < dear.rounds


def test_a_hopeless_draft_is_asked_ever_more_rarely(target) -> None:
    """An untrained one: what it proposes is never right, so it soon runs once in 24 rounds, and nothing is verified."""
    draft = GlideDraft(GlideModel.new(GlideConfig.for_target(target), target).serve())
    drafter = make_drafter("glide+auto", draft)
    assert isinstance(drafter, AutoDrafter)
    drafter.copying = False
    drafter.set_prices([Prices((1,), (1,), (1, 31), (((1.0, 2.5),),), ((0.25,),), ((0.2,),))] * 2)
    drafted(target, drafter, 100)
    asked: list[int] = []
    step = drafter.runner.first_step
    drafter.runner.first_step = lambda *args: asked.append(1) or step(*args)  # type: ignore[method-assign]
    late = drafted(target, drafter, 100)
    assert late.rounds >= 95
    assert len(asked) <= 8
    assert late.drafted <= 12


def test_a_settled_choice_is_thought_about_every_fourth_round(target, world, monkeypatch) -> None:
    """And a hopeless draft is asked in every 24th round all the same."""
    draft = GlideDraft(GlideModel.new(GlideConfig.for_target(target), target).serve())
    drafter = make_drafter("glide+auto", draft)
    assert isinstance(drafter, AutoDrafter)
    drafter.set_prices([Prices((1,), (1,), (1, 31), (((1.0, 2.5),),), ((0.25,),), ((0.2,),))] * 2)
    drafter.copying = False
    drafted(target, drafter, 120)
    thoughts, rounds, asked = [0], [0], [0]

    def counting(name: str, times: list[int], of: Any) -> None:
        whole = getattr(of, name)

        def counted(*args: Any) -> Any:
            times.append(rounds[0])
            return whole(*args)

        monkeypatch.setattr(of, name, counted)

    counting("_costs_of", thoughts, drafter)
    counting("_draft", asked, drafter)
    commit = drafter.commit
    monkeypatch.setattr(drafter, "commit", lambda *args: (rounds.append(rounds.pop() + 1), commit(*args)))
    late = drafted(target, drafter, 120)
    assert len(thoughts) < late.rounds / 2
    assert 4 <= len(asked) <= 10
    assert max(b - a for a, b in pairwise(asked)) <= LONGEST + 1


def test_in_a_batch_chains_that_do_not_pay_are_tried_ever_more_rarely(target, world, monkeypatch) -> None:
    """No text changes by it, and chains that pay again are found."""
    prompts, drafter, tried = PROMPTS * 2, auto(target, world, CHEAP), list[bool]()
    priced = {"sizes": (1, 31), "verify": (((1.0, 2.5),),), "draft": ((1.0,),), "start": ((1.0,),), "lengths": (2,)}
    never, cheap = ([Prices((1,), (1,), **priced, chains=(((cost,),),))] * 2 for cost in (2.5, 0.01))
    drafter.set_prices(never)
    drafter.copying = False
    learn = drafter._learn
    monkeypatch.setattr(
        drafter, "_learn", lambda batch, plan, outcomes: (tried.append(plan.chain), learn(batch, plan, outcomes))
    )
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature, seed=3, max_new_tokens=90, ignore_eos=True)
        found = generate(target, prompts, drafter, params)
        assert [one.tokens for one in found] == [one.tokens for one in generate(target, prompts, None, params)]
    rounds = [i for i, chain in enumerate(tried) if chain]
    starts = [b - a for a, b in pairwise(rounds) if b > a + 1]
    assert len(rounds) <= 4 * TRIED
    assert starts == sorted(starts)
    assert len(starts) >= 2
    drafter.set_prices(cheap)
    tried.clear()
    generate(target, prompts, drafter, SamplingParams(max_new_tokens=120, ignore_eos=True))
    assert sum(tried) > 10


@pytest.mark.parametrize("slow", [False, True])
def test_chains_that_take_longer_than_their_price_are_left(target, world, monkeypatch, slow: bool) -> None:
    """In a batch, on a machine on which chains take three times their price. The text is plain decoding's in any case."""
    prompts, drafter = PROMPTS * 2, auto(target, world)
    # A chain of 2 costs a half more than a plain round, so that it pays if a half of each depth is accepted.
    priced = {"sizes": (1, 31), "verify": (((1.0, 1.3),),), "draft": ((3.0,),), "start": ((3.0,),)}
    drafter.set_prices([Prices((1,), (1,), **priced, lengths=(2,), chains=(((0.5,),),))] * 2, timed=True)
    drafter.copying = False
    drafter._had_chain, now, chains = True, [0.0], list[bool]()
    drafter.timing.clock = lambda: now[0]
    note = drafter.timing.note

    def noted(place: tuple[int, int], sort: str, cost: float) -> None:
        chains.append(sort == WHOLE)
        now[0] += (4.5 if slow else 1.5) if sort == WHOLE else 1.0
        note(place, sort, cost)

    monkeypatch.setattr(drafter.timing, "note", noted)
    monkeypatch.setattr(drafter.depths, "gain", lambda kinds, depths, usual=False: 0.45 * depths * len(kinds))
    params = SamplingParams(max_new_tokens=120, ignore_eos=True)
    found = generate(target, prompts, drafter, params)
    assert [one.tokens for one in found] == [one.tokens for one in generate(target, prompts, None, params)]
    assert (sum(chains[20:]) < len(chains[20:]) / 4) == slow
    assert any(chains)


def test_a_row_alone_is_priced_as_measured(target, world) -> None:
    drafter = auto(target, world)
    drafter.set_prices([CHEAP] * 2, timed=True)
    generate(target, PROMPTS[:1], drafter, SamplingParams(max_new_tokens=48, ignore_eos=True))
    assert not drafter.timing._places
    generate(target, PROMPTS[:2], drafter, SamplingParams(max_new_tokens=48, ignore_eos=True))
    assert (0, 2) in drafter.timing._places
    assert (0, 1) not in drafter.timing._places


class Clock:
    """A `Timing` whose rounds of two rows take as long as they are told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timing = Timing(lambda: self.now)

    def rounds(self, sort: str, seconds: float, times: int) -> None:
        for _ in range(times):
            self.timing.begin()
            self.now += seconds
            self.timing.note((0, 2), sort, self.timing.of((0, 2), sort))


def test_one_slow_round_and_a_machine_that_slows_down_change_no_correction() -> None:
    clock = Clock()
    timing, rounds = clock.timing, clock.rounds
    assert timing.wants_plain((0, 2))
    rounds(WHOLE, 9.0, 9)  # nothing is known of plain rounds
    assert timing.of((0, 2), WHOLE) == 1.0
    rounds(PLAIN, 1.0, 5)
    assert not timing.wants_plain((0, 2))
    rounds(WHOLE, 1.0, 5)
    rounds(WHOLE, 60.0, 2)
    assert timing.of((0, 2), WHOLE) == 1.0
    rounds(WHOLE, 1.5, 8)
    assert 1.45 < timing.of((0, 2), WHOLE) <= 1.5
    rounds(PLAIN, 90.0, 2)
    rounds(PLAIN, 2.0, 40)
    rounds(COPIES, 2.0, 40)
    assert 0.95 < timing.of((0, 2), COPIES) < 1.1
    assert timing.of((0, 3), WHOLE) == 1.0  # another number of rows
    rounds(COPIES, 2.0, MEMORY)
    assert timing.wants_plain((0, 2))


def test_plain_rounds_right_after_chains_are_no_measure_of_plain_rounds() -> None:
    """The draft has driven the target's weights out of the CPU's cache."""
    clock = Clock()
    timing, rounds = clock.timing, clock.rounds
    for _ in range(30):
        rounds(PLAIN, 1.5, 2)
        rounds(WHOLE, 1.5, 20)
    assert timing.wants_plain((0, 2))
    assert timing.of((0, 2), WHOLE) == 1.0
    rounds(PLAIN, 1.5, 2)
    rounds(PLAIN, 1.0, 3)
    assert not timing.wants_plain((0, 2))
    rounds(WHOLE, 1.5, 8)
    assert 1.45 < timing.of((0, 2), WHOLE) <= 1.5
    # After long the machine may run at another speed: what plain rounds took then is forgotten.
    rounds(WHOLE, 3.0, MEMORY)
    rounds(PLAIN, 2.0, 3)
    assert timing.wants_plain((0, 2))
    rounds(PLAIN, 2.0, 2)
    rounds(WHOLE, 3.0, 9)
    assert 1.4 < timing.of((0, 2), WHOLE) < 1.6


def test_a_batch_in_which_nothing_pays_rests_for_15_rounds_and_a_row_alone_for_3() -> None:
    def rested(rows: int, choice: tuple[int, float]) -> int:
        settled = Settled()
        for thought in range(40):
            settled.note([0] * (rows - thought % 2 * (rows > 2)), choice, False)  # a row more or less is no change
        return settled.rests

    assert rested(8, (0, 0.0)) == 15
    assert rested(8, (3, 1.2)) == rested(1, (0, 0.0)) == 3
    settled = Settled()
    for _ in range(40):
        settled.note([0, 0], (0, 0.0), False)
    settled.note([0], (0, 0.0), False)
    assert settled.rests == 0


def test_prices_are_of_rows_of_different_lengths_whose_drafts_lag(target, world) -> None:
    batch = unread_batch(target, auto(target, world), 4, 40, 0.0, 4)
    assert batch.cache.host_lengths == [39, 35, 31, 27]
    assert batch.draft.own.host_lengths == [39, 34, 31, 26]
    forgotten_round(target, auto(target, world), batch)
    assert batch.cache.host_lengths == [39, 35, 31, 27]
    assert batch.draft.own.host_lengths == [39, 34, 31, 26]


def test_a_draft_that_became_good_is_used_again_within_32_rounds() -> None:
    worth = Worth(1)

    def hard(rounds: int) -> None:
        for _ in range(rounds):
            if worth.drafts([0], [1.0]):
                worth.learn(0, gain=0.02, cost=0.4)

    def waited() -> int:
        rounds = 0
        while not worth.drafts([0], [1.0]):
            rounds += 1
        return rounds

    for before in (200, 400, 400):
        hard(before)
        rounds = waited()
        assert rounds <= LONGEST
        for _ in range(3):
            worth.learn(0, gain=2.0, cost=0.5)
        assert worth.drafts([0], [1.0])
        assert rounds + 3 <= 32
    # One that has not paid for long is asked once in 256 rounds.
    hard(2000)
    worth.learn(0, gain=0.02, cost=0.4)
    assert waited() == RARELY - 1


def test_the_most_probable_nodes_are_kept_as_far_as_they_pay() -> None:
    offer = Offer()
    first = offer.add(0, 7, 0.9)
    offer.add(0, 8, 0.06)
    second = offer.add(first, 9, 0.5)
    offer.copy([7, 9, 11], [0.8, 0.9, 0.9])  # the first two are there; the second's reach is raised
    assert offer.tokens == [-1, 7, 8, 9, 11]
    assert offer.reach[second] == pytest.approx(0.81)
    assert offer.reach[4] == pytest.approx(0.729)
    order = offer.best()
    assert order == [1, 3, 4, 2]
    reach = [[offer.reach[node] for node in order]]
    assert width_of(reach, np.array([1.0, 1.1, 1.2, 1.3, 1.4]), rate=1.5) == 3  # the last brings 0.06 and costs 0.15
    assert width_of(reach, np.array([1.0, 2.0, 3.0, 4.0, 5.0]), rate=1.5) == 0
    assert offer.numbered([2, 1, 3, 4]) == [1, 3, 4, 2]


def test_estimates_become_calibrated_though_chains_stop_early() -> None:
    """Tokens are accepted with a probability that the prior has wrong; deeper ones are seen only after an acceptance."""
    random, model = np.random.default_rng(0), OnlineLogistic([[0.0, 0.0]])
    shown = random.uniform(-3, 3, 4000)
    x = np.stack([np.ones_like(shown), shown], 1)
    y = (random.random(4000) < 1 / (1 + np.exp(-(0.5 + 1.5 * shown)))).astype(float)
    for start in range(0, 4000, 20):
        model.learn(0, x[start : start + 20], y[start : start + 20])
    assert model.weights[0] == pytest.approx([0.5, 1.5], abs=0.25)
    bins = [Bin(int(count), int(count), predicted, int(true)) for count, predicted, true in model.seen[0]]
    assert calibration_error(bins) < 0.04  # the first predictions, before anything was learned, included


def test_prices_are_measured_once_and_damaged_ones_again(target, world, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr("glidecape.costs.ROWS", (1,))
    said: list[str] = []
    drafter = auto(target, world)
    found = prices_of(target, drafter, said.append)
    assert len(said) == 1
    assert prices_of(target, drafter, said.append) == found
    assert len(said) == 1
    (path,) = (tmp_path / "packages").glob("prices-*.json")
    for damaged in ("{", "[]", json.dumps([asdict(found[0]) | {"draft": [[-1.0]]}] * 2)):
        path.write_text(damaged)
        prices_of(target, drafter, said.append)
        assert "is damaged" in said[-2]
    for one in found:
        costs = one.at(2, 500)
        assert costs.verify(1) == 1.0
        assert math.isfinite(costs.draft)
        assert costs.verify(25) >= costs.verify(5) >= 1.0


def test_measured_costs_decide_unless_a_method_is_asked_for(world, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr("glidecape.interface.load.compile_models", lambda *_: None)  # it is not what this is about
    pair = world["target"], world["glide"]
    chosen = glidecape.load(*pair)
    assert chosen.method == "glide+auto"
    assert [one.rows for one in chosen.drafter.prices] == [(1,), (1,)]
    chain = glidecape.load(*pair, compile="off")
    assert chain.method == "glide"
    assert chosen("def load_table(", max_tokens=12).text == chain("def load_table(", max_tokens=12).text
    assert glidecape.load(*pair, options=MethodOptions(length=3)).method == "glide"
    assert glidecape.load(*pair, method="glide").method == "glide"
    assert glidecape.load(world["target"]).method == "lookup+auto"


def test_on_a_busy_machine_nothing_is_measured_at_first_use(world, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr("glidecape.costs.LEAST_SHARE", 1.1)
    monkeypatch.setattr("glidecape.costs.measured_prices", lambda *_, **__: pytest.fail("it was measured"))
    assert glidecape.load(world["target"], world["glide"]).method == "glide"


def test_costs_of_a_large_model_are_measured_where_much_is_decoded(world, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr("glidecape.usual.ROWS", (2,))
    monkeypatch.setattr("glidecape.usual.QUICK", 0)
    monkeypatch.setattr("glidecape.interface.load.compile_models", lambda *_: None)
    pair = world["target"], world["glide"]
    large = glidecape.load(*pair)
    assert large.method == "glide"
    much = prepared(large, "auto", WORTH, may_choose=True)
    assert (much.method, much.drafter.prices[0].rows) == ("glide+auto", (2,))
    assert glidecape.load(*pair).method == "glide+auto"  # now they are known


@pytest.mark.parametrize(("share", "kept"), [(0.65, 0), (0.99, 1)])
def test_prices_that_were_measured_beside_other_programs_are_not_kept(
    target, world, tmp_path, monkeypatch, share: float, kept: int
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setattr("glidecape.costs.LEAST_SHARE", 0.85)
    monkeypatch.setattr("glidecape.costs.measured_prices", lambda *_, **__: replace(CHEAP, share=share))
    said: list[str] = []
    assert prices_of(target, auto(target, world), said.append)[0].share == share
    assert len(list((tmp_path / "packages").glob("prices-*.json"))) == kept
    assert said[1:] == ([] if kept else [said[-1]])
    assert kept or said[-1].startswith("other programs were running")


def test_on_a_slow_machine_few_sizes_are_timed_and_the_others_follow(target, world, monkeypatch) -> None:
    shapes: list[int] = []
    forgotten = costs.forgotten_round

    def timed(on: Target, drafter: Any, batch: Any) -> Stats:
        shapes.append(drafter.shape.nodes)
        stats = forgotten(on, drafter, batch)
        stats.total_s = 0.2 + 0.01 * drafter.shape.nodes
        return stats

    monkeypatch.setattr(costs, "forgotten_round", timed)
    found = measured_prices(target, auto(target, world), rows=(2,))
    assert max(shapes) == costs.LONG  # of 24
    assert found.sizes == costs.NODES
    assert found.verify[0][0] == pytest.approx([0.2 + 0.01 * (nodes - 1) for nodes in costs.NODES])
    assert len(shapes) < 40 * len(found.contexts)


def test_a_bench_of_single_prompts_takes_prices_of_one_row_unless_all_are_known(
    target, world, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv(FOLDER, str(tmp_path))
    asked: list[Any] = []
    monkeypatch.setattr(
        "glidecape.interface.load.prices_of", lambda *_, rows=None: asked.append(rows) or [CHEAP, CHEAP]
    )
    drafter = auto(target, world)
    set_prices(target, [drafter], alone=True)
    set_prices(target, [drafter])
    file = costs.prices_file(target, drafter)
    assert file is not None
    file.write_text("[]")
    set_prices(target, [drafter], alone=True)
    assert asked == [costs.ALONE_ROWS, None, None]


def test_what_a_draft_reads_has_few_widths(target, world, monkeypatch) -> None:
    """A CPU generates code for each width."""
    drafter, widths = make_drafter("glide", load_draft(world["glide"], target)), set[int]()
    catch_up = GlideDraft.catch_up
    monkeypatch.setattr(
        GlideDraft,
        "catch_up",
        lambda self, tokens, *rest: (widths.add(tokens.shape[1]), catch_up(self, tokens, *rest))[1],
    )
    for length in range(40, 60, 3):
        prompt = [1 + i % 50 for i in range(length)]
        params = SamplingParams(max_new_tokens=40, ignore_eos=True)
        assert (
            generate(target, [prompt], drafter, params)[0].tokens == generate(target, [prompt], None, params)[0].tokens
        )
    assert widths <= {32, 64}


def test_the_share_of_a_thread_that_waits_is_small() -> None:
    share = Share()
    with share.counting():
        time.sleep(0.2)
    assert share.value < 0.5


def test_a_part_that_is_left_out_is_not_used(target, world) -> None:
    """What `--auto-without` and `@without=` name, by its effect on what is offered."""
    draft = load_draft(world["glide"], target)

    def offers(without: str) -> list[Offered]:
        drafter = make_drafter("glide+auto", draft, without=without)
        assert isinstance(drafter, AutoDrafter)
        drafter.set_prices([CHEAP, CHEAP])
        drafter.offered = []
        drafted(target, drafter)
        return drafter.offered

    def siblings(found: list[Offered]) -> int:
        below = [[one.offer.parents[node] for node in one.kept] for one in found]
        return sum(len(own) - len(set(own)) for own in below)

    whole, alone, neither = offers(""), offers("siblings/copying"), offers("copying, cost")
    assert siblings(whole) > 0 == siblings(alone)
    assert max(len(one.kept) for one in alone) <= DEPTH
    assert sum(len(one.kept) for one in neither) > sum(len(one.kept) for one in alone)  # nodes are free
    at_first = offers("calibration")[0].offer
    first = at_first.chain[0]
    assert at_first.reach[first] == pytest.approx(min(0.999, math.exp(at_first.log_q[first])))
    with pytest.raises(InputError, match="auto has no part 'sibling'"):
        make_drafter("glide+auto", draft, without="sibling")


def test_auto_takes_no_other_part(target) -> None:
    for method in ("glide+auto+svip", "plain+auto", "lookup+auto+cape"):
        with pytest.raises(InputError):
            make_drafter(method)
