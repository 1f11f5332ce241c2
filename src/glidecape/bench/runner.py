"""The run: every method on every prompt, in one process, on one kind of cache, with one timer.

The order of methods rotates from job to job, so a machine that drifts hurts all alike. Outputs are compared with plain
decoding's token by token, as they are made. Everything measured is written down at once; a run that was stopped goes on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..core.params import NOISE, SamplingParams
from ..core.stats import Stats
from ..disturbance import Share
from ..drafting.auto.drafter import AutoDrafter
from ..drafting.auto.reliability import reliability
from ..drafting.drafter import Drafter
from ..drafting.methods import AnyDraft
from ..drafts.base import DepthModel
from ..engine.decode import decode
from ..errors import InputError, OutputError
from ..fit import with_fitted_threshold
from ..interface.load import set_prices
from ..progress import bar
from ..target.target import Target
from .costs import measure_costs
from .draw import categories_of, draw, draw_category, in_jobs
from .methods import Method
from .peers.base import Peer
from .provenance import Peak, circumstances, session
from .records import Counts, Difference, Item, Record, RunFolder
from .settings import Settings
from .suites import Suite
from .watch import watch

SHORT = 8  # tokens of a warm-up


@dataclass(frozen=True)
class Plan:
    """What is to be run.

    Attributes:
        drafts: draft models by name; `digests` identifies their weights.
        calibration: prompts that SVIP's threshold is fitted on, for every method with svip and no threshold of its own; None:
            no fitting.
    """

    target: Target
    drafts: Mapping[str, AnyDraft]
    digests: Mapping[str, str]
    methods: Sequence[Method]
    suites: Sequence[Suite]
    settings: Settings
    peers: Sequence[Peer] = ()
    calibration: Suite | None = None

    def identity(self) -> dict[str, Any]:
        """All that the records depend on."""
        return {
            "settings": asdict(self.settings),
            "methods": [one.name for one in self.methods],
            "peers": {peer.name: peer.version for peer in self.peers},
            "suites": {suite.name: suite.sha256 for suite in self.suites},
            "prompts": {suite.name: len(suite.prompts) for suite in self.suites},
            "calibration": None if self.calibration is None else self.calibration.sha256,
            "target": self.target.weights_digest,
            "drafts": dict(self.digests),
            "compiled": self.target.compiled is not None,
            "circumstances": circumstances(self.target),
        }


def run(plan: Plan, folder: RunFolder, command: str = "") -> None:
    """Do what is left of a run.

    Raises:
        InputError: no usable prompt, a calibration prompt that is one of the test's, or options that cannot be used.
        OutputError: greedily in float32, a method's output is not plain decoding's.
    """
    if plan.peers and plan.settings.batch > 1:
        raise InputError("peers decode one prompt at a time: leave --peers empty with --batch above 1")
    _refuse_seen(plan)
    for one in plan.methods:
        one.drafter(plan.drafts)  # bad options are an error now, not after an hour
    suites = [{"name": s.name, "source": s.source, "sha256": s.sha256, "prompts": len(s.prompts)} for s in plan.suites]
    folder.keep(sessions=[*folder.header["sessions"], session(command)], suites=suites)
    _draw(plan, folder)
    if not folder.items:
        raise InputError(
            "every greedy continuation loops: give more prompts, --looping to measure those, or a temperature above 0"
        )
    drafters = _drafters(plan, folder)
    _measure(plan, folder, drafters)
    if "costs" not in folder.header:
        lengths = sorted(len(item.ids) for item in folder.items)
        folder.keep(costs=measure_costs(plan.target, plan.drafts, lengths[len(lengths) // 2]))
    if plan.settings.batch == 1:
        _watch(plan, folder)


def _draw(plan: Plan, folder: RunFolder) -> None:
    """Sort the prompts, a category at a time; those that were sorted before a stop stay."""
    counts: dict[str, Any] = dict(folder.header.get("drawn", {}))
    folder.prompts.keep_only(lambda line: line["category"] in counts)
    for suite, category in categories_of(plan.suites):
        if category in counts:
            continue
        total = sum(prompt.category == category for prompt in suite.prompts)
        with bar(f"sorting prompts, {category}", total) as shown:
            one = draw_category(plan.target, suite, category, plan.settings, shown.advance)
        folder.prompts.append(*(asdict(item) for item in in_jobs(one.items, plan.settings.batch, folder.items)))
        counts |= one.counts
        folder.keep(drawn=counts)


def _refuse_seen(plan: Plan) -> None:
    if plan.calibration is None:
        return
    if not any(one.open_threshold for one in plan.methods):
        raise InputError("there is no SVIP threshold to fit: name a method with +svip, or leave --svip-fit out")
    tested = {turn: prompt.id for suite in plan.suites for prompt in suite.prompts for turn in prompt.turns}
    for prompt in plan.calibration.prompts:
        if prompt.turns[0] in tested:
            raise InputError(
                f"calibration prompt {prompt.id} is prompt {tested[prompt.turns[0]]} of the test: fit on other prompts"
            )


def _calibration(plan: Plan) -> tuple[list[list[int]], SamplingParams]:
    """Token ids of the calibration prompts, greedily of those that don't loop, as what is tested, unless all do; and how
    they are decoded. An answer ends where it ends: what comes after is easy to predict."""
    assert plan.calibration is not None
    items = draw(plan.target, [plan.calibration], replace(plan.settings, batch=1)).items
    chosen = [item for item in items if item.kind == "steady"] or items
    return [list(item.ids) for item in chosen], plan.settings.params("calibration", chat=chosen[0].chat)


def _drafters(plan: Plan, folder: RunFolder) -> dict[str, Drafter]:
    """A drafter a method, SVIP's threshold fitted where that is asked for; a fit is made once a run."""
    fits: dict[str, Any] = dict(folder.header.get("fits", {}))
    fitted = [one.name for one in plan.methods if plan.calibration is not None and one.open_threshold]
    prompts, params = _calibration(plan) if set(fitted) - fits.keys() else ([], plan.settings.params("calibration"))
    made: dict[str, Drafter] = {}
    for one in plan.methods:
        made[one.name] = one.drafter(plan.drafts)
        if one.name not in fitted:
            continue
        if one.name not in fits:
            fits[one.name] = asdict(with_fitted_threshold(plan.target, made[one.name], prompts, params)[1])
            folder.keep(fits=fits)
        made[one.name] = one.drafter(plan.drafts, fits[one.name]["threshold"])
    set_prices(plan.target, made.values(), alone=plan.settings.batch == 1)
    return made


def _measure(plan: Plan, folder: RunFolder, drafters: Mapping[str, Drafter]) -> None:
    settings, jobs = plan.settings, jobs_of(folder.items)
    peers = {peer.name: peer for peer in plan.peers}
    names = [*drafters, *peers]
    done = {(r.job, r.repeat, r.method) for r in folder.records}
    left = len(jobs) * len(names) * settings.repeats - len(done)
    if not left:
        return
    peak, share = Peak(plan.target.device), Share()
    with _told(share, plan.target, folder), bar("measuring", left + len(done), start=len(done)) as shown:
        _warm_up(plan.target, drafters, peers, list(jobs[0][0].ids))
        for repeat in range(settings.repeats):
            for turn, items in enumerate(jobs):
                order = names[turn % len(names) :] + names[: turn % len(names)]
                todo = [name for name in order if (items[0].job, repeat, name) not in done]
                expected = _expected(plan.target, drafters["plain"], items, settings, folder) if todo else []
                for name in todo:
                    if name in peers:
                        record = run_peer(peers[name], items, settings, expected)
                    else:
                        compared = settings.temperature == 0 or settings.sampling == NOISE
                        known = expected if compared else None
                        with share.counting():
                            record, _ = run_job(plan.target, drafters[name], items, settings, known, peak)
                        _refuse_difference(plan, items, replace(record, method=name))
                    folder.add(replace(record, repeat=repeat, method=name))
                    shown.advance(what=f"measuring {name}, {items[0].category}")


@contextmanager
def _told(share: Share, target: Target, folder: RunFolder) -> Iterator[None]:
    """Keep the share with this session, of a stopped run, too; on a GPU the thread that decodes waits anyway."""
    try:
        yield
    finally:
        if target.device.type == "cpu":
            *before, now = folder.header["sessions"]
            folder.keep(sessions=[*before, now | {"share": share.value}])


def jobs_of(items: Sequence[Item]) -> list[list[Item]]:
    """The items of each job, in order."""
    jobs: dict[int, list[Item]] = {}
    for item in items:
        jobs.setdefault(item.job, []).append(item)
    return list(jobs.values())


def run_job(
    target: Target,
    drafter: Drafter,
    items: Sequence[Item],
    settings: Settings,
    expected: Sequence[Sequence[int]] | None = None,
    peak: Peak | None = None,
) -> tuple[Record, list[list[int]]]:
    """Decode the prompts of a job side by side; the record (without repeat and method), and the tokens.

    Args:
        expected: outputs to compare with, token by token as rounds are made; None: compare nothing.
    """
    stats, seen = Stats(), Stats()
    record = Record(items[0].job, 0, "", [Counts() for _ in items])
    tokens: list[list[int]] = [[] for _ in items]
    found: dict[int, Difference] = {}
    if peak:
        peak.reset()
    params = [settings.params(item.id, item.chat) for item in items]
    if isinstance(drafter, AutoDrafter):
        drafter.offered = []
    for event in decode(target, drafter, [item.ids for item in items], params, stats):
        if stats.rounds > seen.rounds:  # the first row of a round
            record.draft_us.append(round(1e6 * (stats.draft_s - seen.draft_s)))
            record.verify_us.append(round(1e6 * (stats.verify_s - seen.verify_s)))
            record.round_us.append(round(1e6 * (stats.total_s - seen.total_s)))
            seen = replace(stats)
        row, own = record.rows[event.row], tokens[event.row]
        for name in ("drafted", "depth", "accepted", "tested", "emitted"):
            getattr(row, name).append(getattr(event.stats, name))
        if expected is not None and event.row not in found:
            different = _first_difference(items[event.row].number, expected[event.row], len(own), event.tokens)
            if different:
                found[event.row] = different
        own += event.tokens
    if expected is not None:
        for i, (right, own) in enumerate(zip(expected, tokens, strict=True)):
            if i not in found and len(own) < len(right):
                found[i] = Difference(items[i].number, len(own), right[len(own)], -1)
    if isinstance(drafter, AutoDrafter) and drafter.offered:
        record.calibration = [
            (one.offered, one.reached, round(one.predicted, 4), one.accepted) for one in reliability(drafter.offered)
        ]
        drafter.offered = None
    record.prefill_us = round(1e6 * stats.prefill_s)
    record.peak_bytes = peak.read() if peak else None
    record.differs = None if expected is None else list(found.values())
    return record, tokens


def _first_difference(item: int, right: Sequence[int], start: int, tokens: Sequence[int]) -> Difference | None:
    for at, token in enumerate(tokens, start):
        expected = right[at] if at < len(right) else -1
        if token != expected:
            return Difference(item, at, expected, token)
    return None


def run_peer(peer: Peer, items: Sequence[Item], settings: Settings, expected: Sequence[Sequence[int]]) -> Record:
    """One prompt by another library; its tokens are compared where it is greedy, and a difference is only noted."""
    (item,) = items
    tokens, seconds = peer.run(list(item.ids), settings.params(item.id, item.chat))
    record = Record(
        item.job, 0, "", [Counts(emitted=[max(0, len(tokens) - 1)])], round_us=[round(1e6 * seconds)], peer=True
    )
    if settings.temperature == 0:
        different = _first_difference(item.number, expected[0], 0, tokens)
        if not different and len(tokens) < len(expected[0]):
            different = Difference(item.number, len(tokens), expected[0][len(tokens)], -1)
        record.differs = [different] if different else []
    return record


def _warm_up(target: Target, drafters: Mapping[str, Drafter], peers: Mapping[str, Peer], prompt: list[int]) -> None:
    for drafter in drafters.values():
        for _ in decode(target, drafter, [prompt], SamplingParams(max_new_tokens=SHORT, ignore_eos=True)):
            pass
    for peer in peers.values():
        peer.run(prompt, SamplingParams(max_new_tokens=SHORT, ignore_eos=True))


def _expected(
    target: Target, plain: Drafter, items: Sequence[Item], settings: Settings, folder: RunFolder
) -> list[list[int]]:
    """What every method must emit for a job: plain decoding's tokens with the job's own batch, made once, not timed."""
    known = folder.tokens
    if any(item.number not in known for item in items):
        _, made = run_job(target, plain, items, settings)
        fresh = {item.number: tokens for item, tokens in zip(items, made, strict=True) if item.number not in known}
        folder.outputs.append(*({"item": number, "tokens": tokens} for number, tokens in fresh.items()))
        known |= fresh
    return [known[item.number] for item in items]


def _refuse_difference(plan: Plan, items: Sequence[Item], record: Record) -> None:
    """Greedily in float32 a difference ends the run: figures of a method that emits other tokens mean nothing.

    Quantized products round differently for one row and for many.
    """
    exact = plan.target.dtype == torch.float32 and plan.target.quantized is None
    if not record.differs or plan.settings.temperature > 0 or not exact:
        return
    first = record.differs[0]
    name = next(item.id for item in items if item.number == first.item)
    raise OutputError(
        f"{record.method} on prompt {name}: new token {first.at} is {first.got}, plain decoding's is {first.expected}; "
        "run glidecape certify with this method and prompt to see whether rounding explains it"
    )


def _watch(plan: Plan, folder: RunFolder) -> None:
    """Write down the law of each draft that a method uses, on the first prompts of each category."""
    settings = plan.settings
    chosen: list[Item] = []
    for item in folder.items:
        alike = [one for one in chosen if (one.category, one.kind) == (item.category, item.kind)]
        if item.kind == "steady" and len(alike) < settings.watch:
            chosen.append(item)
    names = dict.fromkeys(one.draft for one in plan.methods if one.draft is not None)
    models = {name: m for name in names if not isinstance(m := plan.drafts[name], DepthModel)}
    done = {(line["item"], line["draft"]) for line in folder.watched.lines}
    with bar("watching drafts", len(chosen) * len(models), start=len(done)) as shown:
        for item in chosen:
            for name, model in models.items():
                if (item.number, name) not in done:
                    params = settings.params(item.id, item.chat)
                    seen = watch(plan.target, model, list(item.ids), params, settings.watch_depth)
                    folder.watched.append({"item": item.number, "draft": name, **asdict(seen)})
                    shown.advance()
