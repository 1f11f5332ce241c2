"""Figures made of records. Each is defined in docs/metrics.md; nothing else computes them."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..core.stats import repetition
from ..drafting.auto.reliability import Bin, calibration_error
from ..significance import bootstrap_ratio, paired_permutation
from .curves import watched_figures
from .draw import KINDS
from .methods import read_method
from .records import Item, Record, RunFolder
from .settings import Settings

ALL = "all"


@dataclass
class Totals:
    """Sums over rounds of one method.

    Attributes:
        rounds, drafted, depth, accepted, tested, emitted: over prompts and rounds; see `RoundStats`.
        tested_at, accepted_at: rounds that tested, and accepted, a node of depth d (from 1).
        lengths: rounds by accepted nodes.
        forwards: proposals of whole batches, each one forward of the target.
        draft_s, verify_s, round_s: seconds of those.
    """

    rounds: int = 0
    drafted: int = 0
    depth: int = 0
    accepted: int = 0
    tested: int = 0
    emitted: int = 0
    tested_at: Counter[int] = field(default_factory=Counter)
    accepted_at: Counter[int] = field(default_factory=Counter)
    lengths: Counter[int] = field(default_factory=Counter)
    forwards: int = 0
    draft_s: float = 0.0
    verify_s: float = 0.0
    round_s: float = 0.0

    @classmethod
    def of(cls, records: Iterable[Record]) -> Totals:
        total = cls()
        for record in records:
            for row in record.rows:
                total.rounds += len(row.emitted)
                for name in ("drafted", "depth", "accepted", "tested", "emitted"):
                    setattr(total, name, getattr(total, name) + sum(getattr(row, name)))
                for accepted, tested in zip(row.accepted, row.tested, strict=True):
                    total.lengths[accepted] += 1
                    total.accepted_at.update(range(1, accepted + 1))
                    total.tested_at.update(range(1, tested + 1))
            total.forwards += len(record.round_us)
            total.draft_s += sum(record.draft_us) / 1e6
            total.verify_s += sum(record.verify_us) / 1e6
            total.round_s += sum(record.round_us) / 1e6
        return total

    @property
    def acceptance_length(self) -> float:
        return _over(self.emitted, self.rounds)

    @property
    def alpha(self) -> float:
        return _over(self.accepted, self.tested)


def _over(a: float, b: float) -> float:
    return a / b if b else 0.0


def expected_speedup(alpha: float, length: float, c: float) -> float:
    """The papers' (1 - alpha^(gamma + 1)) / ((1 - alpha)(gamma c + 1)), which takes verifying for free.

    Source: Leviathan et al. 2023; GliDe paper, section 5.1.

    >>> round(expected_speedup(0.648, 5, 0.067), 2), expected_speedup(1.0, 4, 0.25)
    (1.97, 2.5)
    """
    emitted = length + 1 if alpha >= 1 else (1 - alpha ** (length + 1)) / (1 - alpha)
    return emitted / (length * c + 1)


def measured_costs(totals: Totals, plain: Totals) -> tuple[float, float]:
    """Cost ratio c and verification ratio v, of the very rounds that were timed: a draft step, and the target's forward,
    each over plain decoding's forward."""
    step = _over(plain.verify_s, plain.forwards)
    steps = totals.depth * _over(totals.forwards, totals.rounds)  # draft steps serve all rows of a batch at once
    return _over(_over(totals.draft_s, steps), step), _over(_over(totals.verify_s, totals.forwards), step)


def paces(records: Iterable[Record], jobs: Sequence[int]) -> list[float]:
    """Seconds a token of each job, the median over repeats."""
    each: dict[int, list[float]] = {job: [] for job in jobs}
    for record in records:
        if record.job in each:
            each[record.job].append(record.seconds / max(1, record.emitted))
    return [statistics.median(times) for times in each.values()]


def tokens_per_s(records: Iterable[Record]) -> float:
    """The median over repeats of all emitted tokens over all seconds."""
    repeats: dict[int, list[Record]] = {}
    for record in records:
        repeats.setdefault(record.repeat, []).append(record)
    return statistics.median(
        _over(sum(r.emitted for r in each), sum(r.seconds for r in each)) for each in repeats.values()
    )


def _by_job(records: Sequence[Record], jobs: Sequence[int], name: str) -> list[float]:
    each: dict[int, list[Record]] = {job: [] for job in jobs}
    for record in records:
        each[record.job].append(record)
    return [getattr(Totals.of(own), name) for own in each.values()]


def faster(mine: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """How much faster a method is, from seconds a token of the same jobs: ratio of sums, 95 % interval, p-value."""
    ratio = {"ratio": round(sum(other) / sum(mine), 4)}
    return ratio | {"interval": list(bootstrap_ratio(other, mine)), "p": round(paired_permutation(other, mine), 6)}


@dataclass(frozen=True)
class Group:
    """The records of one category and kind; only jobs that every method and peer has finished as often."""

    category: str
    kind: str
    items: list[Item]
    records: dict[str, list[Record]]

    @property
    def jobs(self) -> list[int]:
        return list(dict.fromkeys(item.job for item in self.items))


def group(items: Sequence[Item], records: Sequence[Record], names: Sequence[str], category: str, kind: str) -> Group:
    """The group of a category and kind; "all": of every category, what two of them hold counted once."""
    wanted = [item for item in items if item.kind == kind and category in (ALL, item.category)]
    if category == ALL:
        wanted = _once(wanted)
    jobs = {item.job for item in wanted}
    done: dict[tuple[int, int], set[str]] = {}
    for record in records:
        if record.job in jobs:
            done.setdefault((record.job, record.repeat), set()).add(record.method)
    whole = {key for key, methods in done.items() if set(names) <= methods}
    by_name: dict[str, list[Record]] = {name: [] for name in names}
    for record in records:
        if (record.job, record.repeat) in whole:
            by_name[record.method].append(record)
    finished = {job for job, _ in whole}
    return Group(category, kind, [item for item in wanted if item.job in finished], by_name)


def _once(items: Sequence[Item]) -> list[Item]:
    """Items without the jobs whose prompts an earlier job has: suites overlap (Spec-Bench holds MT-Bench), and a prompt that
    counted twice would make the whole look surer than it is."""
    prompts: dict[int, tuple[tuple[int, ...], ...]] = {}
    for item in items:
        prompts[item.job] = (*prompts.get(item.job, ()), item.ids)
    first = {each: job for job, each in reversed(prompts.items())}
    return [item for item in items if first[prompts[item.job]] == item.job]


def rows_of(one: Group, peers: Sequence[str], memory: bool = True) -> list[dict[str, Any]]:
    """A row a method and peer, in order; see docs/metrics.md."""
    pace = {name: paces(records, one.jobs) for name, records in one.records.items()}
    plain = Totals.of(one.records["plain"])
    rows = []
    for name, records in one.records.items():
        row: dict[str, Any] = {"method": name, "peer": name in peers, "tokens_per_s": round(tokens_per_s(records), 2)}
        row["over"] = {
            other: faster(pace[name], pace[other]) for other in ("plain", *peers) if other != name and other in pace
        }
        differs = [d for record in records for d in record.differs or ()]
        compared = all(record.differs is not None for record in records)
        row["equal"] = not differs if differs or compared else None
        row["differing"] = len({d.item for d in differs})
        if name not in peers:
            row |= _row(Totals.of(records), plain, records)
            row["first_token_ms"] = round(
                statistics.median((r.prefill_us + r.round_us[0]) / 1e3 for r in records if r.round_us), 3
            )
            row["prefill_ms"] = round(statistics.median(r.prefill_us / 1e3 for r in records), 3)
            peaks = [r.peak_bytes for r in records if r.peak_bytes is not None]
            row["peak_bytes"] = max(peaks) if peaks and memory else None
        rows.append(row)
    return rows


def _row(total: Totals, plain: Totals, records: Sequence[Record]) -> dict[str, Any]:
    c, v = measured_costs(total, plain)
    length, nodes = _over(total.depth, total.rounds), _over(total.drafted, total.rounds)
    row: dict[str, Any] = {
        "rounds": total.rounds,
        "acceptance_length": round(total.acceptance_length, 4),
        "nodes": {
            "proposed": round(nodes, 3),
            "verified": round(nodes + 1, 3),
            "accepted": round(_over(total.accepted, total.rounds), 4),
        },
        "draft_length": round(length, 3),
        "share": {
            "draft": round(_over(total.draft_s, total.round_s), 4),
            "verify": round(_over(total.verify_s, total.round_s), 4),
            "overhead": round(1 - _over(total.draft_s + total.verify_s, total.round_s), 4),
        },
        "accepted_lengths": {str(k): n for k, n in sorted(total.lengths.items())},
    }
    if total.drafted:
        row |= {
            "alpha": round(total.alpha, 4),
            "draft_efficiency": round(_over(total.accepted, total.drafted), 4),
            "by_depth": [
                [round(total.accepted_at[d] / total.tested_at[d], 4), total.tested_at[d]]
                for d in sorted(total.tested_at)
            ],
            "c": round(c, 4),
            "v": round(v, 4),
            "expected": {
                "papers": round(expected_speedup(total.alpha, length, c), 4),
                "ours": round(_over(total.acceptance_length, length * c + v), 4),
            },
        }
    if calibrated := [record for record in records if record.calibration]:
        row["calibration"] = _calibration(calibrated)
    return row


def _calibration(records: Sequence[Record]) -> dict[str, Any]:
    """The expected calibration error, and for each tenth of predicted probability that has any: mean prediction, share
    accepted, nodes reached, nodes offered."""
    bins = [Bin(*map(sum, zip(*each, strict=True))) for each in zip(*(r.calibration for r in records), strict=True)]
    return {
        "error": round(calibration_error(bins), 4),
        "bins": [
            [round(one.predicted / one.reached, 4), round(one.accepted / one.reached, 4), one.reached, one.offered]
            for one in bins
            if one.reached
        ],
    }


def pairs_of(one: Group, peers: Sequence[str]) -> list[dict[str, Any]]:
    """Every two drafting methods on the same jobs: is a faster, does a accept more?"""
    names = [name for name in one.records if name not in peers and name != "plain"]
    pace = {name: paces(one.records[name], one.jobs) for name in names}
    alpha = {name: _by_job(one.records[name], one.jobs, "alpha") for name in names}
    length = {name: _by_job(one.records[name], one.jobs, "acceptance_length") for name in names}
    return [
        {
            "a": a,
            "b": b,
            "speed": faster(pace[a], pace[b]),
            "alpha": _more(alpha[a], alpha[b]),
            "acceptance_length": _more(length[a], length[b]),
        }
        for a, b in itertools.combinations(names, 2)
    ]


def _more(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    gain = statistics.mean(a) - statistics.mean(b)
    return {"gain": round(gain, 4), "p": round(paired_permutation(a, b), 6)}


def summarise(folder: RunFolder) -> dict[str, Any]:
    """All figures of a run, finished or not: provenance, and for each kind and category the rows of `rows_of`."""
    header = folder.header
    identity: Mapping[str, Any] = header["identity"]
    items, records, tokens = folder.items, folder.records, folder.tokens
    names, peers = [*identity["methods"], *identity["peers"]], list(identity["peers"])
    categories = list(dict.fromkeys(item.category for item in items))
    groups: list[dict[str, Any]] = []
    pairs: dict[str, list[dict[str, Any]]] = {}
    for kind in KINDS:
        for category in [ALL, *(categories if len(categories) > 1 else [])]:
            one = group(items, records, names, category, kind)
            if not one.items:
                continue
            rows = rows_of(one, peers)
            repeated = [repetition(tokens[item.number]) for item in one.items if item.number in tokens]
            groups.append(
                {
                    "kind": kind,
                    "category": category,
                    "prompts": len(one.items),
                    "repeated_4grams": round(statistics.mean(repeated), 4) if repeated else None,
                    "rows": rows,
                }
            )
            if category == ALL:
                pairs[kind] = pairs_of(one, peers)
    settings = Settings.of_record(identity["settings"])
    drafts = {name: read_method(name, settings.options).draft for name in identity["methods"]}
    watched = watched_figures(folder.watched.lines, header.get("costs"), settings)
    for entry in groups:
        for row in entry["rows"]:
            draft = drafts.get(row["method"])
            if entry["kind"] == "steady" and entry["category"] == ALL and draft in watched:
                row["overlap"] = watched[draft]["overlap"]
    expected = len({item.job for item in items}) * len(names) * settings.repeats
    return {
        "finished": {"records": len(records), "of": expected},
        "sessions": header["sessions"],
        "circumstances": identity["circumstances"],
        "compiled": identity["compiled"],
        "settings": identity["settings"],
        "suites": header.get("suites", []),
        "drawn": header.get("drawn", {}),
        "groups": groups,
        "pairs": pairs,
        "costs": header.get("costs"),
        "fits": header.get("fits", {}),
        "watched": watched,
        "drafts": drafts,
    }
