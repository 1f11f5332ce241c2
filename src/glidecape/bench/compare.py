"""Compare methods on one target: one process, one cache, one timer; the order of methods rotates prompt by prompt, so a
drifting machine hurts all alike. Outputs are compared token by token with plain decoding as they are made.

A greedy continuation *loops* when its second half repeats an earlier span of 8 tokens, the same one, three times or more;
those are reported apart, because a loop is easy to guess and says little about a draft.
"""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..decode import decode, generate
from ..drafting.drafter import Drafter
from ..drafting.expansion import Cape
from ..drafting.methods import DRAFTLESS, AnyDraft, make_drafter, parse_method
from ..errors import InputError
from ..models.target import Target
from ..sampling import SamplingParams
from ..significance import bootstrap_ratio, paired_permutation
from ..stats import Stats, loops, merged, repetition
from .prompts import digest_of

BATCH = 16  # rows of the pass that sorts prompts


@dataclass(frozen=True)
class Settings:
    temperature: float = 0.0
    max_new_tokens: int = 128
    prompt_tokens: int = 0
    limit: int = 32
    looping: int = 16
    repeats: int = 3
    draft_length: int = 5
    bins: tuple[int, ...] = Cape.PAPER
    threshold: float = 0.3


def _provenance(command: str) -> dict[str, Any]:
    import transformers

    here = Path(__file__).resolve().parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return {
        "command": command,
        "commit": commit.stdout.strip() or "not a checkout",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


class _Reference:
    """transformers' own `generate` on the same weights, dtype and threads; prefill taken off its time."""

    def __init__(self, source: str, target: Target) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(source, dtype=target.dtype).to(target.device).eval()

    @torch.no_grad()
    def run(self, prompt: list[int], settings: Settings) -> tuple[list[int], float]:
        ids = torch.tensor([prompt], device=self.model.device)
        # The mask is spelled out: generate would guess it from the pad token, and hide a prompt's own end-of-text tokens.
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": settings.temperature > 0,
            "pad_token_id": 0,
            "eos_token_id": None,
        }
        if settings.temperature > 0:
            options |= {"temperature": settings.temperature, "top_k": 0}
        times = []
        for new in (1, settings.max_new_tokens):
            started = time.perf_counter()
            out = self.model.generate(ids, max_new_tokens=new, **options)
            times.append(time.perf_counter() - started)
        return out[0, len(prompt) :].tolist(), times[1] - times[0]


def _run(target: Target, drafter: Drafter, prompt: list[int], params: SamplingParams) -> tuple[list[int], Stats]:
    stats, tokens = Stats(), []
    for event in decode(target, drafter, [prompt], params, stats):
        tokens += event.tokens
    return tokens, stats


def _drafters(drafts: Mapping[str, AnyDraft], methods: list[str], settings: Settings) -> dict[str, Drafter]:
    made: dict[str, Drafter] = {}
    for name in methods:
        key, _, method = name.rpartition(":")
        base, _ = parse_method(method)
        model = None if base in DRAFTLESS else drafts.get(key or base)
        if base not in DRAFTLESS and model is None:
            raise InputError(f"'{name}' needs a draft named '{key or base}': give --draft {key or base}=FOLDER")
        made[name] = make_drafter(method, model, settings.draft_length, settings.bins, settings.threshold)
    return made


def compare(
    target: Target,
    drafts: Mapping[str, AnyDraft],
    methods: list[str],
    prompts: list[str],
    settings: Settings,
    reference_source: str | None,
    command: str = "",
) -> dict[str, Any]:
    """Run every method on every prompt; see the module.

    Returns:
        provenance, settings, prompts used, and for "steady" and "looping" prompts a row a method: tokens/s (median over
        repeats), speed-up over plain (with a 95 % bootstrap interval over prompts and a paired permutation p-value) and
        over transformers, acceptance length, alpha, draft efficiency, nodes a round, share of drafting, whether all
        tokens equal plain decoding's. `repeated_4grams`: mean share of repeated
        spans of 4 in plain decoding's output.
    Raises:
        InputError: plain is missing among the methods, an unknown method, or no usable prompt.
    """
    if "plain" not in methods:
        methods = ["plain", *methods]
    drafters = _drafters(drafts, methods, settings)
    params = SamplingParams(settings.temperature, max_new_tokens=settings.max_new_tokens, ignore_eos=True, seed=11)
    ids = [target.encode(p) for p in prompts]
    ids = [p[: settings.prompt_tokens] if settings.prompt_tokens else p for p in ids]
    ids = [p for p in ids if len(p) + settings.max_new_tokens <= target.context]
    if not ids:
        raise InputError("every prompt is longer than the target's context: set --prompt-tokens")
    groups, drawn = _sort_prompts(target, ids, params, settings)
    # What every method must emit, made as it is measured: batch 1. It warms up, too.
    chosen = [i for group in groups.values() for i in group]
    expected = {i: _run(target, drafters["plain"], ids[i], params)[0] for i in chosen}
    reference = _Reference(reference_source, target) if reference_source else None
    if reference:
        reference.run(ids[0][:16], Settings(max_new_tokens=4))
    for drafter in drafters.values():
        _run(target, drafter, ids[0], SamplingParams(max_new_tokens=8))
    result: dict[str, Any] = {
        "provenance": _provenance(command),
        "settings": asdict(settings),
        "prompts": {name: len(group) for name, group in groups.items()}
        | {"drawn": drawn, "sha256": digest_of(prompts)},
        "repeated_4grams": {
            name: round(statistics.mean(repetition(expected[i]) for i in group), 4)
            for name, group in groups.items()
            if group
        },
    }
    total = sum(map(len, groups.values())) * settings.repeats
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=total)
        for name, group in groups.items():
            if not group:
                result[name] = []
                continue
            runs: dict[str, list[list[Stats]]] = {m: [[] for _ in range(settings.repeats)] for m in methods}
            unequal = dict.fromkeys(methods, 0)
            reference_times = [[0.0, 0.0] for _ in range(settings.repeats)]
            reference_unequal = 0
            for repeat in range(settings.repeats):
                for turn, i in enumerate(group):
                    for k in range(len(methods)):
                        method = methods[(k + turn) % len(methods)]
                        tokens, stats = _run(target, drafters[method], ids[i], params)
                        unequal[method] += tokens != expected[i]
                        runs[method][repeat].append(stats)
                    if reference:
                        tokens, seconds = reference.run(ids[i], settings)
                        reference_unequal += settings.temperature == 0 and tokens != expected[i]
                        reference_times[repeat][0] += len(tokens) - 1
                        reference_times[repeat][1] += seconds
                    bar.advance(task)
            result[name] = _rows(runs, unequal, reference_times if reference else None, reference_unequal)
    return result


def _sort_prompts(
    target: Target, ids: list[list[int]], params: SamplingParams, settings: Settings
) -> tuple[dict[str, list[int]], dict[str, int]]:
    """Which prompts' plain continuations loop: prompts are drawn until `limit` don't; up to `looping` of the others."""
    groups: dict[str, list[int]] = {"steady": [], "looping": []}
    limits = {"steady": settings.limit, "looping": settings.looping}
    drawn = {"steady": 0, "looping": 0}
    for first in range(0, len(ids), BATCH):
        rows = list(range(first, min(first + BATCH, len(ids))))
        for i, one in zip(rows, generate(target, [ids[i] for i in rows], params=params), strict=True):
            kind = "looping" if settings.temperature == 0 and loops(one.tokens) else "steady"
            drawn[kind] += len(groups["steady"]) < settings.limit
            if len(groups[kind]) < limits[kind]:
                groups[kind].append(i)
        if len(groups["steady"]) == settings.limit:
            break
    return groups, drawn


def _rows(
    runs: dict[str, list[list[Stats]]], unequal: dict[str, int], times: list[list[float]] | None, reference_unequal: int
) -> list[dict[str, Any]]:
    """A row a method; `runs[method][repeat]` holds the prompts in order."""
    plain = [merged(each).tokens_per_s for each in runs["plain"]]
    plain_pace = [_pace(each) for each in zip(*runs["plain"], strict=True)]
    peer = [n / s for n, s in times] if times else None
    rows = []
    for method, repeats in runs.items():
        totals = [merged(each) for each in repeats]
        speeds = [total.tokens_per_s for total in totals]
        one, pace = totals[0], [_pace(each) for each in zip(*repeats, strict=True)]
        row = {
            "method": method,
            "tokens_per_s": round(statistics.median(speeds), 1),
            "over_plain": round(statistics.median(a / b for a, b in zip(speeds, plain, strict=True)), 3),
            "over_transformers": None,
            "acceptance_length": round(one.acceptance_length, 3),
            "alpha": round(one.alpha, 4),
            "draft_efficiency": round(one.draft_efficiency, 4),
            "nodes_a_round": round(one.drafted / one.rounds, 2),
            "draft_share": round(sum(t.draft_s for t in totals) / sum(t.total_s for t in totals), 3),
            "equal": unequal[method] == 0,
            "alpha_by_prompt": [round(one.alpha, 4) for one in repeats[0]],
        }
        if method != "plain":
            row["over_plain_95"] = bootstrap_ratio(plain_pace, pace)
            row["over_plain_p"] = round(paired_permutation(plain_pace, pace), 6)
        if peer:
            row["over_transformers"] = round(statistics.median(a / b for a, b in zip(speeds, peer, strict=True)), 3)
        rows.append(row)
    if peer:
        row = {"method": "transformers generate", "tokens_per_s": round(statistics.median(peer), 1)}
        row["over_plain"] = round(statistics.median(b / a for a, b in zip(plain, peer, strict=True)), 3)
        rows.append(row | {"over_transformers": 1.0, "equal": reference_unequal == 0})
    return rows


def _pace(repeats: tuple[Stats, ...]) -> float:
    """Seconds a token on one prompt, the median over repeats."""
    return statistics.median(one.total_s / one.emitted for one in repeats)


def report(result: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    columns = [
        "method",
        "tokens_per_s",
        "over_plain",
        "over_plain_95",
        "over_transformers",
        "acceptance_length",
        "alpha",
    ]
    columns += ["nodes_a_round", "draft_share", "equal"]
    for name in ("steady", "looping"):
        if not result[name]:
            continue
        table = Table(
            title=f"{name} continuations, {result['prompts'][name]} prompts, T={result['settings']['temperature']}"
        )
        for column in columns:
            table.add_column(column.replace("_", " "), justify="left" if column == "method" else "right")
        for row in result[name]:
            table.add_row(*(str(row.get(c, "")) if row.get(c) is not None else "" for c in columns))
        console.print(table)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in result["repeated_4grams"].items())
    console.print(f"share of repeated spans of 4 tokens in plain decoding's output: {shares}")
    console.print(result["provenance"])
