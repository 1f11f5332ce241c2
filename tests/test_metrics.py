"""The benchmark's figures against examples worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from glidecape.bench.curves import binned, policies, records_of, svip_bound, watched_figures
from glidecape.bench.metrics import (
    Totals,
    expected_speedup,
    group,
    measured_costs,
    paces,
    pairs_of,
    rows_of,
    tokens_per_s,
)
from glidecape.bench.records import Counts, Difference, Item, Record
from glidecape.bench.settings import Settings
from glidecape.bench.tables import cells
from glidecape.core.stats import loops, repetition
from glidecape.costmodel import RoundCosts
from glidecape.drafting.options import MethodOptions
from glidecape.replay import expected, replay
from glidecape.significance import bootstrap_ratio, paired_permutation


def item(number: int, category: str = "a", kind: str = "steady") -> Item:
    return Item(number, f"s/{number}", category, kind, False, number, (1, 2, number))


def plain(job: int, tokens: int = 10, each_us: int = 10_000, repeat: int = 0) -> Record:
    """Plain decoding: a round a token, 8 of 10 parts in the target's forward."""
    zeros, ones = [0] * tokens, [1] * tokens
    counts = Counts(zeros, zeros, zeros, zeros, ones)
    return Record(
        job, repeat, "plain", [counts], zeros, [each_us * 8 // 10] * tokens, [each_us] * tokens, 30_000, differs=[]
    )


def drafted(job: int, round_us: int = 20_000, repeat: int = 0, method: str = "glide") -> Record:
    """Chains of 3: one all accepted, one with 1 accepted, one with none, one of 2 cut by the limit after 2 accepted."""
    counts = Counts([3, 3, 3, 2], [3, 3, 3, 2], [3, 1, 0, 2], [3, 2, 1, 2], [4, 2, 1, 3])
    return Record(job, repeat, method, [counts], [6_000] * 4, [12_000] * 4, [round_us] * 4, 40_000, 1000, [])


def test_counts_of_four_rounds() -> None:
    one = Totals.of([drafted(0)])
    assert (one.rounds, one.drafted, one.depth, one.accepted, one.tested, one.emitted) == (4, 11, 11, 6, 8, 10)
    assert (one.acceptance_length, one.alpha) == (2.5, 0.75)
    # depth 1 was tested in all four rounds and accepted in three, and so on
    assert dict(one.tested_at) == {1: 4, 2: 3, 3: 1}
    assert dict(one.accepted_at) == {1: 3, 2: 2, 3: 1}
    assert dict(one.lengths) == {3: 1, 1: 1, 0: 1, 2: 1}


def test_a_row_of_figures() -> None:
    items = [item(0), item(1)]
    records = [plain(0), plain(1), drafted(0), drafted(1)]
    one = group(items, records, ["plain", "glide"], "all", "steady")
    first, row = rows_of(one, [])
    assert first["tokens_per_s"] == 100.0
    assert (first["acceptance_length"], first["over"]) == (1.0, {})
    assert "alpha" not in first
    assert row["tokens_per_s"] == 125.0  # 10 tokens in 80 ms
    assert row["over"]["plain"]["ratio"] == 1.25
    assert row["over"]["plain"]["interval"] == [1.25, 1.25]
    assert row["nodes"] == {"proposed": 2.75, "verified": 3.75, "accepted": 1.5}
    assert row["by_depth"] == [[0.75, 8], [0.6667, 6], [1.0, 2]]
    assert row["accepted_lengths"] == {"0": 2, "1": 2, "2": 2, "3": 2}
    assert row["draft_efficiency"] == pytest.approx(6 / 11, abs=1e-4)
    assert row["share"] == {"draft": 0.3, "verify": 0.6, "overhead": 0.1}
    # a plain forward takes 8 ms; 11 draft steps took 24 ms, a forward of the drafted tree 12 ms
    assert row["c"] == pytest.approx(24 / 11 / 8, abs=1e-4)
    assert row["v"] == 1.5
    assert row["expected"]["ours"] == pytest.approx(2.5 / (2.75 * 24 / 11 / 8 + 1.5), abs=1e-4)
    assert row["expected"]["papers"] == pytest.approx((1 - 0.75**3.75) / 0.25 / (2.75 * 24 / 11 / 8 + 1), abs=1e-4)
    assert (row["first_token_ms"], row["prefill_ms"], row["peak_bytes"]) == (60.0, 40.0, 1000)
    assert row["equal"] is True


@pytest.mark.parametrize(
    ("alpha", "c", "printed"), [(0.516, 0.077, 1.46), (0.58, 0.49, 0.66), (0.648, 0.067, 1.97), (0.693, 0.068, 2.16)]
)
def test_the_expected_speedups_that_the_glide_paper_prints(alpha: float, c: float, printed: float) -> None:
    """Table 1, GSM8K: Vicuna-7B with the 68m, the 160m and the GliDe draft, and Vicuna-33B with GliDe."""
    assert expected_speedup(alpha, 5, c) == pytest.approx(printed, abs=0.011)


def test_a_batch_shares_its_rounds_among_rows() -> None:
    """Two rows, two rounds of depth 2 in both: 4 draft steps were run, not 8."""
    counts = Counts([2, 2], [2, 2], [2, 0], [2, 1], [3, 1])
    both = Record(0, 0, "glide", [counts, counts], [4_000] * 2, [16_000] * 2, [20_000] * 2)
    total = Totals.of([both])
    assert (total.rounds, total.forwards, total.emitted) == (4, 2, 8)
    c, v = measured_costs(total, Totals.of([plain(0)]))
    assert (c, v) == pytest.approx((2 / 8, 2.0))


def test_medians_over_repeats_and_only_whole_repeats() -> None:
    items = [item(0), item(1)]
    records = [plain(0, repeat=r, each_us=us) for r, us in enumerate((10_000, 90_000, 20_000))]
    records += [drafted(0, repeat=r) for r in range(2)] + [plain(1)]
    assert tokens_per_s(records[:3]) == 50.0
    assert paces(records[:3], [0]) == [0.02]
    one = group(items, records, ["plain", "glide"], "all", "steady")
    assert one.jobs == [0]  # the other job has no record of glide
    assert sorted((r.repeat, r.method) for rs in one.records.values() for r in rs) == [
        (0, "glide"),
        (0, "plain"),
        (1, "glide"),
        (1, "plain"),
    ]


def test_groups_are_by_category_and_kind_and_peers_are_compared() -> None:
    items = [item(0, "a"), item(1, "b"), item(2, "b", "looping")]
    records = [r for job in range(3) for r in (plain(job), drafted(job))]
    records += [Record(job, 0, "other", [Counts(emitted=[9])], round_us=[180_000], peer=True) for job in range(3)]
    names = ["plain", "glide", "other"]
    assert group(items, records, names, "b", "steady").jobs == [1]
    assert group(items, records, names, "all", "looping").jobs == [2]
    rows = {row["method"]: row for row in rows_of(group(items, records, names, "all", "steady"), ["other"])}
    assert rows["other"]["over"]["plain"]["ratio"] == 0.5
    assert rows["glide"]["over"]["other"]["ratio"] == 2.5
    assert rows["plain"]["over"]["other"]["ratio"] == 2.0
    assert "alpha" not in rows["other"]


def test_a_prompt_that_two_suites_hold_counts_once_in_the_whole() -> None:
    items = [item(0, "a"), item(1, "a"), replace(item(2, "b"), ids=item(0).ids)]
    records = [r for job in range(3) for r in (plain(job), drafted(job))]
    names = ["plain", "glide"]
    assert group(items, records, names, "all", "steady").jobs == [0, 1]
    assert group(items, records, names, "b", "steady").jobs == [2]
    assert len(group(items, records, names, "all", "steady").records["glide"]) == 2


def test_differences_are_counted_by_prompt() -> None:
    records = [plain(0), drafted(0), plain(0, repeat=1), drafted(0, repeat=1)]
    for record in records[1::2]:
        record.differs = [Difference(0, 4, 7, 9)]
    row = rows_of(group([item(0)], records, ["plain", "glide"], "all", "steady"), [])[1]
    assert (row["equal"], row["differing"]) == (False, 1)
    assert cells(row)["equal"] == "NO (1)"


def test_what_was_not_compared_is_not_called_equal() -> None:
    """A peer at T=1 draws by its own means, and under the residual rule so does every method."""
    records = [replace(plain(0), differs=None), drafted(0)]
    first, row = rows_of(group([item(0)], records, ["plain", "glide"], "all", "steady"), [])
    assert (first["equal"], cells(first)["equal"]) == (None, "not compared")
    assert (row["equal"], cells(row)["equal"]) == (True, "yes")


def test_pairs_test_speed_and_acceptance_over_prompts() -> None:
    jobs = range(8)
    records = [r for j in jobs for r in (plain(j), drafted(j), drafted(j, 30_000 + 100 * j, method="vanilla"))]
    for record in records:
        if record.method == "vanilla":
            record.rows = [Counts([3, 3], [3, 3], [0, 3], [1, 3], [1, 4])]
    one = group([item(j) for j in jobs], records, ["plain", "glide", "vanilla"], "all", "steady")
    (pair,) = pairs_of(one, [])
    assert (pair["a"], pair["b"]) == ("glide", "vanilla")
    assert pair["speed"]["ratio"] > 1
    # 8 prompts all point one way: 2 of 256 arrangements reach that
    assert pair["speed"]["p"] == pytest.approx(2 / 256, abs=0.004)
    assert pair["alpha"] == {"gain": 0.0, "p": 1.0}  # 6 of 8 and 3 of 4
    assert pair["acceptance_length"]["gain"] == 0.0


def test_intervals_and_p_values() -> None:
    low, high = bootstrap_ratio([1.0, 3.0] * 20, [1.0, 1.0] * 20)
    assert 1.6 < low < 2.0 < high < 2.4
    # 6 differences of one sign: 2 of 64 sign patterns are as far from 0
    assert paired_permutation([2.0] * 6, [1.0] * 6) == pytest.approx(2 / 64, abs=0.005)
    assert paired_permutation([1.0, 2.0], [2.0, 1.0]) == 1.0


def test_looping_and_repetition_are_what_the_definitions_say() -> None:
    assert loops(list(range(8)) * 8)
    assert not loops(list(range(128)))
    assert not loops(list(range(8)) * 4 + list(range(100, 200)))  # only the first half repeats
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)


# Six tokens; near the end a draft has room for what may still be emitted, less one.
NOTES = {
    "draft": "glide",
    "matches": [2, 1, 0, 2, 1, 1],
    "entropy": [[0.1, 0.1, 5.0], [0.1, 5.0, 0.1], [5.0, 0.1, 0.1], [0.1, 0.1], [0.1], [0.1]],
    "confidence": [[0.9, 0.8, 0.1], [0.9, 0.1, 0.9], [0.1, 0.9, 0.9], [0.9, 0.9], [0.9], [0.9]],
    "overlap": [1.0, 1.0, 0.0, 1.0, 1.0, 1.0],
    "overlap_1": [0.9, 0.9, 0.3, 0.9, 0.9, 0.9],
}


def replayed(kind: str, value: float) -> tuple[float, float, float]:
    """Acceptance length, drafted and accepted depths of a policy."""
    length = next(length for name, number, length in policies(3, 0.0) if (name, number) == (kind, value))
    found = expected(replay(records_of(NOTES), length), RoundCosts(0.0))
    return found.acceptance_length, found.depths, found.accepted


def test_stop_policies_replayed_by_hand() -> None:
    # length 1: t=0 drafts 1, right, emits 2; t=2 drafts 1, wrong, emits 1; t=3 emits 2; t=5 drafts 1, emits 1 (the end)
    assert replayed("constant", 1) == (1.5, 1.0, 0.75)
    # length 3: t=0 has 2 right and emits 3; t=3 has room for 2, both right, and emits 3
    assert replayed("constant", 3) == (3.0, 2.5, 2.0)
    # the oracle drafts just what is accepted
    assert replayed("oracle", 0) == (3.0, 2.0, 2.0)
    # SVIP keeps the uncertain token and stops after it: 3 at t=0, then 2 at t=3
    assert replayed("svip", 0.3)[1] == 2.5
    assert replayed("svip", 0.0)[1] == 1.0
    assert [one.length(0.3) for one in records_of(NOTES)[:4]] == [3, 2, 1, 2]


def test_what_drafts_think_against_what_is_accepted() -> None:
    costs = {"c": {"glide": 0.1}, "v": {"0": 1.0, "2": 1.2, "4": 1.4}}
    found = watched_figures([NOTES], costs, Settings(options=MethodOptions(length=3)))["glide"]
    assert (found["overlap"], found["positions"]) == (pytest.approx(5 / 6, abs=1e-4), 6)
    sure, unsure = found["confidence"][-1], found["confidence"][0]
    # reached and unsure (0.1): depth 3 at t=0, depth 2 at t=1, depth 1 at t=2: all wrong
    assert (unsure["y"], unsure["count"]) == (0.0, 3)
    assert sure["y"] == 1.0
    assert found["entropy"][0] == {"x": 0.1, "y": 0.9, "count": 5}
    best = next(p for p in found["policies"] if p["policy"] == "oracle")
    assert best["expected"] == pytest.approx(3.0 / (0.2 + 1.2), abs=1e-3)
    assert max(p["expected"] for p in found["policies"]) == best["expected"]


def test_bins_bounds_and_lines_between() -> None:
    assert svip_bound(0.0) == 1.0
    assert svip_bound(1.0) == pytest.approx(1 - math.sqrt(0.15))
    assert binned([(9.0, 1.0)], 0.1, 10) == [{"x": 9.0, "y": 1.0, "count": 1}]
