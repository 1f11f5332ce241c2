"""The studies: costs and oracle by hand and by brute force, on toys; the commands on a tiny world."""

from __future__ import annotations

import json
import math
import sys
from functools import cache as remembered
from pathlib import Path

import pytest
import torch

from glidecape import cli
from glidecape.bench.draw import Drawn
from glidecape.bench.records import Item
from glidecape.bench.settings import Settings
from glidecape.core.params import RESIDUAL, SamplingParams
from glidecape.core.stats import RoundStats, Stats
from glidecape.costmodel import Prices, RoundCosts
from glidecape.costs import Verification, verification_ratios
from glidecape.drafting.auto.drafter import AutoDrafter
from glidecape.drafting.drafter import ModelDrafter, NoDraft
from glidecape.drafting.expansions.beam import Beam
from glidecape.drafting.expansions.cape import Cape
from glidecape.drafting.expansions.chain import Chain
from glidecape.drafting.stop import Entropy, FixedLength
from glidecape.engine.decode import start
from glidecape.engine.round import run_round
from glidecape.errors import InputError
from glidecape.measure import runs as runs_module
from glidecape.measure.auto import Job, study_auto
from glidecape.measure.cape import best_of, study_cape
from glidecape.measure.knowing import Oracle, Place, fastest
from glidecape.measure.oracle import distance, oracle, rounds_of
from glidecape.measure.runs import PLAIN, Run, Watched, figures, interleaved, prompts_of, run
from glidecape.measure.svip import Lengths, study_svip
from glidecape.measure.sweeps import marks, study_batches, study_long, up_to
from glidecape.measure.table import Study, Table
from glidecape.replay import Round, expected
from toys import ToyDraft, ToyTarget, scripted_rule

VOCAB = 64
TARGET = ToyTarget(scripted_rule([[n % 50] for n in range(400)], VOCAB), VOCAB)
WRONG = {3, 4, 8, 13, 14, 15, 21, 24}  # places in every 25 where the draft is wrong


def moody(context: tuple[int, ...]) -> torch.Tensor:
    """Unsure and wrong at WRONG, sure and right elsewhere."""
    logits = torch.zeros(VOCAB, dtype=torch.float64)
    wrong = len(context) % 25 in WRONG
    logits[63 if wrong else len(context) % 50] = 3.0 if wrong else 30.0
    return logits


DRAFT = ToyDraft(moody, VOCAB, max_lag=5)
COSTS = RoundCosts(0.1, (1, 2, 9), (1.0, 1.02, 1.16))
PARAMS = SamplingParams(max_new_tokens=40, ignore_eos=True)


def test_what_a_round_costs() -> None:
    costs = RoundCosts(0.2, (1, 3, 5), (1.0, 1.2, 1.8))
    assert [costs.verify(n) for n in (1, 2, 3, 4, 5, 7)] == pytest.approx([1.0, 1.1, 1.2, 1.5, 1.8, 2.4])
    assert costs.of(2, 4) == pytest.approx(0.4 + 1.8)
    assert RoundCosts(0.2, (1,), (1.0,)).verify(9) == 1.0


def test_expected_and_oracle_by_hand() -> None:
    """CaPE's rounds: 2 nodes a depth. The second accepts nothing: the oracle drafts nothing there."""
    costs = RoundCosts(0.1, (1, 5), (1.0, 1.4))
    rounds = [Round((2, 4), accepted=1, emitted=2), Round((2, 4), accepted=0, emitted=1)]
    assert expected(rounds, costs).speedup == pytest.approx(3 / (2 * (0.2 + 1.4)))
    best = oracle(rounds, costs)
    assert best.speedup == pytest.approx(3 / (0.1 + 1.2 + 1.0))
    assert (best.acceptance_length, best.depths, best.nodes) == (1.5, 0.5, 1.0)
    assert distance([2, 2], [1, 0]) == 1.5


def one_round(known: tuple[int, ...], length: int) -> RoundStats:
    drafter = ModelDrafter(DRAFT, Chain(), FixedLength(length)) if length else NoDraft()
    state = start(TARGET, drafter, [known], SamplingParams(max_new_tokens=20, ignore_eos=True))
    return run_round(TARGET, drafter, state)[0].stats


def test_the_oracle_is_the_best_of_all_sequences_of_lengths() -> None:
    """Every sequence of draft lengths 0 to 5 over a text, each round really decoded, and the cheapest of them."""
    text = tuple(n % 50 for n in range(80))
    watched = Watched(ModelDrafter(DRAFT, Chain(), FixedLength(5)))
    decoded = run(TARGET, watched, [[0]], SamplingParams(max_new_tokens=60, ignore_eos=True))
    rounds = rounds_of(watched.nodes, decoded.rounds)[:10]
    end = 1 + sum(r.emitted for r in rounds)
    best = oracle(rounds, COSTS)

    @remembered
    def cheapest(known: int) -> float:
        if known == end:
            return 0.0
        costs = [math.inf]
        for length in range(6):
            emitted = one_round(text[:known], length).emitted
            if known + emitted <= end:
                costs.append(COSTS.of(length, length) + cheapest(known + emitted))
        return min(costs)

    assert (end - 1) / cheapest(1) == pytest.approx(best.speedup)
    assert best.speedup > 1.3 * expected(rounds, COSTS).speedup


@pytest.mark.parametrize("expansion", [Chain(), Cape((2,)), Beam(3)], ids=["chain", "cape", "beam"])
def test_nodes_by_depth_are_those_that_were_proposed(expansion) -> None:
    watched = Watched(ModelDrafter(DRAFT, expansion, FixedLength(4)))
    decoded = run(TARGET, watched, [[0]], PARAMS)
    rounds = rounds_of(watched.nodes, decoded.rounds)
    assert [r.nodes[-1] for r in rounds] == [r.drafted for r in decoded.rounds]
    assert max(len(r.nodes) for r in rounds) == 4
    assert sum(r.emitted for r in rounds) == 40 == decoded.marks[-1][0]
    plain = Watched(NoDraft())
    run(TARGET, plain, [[0]], PARAMS)
    assert plain.nodes == [()] * 40


def test_verification_is_timed_at_every_size() -> None:
    found = verification_ratios(TARGET, [[0, 1, 2]], 0.0, (1, 2, 60), repeats=3)
    assert (found.sizes, found.ratios[0]) == ((1, 2, 60), 1.0)
    assert found.ratios[2] > 1.2, "the toy takes time for every node"
    assert found.step_s > 0
    with pytest.raises(InputError, match="begin with 1"):
        verification_ratios(TARGET, [[0]], 0.0, (2, 4))
    short = ToyTarget(TARGET.rule, VOCAB)
    short.context = 12
    with pytest.raises(InputError, match="shorten the prompt"):
        verification_ratios(short, [[0] * 8], 0.0, (1, 8), repeats=3)


def test_figures_of_runs() -> None:
    def made(tokens: int, rounds: int, seconds: float) -> Run:
        stats = Stats(rounds=rounds, drafted=2 * rounds, accepted=tokens - rounds, emitted=tokens, tested=tokens)
        stats.draft_s, stats.verify_s, stats.total_s = seconds / 4, seconds / 2, seconds
        return Run(stats, [[1] * tokens], [], [(i, 0.0) for i in range(rounds)])

    runs = {PLAIN: [[made(10, 10, 2.0), made(10, 10, 2.0)]], "glide": [[made(10, 5, 1.0), made(10, 5, 1.0)]]}
    row = figures("glide", runs)
    assert (row["tokens_per_s"], row["over_plain"], row["over_plain_95"]) == (10.0, 2.0, (2.0, 2.0))
    assert (row["acceptance_length"], row["nodes"]) == (2.0, 2.0)
    assert (row["draft_ms"], row["verify_ms"], row["other_ms"]) == (50.0, 100.0, 50.0)
    assert row["equal"]
    runs["glide"][0][1].tokens = [[2] * 10]
    assert not figures("glide", runs)["equal"]


def test_methods_take_turns() -> None:
    order = []

    class Noted(NoDraft):
        def __init__(self, name: str) -> None:
            self.name = name

        def begin(self, rows: int, capacity: int) -> None:
            order.append(self.name)

    interleaved(TARGET, {n: Noted(n) for n in "abc"}, [[[0]], [[1]], [[2]]], SamplingParams(max_new_tokens=2))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # the warm-up first


def test_the_best_bins_are_confirmed_on_prompts_that_had_no_say() -> None:
    def paced(*seconds: float) -> list[list[Run]]:
        return [[Run(Stats(emitted=1, total_s=s), [[0]]) for s in seconds]]

    runs = {
        PLAIN: paced(4.0, 4.0, 4.0, 4.0),
        "chain": paced(2.0, 2.0, 2.0, 2.0),
        "cape a": paced(1.0, 4.0, 1.0, 4.0),  # chosen: best on the first and third
        "cape b": paced(2.0, 1.0, 2.0, 1.0),
    }
    said = best_of(runs, {"chain": ["chain"], "cape": ["cape a", "cape b"]})
    assert "cape a, 4.000x plain where it was chosen, 1.000x on the 2 prompts" in said[1]
    assert "CaPE's best takes 2.000 of its time" in said[0]


def test_study_of_cape_on_a_toy() -> None:
    table, said = study_cape(TARGET, DRAFT, [[0], [0, 1]], PARAMS, 4, (2,), (2,), {"mine": (3, 1)})
    assert [row["method"] for row in table.rows] == [PLAIN, "chain", "fixed 2", "beam 2", "cape mine"]
    assert all(row["equal"] for row in table.rows)
    nodes = {row["method"]: row["nodes"] for row in table.rows}
    assert nodes["fixed 2"] == pytest.approx(3 * nodes["chain"], rel=0.01)
    assert nodes["chain"] < nodes["cape mine"] < 4 * nodes["chain"] + 1
    assert table.rows[-1]["bins"] == (3, 1)
    assert len(said) == 4
    with pytest.raises(InputError, match="at least two prompts"):
        study_cape(TARGET, DRAFT, [[0]], PARAMS)


def test_study_of_svip_on_a_toy() -> None:
    """The draft is unsure exactly where it is wrong, so SVIP's lengths are nearer the oracle's than a constant."""
    flat = Verification((1, 9), (1.0, 1.1), 1.0)
    lengths = Lengths((1, 2, 4, 9), start=3, threshold=0.0, cap=8)
    table, costs = study_svip(TARGET, DRAFT, Chain(), "toy", [[0], [0, 1]], [[0, 1, 2]], PARAMS, flat, lengths)
    rows = {row["method"]: row for row in table.rows}
    fitted = next(name for name in rows if name.startswith("svip fitted"))
    assert set(rows) == {PLAIN, "constant 1", "constant 2", "constant 4", "heuristic", "svip 0", fitted, "oracle"}
    assert costs.draft > 0
    best = rows["oracle"]["expected"]
    assert all(row["behind_oracle"] == pytest.approx(best / row["expected"] - 1, abs=0.01) for row in rows.values())
    assert rows["svip 0"]["depths"] == 1.0
    assert rows[fitted]["off_oracle"] < rows["constant 4"]["off_oracle"]
    assert rows["oracle"]["acceptance_length"] >= rows["constant 4"]["acceptance_length"]
    assert rows[PLAIN]["expected"] == 1.0
    residual = SamplingParams(1.0, max_new_tokens=8, sampling=RESIDUAL)
    with pytest.raises(InputError, match="use shared noise"):
        study_svip(TARGET, DRAFT, Chain(), "toy", [[0]], [[1]], residual, flat)
    with pytest.raises(InputError, match="none of those measured"):
        study_svip(TARGET, DRAFT, Chain(), "toy", [[0]], [[0]], PARAMS, flat)


def test_the_fastest_rounds_are_the_best_of_all_sequences() -> None:
    costs = RoundCosts(0.1, (1, 2, 9), (1.0, 1.05, 1.9), 0.2, 2, 0.25, ((2, 0.3),))
    places = [Place(1, 2, 0), Place(0, 0, 3), Place(3, 3, 1), Place(0, 1, 0), Place(2, 2, 2), Place(0, 0, 0)]

    @remembered
    def least(at: int) -> float:
        left = len(places) - at - 1
        if left < 0:
            return 0.0
        place = places[at]
        times = [1.0 + least(at + 1), 1.3 + least(at + 1 + min(left, place.chain, 2))]
        times += [costs.verify(1 + n) + least(at + 1 + min(left, n)) for n in range(1, place.copied + 1)]
        for depth in range(1, 5):  # drafted; nodes that are wrong are never worth verifying
            right = min(depth, place.ranked)
            if right:
                cost = costs.verify(1 + right) + 0.2 + 0.1 * depth
                if depth >= 2:
                    cost = min(cost, costs.verify(1 + right) + 0.25 + 0.1 * (depth - 2))
                times.append(cost + least(at + 1 + min(left, right)))
        return min(times)

    at, time = 0, 0.0
    shapes = fastest(places, costs, 4)
    while at < len(places):
        shape, place, left = shapes[at], places[at], len(places) - at - 1
        if shape.chain:
            cost, right = 1.3, min(place.chain, 2)
        elif shape.whole:
            cost, right = (
                costs.verify(1 + shape.nodes) + 0.25 + 0.1 * (shape.depths - 2),
                min(place.ranked, shape.depths),
            )
        else:
            cost = costs.of(shape.depths, shape.nodes)
            right = place.copied and shape.nodes if not shape.depths else min(place.ranked, shape.depths)
        at, time = at + 1 + min(left, right), time + cost
    assert time == pytest.approx(least(0))


def test_the_oracle_proposes_what_is_accepted_and_no_more() -> None:
    """Its text is plain decoding's, every node that it proposes is accepted, and no constant needs fewer rounds."""
    draft = ModelDrafter(DRAFT, Chain(), FixedLength(4))
    of = AutoDrafter(draft, [Prices((1,), (1,), (1, 9), (((1.0, 1.16),),), ((0.1,),), ((0.05,),))] * 2)
    knowing = Oracle(of)
    prompts = [[7], [9, 3]]
    for prompt in prompts:
        knowing.learn_text(TARGET, prompt, PARAMS, run(TARGET, NoDraft(), [prompt], PARAMS).tokens[0])
    drafters = {PLAIN: NoDraft(), "chain": draft, "oracle": knowing}
    runs = interleaved(TARGET, drafters, [[prompt] for prompt in prompts], PARAMS)
    rows = {name: figures(name, runs) for name in drafters}
    assert all(row["equal"] for row in rows.values())
    rounds = [one for batch in runs["oracle"][0] for one in batch.rounds]
    assert all(one.accepted == one.drafted for one in rounds)
    assert rows["oracle"]["acceptance_length"] >= rows["chain"]["acceptance_length"] > 1.5
    assert any(one.drafted > one.depth - 1 for one in rounds)
    for unknown in ([8], [9]):
        with pytest.raises(KeyError):
            run(TARGET, knowing, [unknown], PARAMS)


def test_study_of_auto_takes_turns_and_compares_with_the_best_constant() -> None:
    draft = ModelDrafter(DRAFT, Chain(), FixedLength(4))
    heats = [SamplingParams(heat, seed=3, max_new_tokens=24, ignore_eos=True) for heat in (0.0, 1.0)]
    jobs = [Job(name, prompt, params) for name, prompt in (("code", (7,)), ("chat", (9, 3))) for params in heats]
    drafters = {PLAIN: NoDraft(), "chain": draft, "short": ModelDrafter(DRAFT, Chain(), FixedLength(1))}
    summary, every = study_auto(TARGET, drafters | {"auto": AutoDrafter(draft)}, "auto", jobs)
    cells = ["code, T=0", "code, T=1", "chat, T=0", "chat, T=1"]
    assert {row["cell"] for row in summary.rows} == {*cells, "all, T=0", "all, T=1", "all"}
    assert len(every.rows) == 5 * 7
    assert all(row["equal"] for row in every.rows)
    assert all(row["best_constant"] in ("chain", "short") and row["over_constant"] > 0 for row in summary.rows)
    with pytest.raises(InputError, match="at least one method of a fixed length"):
        study_auto(TARGET, {PLAIN: NoDraft(), "auto": AutoDrafter(draft)}, "auto", jobs)


def test_batches_hold_the_same_prompts() -> None:
    drafters = {PLAIN: NoDraft(), "toy": ModelDrafter(DRAFT, Chain(), Entropy(0.2, 5))}
    table = study_batches(TARGET, drafters, [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0]], PARAMS, (1, 2, 4))
    assert [(row["batch"], row["method"]) for row in table.rows] == [(b, m) for b in (1, 2, 4) for m in drafters]
    assert len({row["acceptance_length"] for row in table.rows if row["method"] == "toy"}) == 1
    with pytest.raises(InputError, match="a batch of 8 needs as many prompts"):
        study_batches(TARGET, drafters, [[0]], PARAMS, (8,))


def test_long_outputs_are_cut_at_marks() -> None:
    target = ToyTarget(scripted_rule([[n % 10] for n in range(400)], VOCAB), VOCAB)  # repeats after 10 tokens
    drafters = {PLAIN: NoDraft(), "toy": ModelDrafter(DRAFT, Chain(), FixedLength(3))}
    table = study_long(target, drafters, [[0]], SamplingParams(max_new_tokens=300, ignore_eos=True))
    assert [row["tokens"] for row in table.rows] == [m for m in marks(300) for _ in drafters]
    plain = [row for row in table.rows if row["method"] == PLAIN]
    assert all(row["acceptance_length"] == 1.0 == row["over_plain"] for row in plain)
    assert plain[0]["repeated_4grams"] == pytest.approx(1 - 10 / 125, abs=1e-3)
    assert plain[-1]["repeated_4grams"] > plain[0]["repeated_4grams"]


def test_figures_up_to_a_mark_leave_out_what_came_later() -> None:
    one = Run(Stats(), [[0] * 6], [], [(2, 0.5), (4, 1.5), (6, 4.0)])
    other = Run(Stats(), [[0] * 6], [], [(3, 0.5), (6, 2.5)])
    assert up_to([[one, other]], 4) == (10 / 4.0, 10 / 4)  # the second run reaches 4 tokens with its round to 6
    assert up_to([[one, other]], 2) == (5 / 1.0, 5 / 2)
    assert up_to([[one]], 9) == (6 / 4.0, 2.0)


def test_a_study_is_written_as_json_and_markdown(tmp_path: Path) -> None:
    study = Study("cape", {"command": "glidecape measure cape", "threads": 2}, {"repeats": 1})
    study.tables.append(Table("one", [{"method": "plain", "over_plain": 1.0}]))
    study.write(tmp_path / "deep" / "cape.json")
    assert json.loads((tmp_path / "deep" / "cape.json").read_text())["provenance"]["threads"] == 2
    text = (tmp_path / "deep" / "cape.md").read_text()
    assert text.startswith("`glidecape measure cape`")
    assert "| plain | 1.0 |" in text
    assert "threads 2" in text


def call(capfd, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["glidecape", "measure", *map(str, words)])
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capfd.readouterr()


def test_the_commands_on_a_tiny_world(world, capfd, monkeypatch, tmp_path) -> None:
    verbs = ("load", "save", "check", "merge", "split")
    rows = [json.dumps({"prompt": f"def {verb}_table(table, size={i}):"}) for i, verb in enumerate(verbs)]
    (tmp_path / "p.jsonl").write_text("\n".join(rows) + "\n")
    pair = ["--target", world["target"], "--draft", world["glide"], "--suite", tmp_path / "p.jsonl"]
    some = [*pair, "--max-new-tokens", 12, "--temperature", 1]
    commands = {
        "cape": ["--siblings", 2, "--beams", 2, "--bins", "mine=2,1", "--draft-length", 3, "--repeats", 1],
        "svip": ["--lengths", "1-2,40", "--methods", "glide,glide+cape@bins=1"],
        "batch": ["--sizes", "1,4", "--methods", "glide"],
        "context": ["--lengths", "48,96", "--methods", "glide+cape", "--limit", 2],
        "long": ["--methods", "glide"],
        "auto": ["--lengths", "1-2", "--copies", 3, "--without", "siblings"],
    }
    counts = {"cape": [5], "svip": [7, 7], "batch": [4], "context": [4], "long": [2], "auto": [3, 21]}
    for name, words in commands.items():
        out = tmp_path / f"{name}.json"
        code, _, err = call(capfd, monkeypatch, name, *some, *words, "--out", out)
        assert code == 0, err
        result = json.loads(out.read_text())
        assert [len(t["rows"]) for t in result["tables"]] == counts[name], name
        assert result["provenance"]["threads"] == torch.get_num_threads()
        assert result["settings"]["max_new_tokens"] == 12
        assert all(row.get("equal", True) for t in result["tables"] for row in t["rows"])
        assert out.with_suffix(".md").read_text().count("| plain |") >= len(counts[name])
    found = json.loads((tmp_path / "context.json").read_text())["tables"][0]["rows"]
    assert [row["context"] for row in found] == [48, 48, 96, 96]
    for words, message in (
        (["cape", *some, "--use", "other"], "no draft named 'other'"),
        (["cape", *some, "--bins", "5,3,1"], "each --bins is NAME=NUMBERS"),
        (["svip", *some, "--methods", "glide+svip"], "name a draft model and an expansion only"),
        (["svip", *some, "--lengths", "few"], "--lengths takes numbers"),
        (["batch", *some, "--sizes", 64], "a batch of 64 needs as many prompts"),
        (["context", *some, "--lengths", 4000], "exceed the target's 192"),
        (["long", *some, "--methods", "vanilla"], "needs a draft named 'vanilla'"),
        (["long", *some, "--temperature", "-1"], "--temperature takes numbers of at least 0"),
    ):
        code, _, err = call(capfd, monkeypatch, *words)
        assert (code, message in err) == (2, True), err
        assert "Traceback" not in err


def test_looping_continuations_are_not_measured(monkeypatch) -> None:
    asked = []

    def drawn(target, suites, settings, _advance):
        asked.append(settings.looping)
        return Drawn([Item(0, "a", "c", "steady", False, 0, (1, 2))] if settings.limit > 1 else [])

    monkeypatch.setattr(runs_module, "draw", drawn)
    assert prompts_of(TARGET, [], Settings(limit=2)) == [[1, 2]]
    assert asked == [0]
    with pytest.raises(InputError, match="every greedy continuation loops"):
        prompts_of(TARGET, [], Settings(limit=1))
