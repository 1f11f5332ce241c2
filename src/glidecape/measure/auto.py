"""`auto` against constants, against an oracle, and against itself without its parts, over a mixed load.

All kinds of prompts and temperatures take turns, so that what `auto` learned of one must not spoil another. A constant is a
method whose proposals have a fixed length; the best one is found on the very prompts that are measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any

from ..bench.draw import draw
from ..bench.settings import Settings
from ..bench.suites import Suite
from ..core.params import SamplingParams
from ..drafting.auto.drafter import AutoDrafter
from ..drafting.drafter import Drafter, NoDraft
from ..errors import InputError
from ..progress import bar
from ..significance import bootstrap_ratio
from ..target.target import Target
from .knowing import Oracle
from .runs import PLAIN, Runs, figures, interleaved, merged, paces, run
from .table import Table

ORACLE = "oracle"


@dataclass(frozen=True)
class Job:
    """A prompt (token ids) of a suite's category, and how it is decoded."""

    category: str
    prompt: tuple[int, ...]
    params: SamplingParams


def mixed_jobs(target: Target, suites: Sequence[Suite], each: Sequence[Settings]) -> list[Job]:
    """The prompts of all categories at all temperatures, which take turns; greedily those that don't loop.

    Raises:
        InputError: none is left.
    """
    columns: dict[tuple[str, float], list[Job]] = {}
    for settings in each:
        for item in draw(target, list(suites), replace(settings, looping=0)).items:
            job = Job(item.category, tuple(item.ids), settings.params(item.id, item.chat))
            columns.setdefault((item.category, settings.temperature), []).append(job)
    if not columns:
        raise InputError("every greedy continuation loops: give more prompts, or a temperature above 0")
    return [job for turn in zip_longest(*columns.values()) for job in turn if job is not None]


def study_auto(
    target: Target, drafters: Mapping[str, Drafter], auto: str, jobs: Sequence[Job], repeats: int = 1
) -> list[Table]:
    """A table of cells, and one of all methods in each of them.

    Args:
        drafters: plain decoding, constants, and `AutoDrafter`s, by name.
        auto: the name of the one that is judged; the others are compared with it.

    Raises:
        InputError: `auto` is none of them, or there is no constant.
    """
    judged = drafters.get(auto)
    fixed = [name for name, one in drafters.items() if not isinstance(one, AutoDrafter | NoDraft)]
    if not isinstance(judged, AutoDrafter) or not fixed:
        raise InputError(f"this study needs '{auto}' and at least one method of a fixed length to compare it with")
    oracle = Oracle(judged)
    with bar("reading what the target writes", len(jobs)) as shown:
        for job in jobs:
            (text,) = run(target, NoDraft(), [job.prompt], job.params).tokens
            oracle.learn_text(target, job.prompt, job.params, text)
            shown.advance()
    runs = interleaved(
        target, {**drafters, ORACLE: oracle}, [[job.prompt] for job in jobs], [job.params for job in jobs], repeats
    )
    cells = cells_of(jobs)
    summary = Table(f"{auto} beside the best constant of each cell and the oracle")
    every = Table("all methods")
    for name, places in cells.items():
        own: Runs = {method: [[batches[i] for i in places] for batches in each] for method, each in runs.items()}
        rows = _rows(own, fixed)
        every.rows += [{"cell": name, "prompts": len(places)} | row for row in rows.values()]
        best = max(fixed, key=lambda method: rows[method]["over_plain"])
        summary.rows.append(
            {
                "cell": name,
                "prompts": len(places),
                "best_constant": best,
                "its_speed": rows[best]["over_plain"],
                "auto": rows[auto]["over_plain"],
                "auto_95": rows[auto].get("over_plain_95"),
                "oracle": rows[ORACLE]["over_plain"],
                "over_constant": round(rows[auto]["over_plain"] / rows[best]["over_plain"], 3),
                "over_constant_95": bootstrap_ratio(paces(own, best), paces(own, auto)),
                "share": rows[auto].get("share"),
                "its_share": rows[best].get("share"),
            }
        )
    return [summary, every]


def cells_of(jobs: Sequence[Job]) -> dict[str, list[int]]:
    """The jobs' numbers by category and temperature, by temperature, and all of them.

    >>> greedy, sampled = SamplingParams(), SamplingParams(1.0)
    >>> list(cells_of([Job("code", (1,), greedy), Job("chat", (2,), greedy), Job("code", (1,), sampled)]).items())[2:]
    [('code, T=1', [2]), ('all, T=0', [0, 1]), ('all, T=1', [2]), ('all', [0, 1, 2])]
    """
    heats = [f"T={job.params.temperature:g}" for job in jobs]
    names = [(f"{job.category}, {heat}", f"all, {heat}", "all") for job, heat in zip(jobs, heats, strict=True)]
    found: dict[str, list[int]] = {name: [] for name in dict.fromkeys(chain(*zip(*names, strict=True)))}
    for i, own in enumerate(names):
        for name in own:
            found[name].append(i)
    return found


def _rows(runs: Runs, fixed: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Figures of each method, with the share of the oracle's gain over plain decoding that it has."""
    kept = ("method", "tokens_per_s", "over_plain", "over_plain_95", "acceptance_length", "nodes", "equal")
    rows = {}
    for name in runs:
        found = figures(name, runs)
        rows[name] = {key: found[key] for key in kept if key in found}
        total = merged(runs[name][0])
        rows[name]["depths"] = round(total.depths / total.rounds, 2)
    gain = rows[ORACLE]["over_plain"] - 1
    for name, row in rows.items():
        if name != PLAIN and gain > 0:
            row["share"] = round((row["over_plain"] - 1) / gain, 3)
    return rows
