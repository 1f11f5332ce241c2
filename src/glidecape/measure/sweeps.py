"""The same methods over batch sizes, over context lengths, and over the length of what is generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import mean, median
from typing import Any

from ..bench.settings import Settings
from ..bench.suites import Suite
from ..core.params import SamplingParams
from ..core.stats import repetition
from ..drafting.drafter import Drafter
from ..errors import InputError
from ..target.target import Target
from .runs import PLAIN, Run, figures, interleaved, prompts_of
from .table import Table

FIRST = 128  # tokens of the first mark of long outputs


def study_batches(
    target: Target,
    drafters: Mapping[str, Drafter],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    sizes: Sequence[int] = (1, 4, 16),
    repeats: int = 1,
) -> Table:
    """A row a batch size and method; over plain decoding of the same batch. The same prompts in every size.

    Raises:
        InputError: fewer prompts than the largest batch.
    """
    if len(prompts) < max(sizes):
        raise InputError(f"a batch of {max(sizes)} needs as many prompts, and {len(prompts)} are left: give more")
    # A number of prompts that all sizes divide, where there are enough: then the rows hold the same work.
    count = len(prompts) // max(sizes) * max(sizes)
    table = Table(f"by batch, T={params.temperature:g}, {count} prompts")
    for size in sizes:
        batches = [prompts[i : i + size] for i in range(0, count, size)]
        runs = interleaved(target, drafters, batches, params, repeats)
        table.rows += [{"batch": size} | figures(name, runs) for name in drafters]
    return table


def study_contexts(
    target: Target,
    drafters: Mapping[str, Drafter],
    suites: Sequence[Suite],
    settings: Settings,
    lengths: Sequence[int] = (256, 1024, 4096),
    repeats: int = 1,
) -> Table:
    """A row a context length and method: prompts are padded in front with earlier text of their suite.

    Raises:
        InputError: a length that the target has no room for.
    """
    if max(lengths) + settings.max_new_tokens > target.context:
        raise InputError(
            f"contexts of {max(lengths)} tokens and {settings.max_new_tokens} new ones exceed the target's {target.context}"
        )
    table = Table(f"by context, T={settings.temperature:g}")
    for length in lengths:
        own = replace(settings, context=length)
        prompts = prompts_of(target, suites, own)
        runs = interleaved(target, drafters, [[p] for p in prompts], params_of(own), repeats)
        table.rows += [{"context": length, "prompts": len(prompts)} | figures(name, runs) for name in drafters]
    return table


def params_of(settings: Settings) -> SamplingParams:
    """One law for all prompts of a study. Outputs end early only where `stop_at_eos` is set: a text goes on past its end."""
    return settings.params("study")


def study_long(
    target: Target,
    drafters: Mapping[str, Drafter],
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    repeats: int = 1,
) -> Table:
    """A row a mark (128, 256, … tokens, up to max_new_tokens) and method: figures of everything up to the mark.

    Looping continuations stay in: `repeated_4grams` is the share of repeated spans of 4 tokens in plain decoding's output.
    """
    runs = interleaved(target, drafters, [[p] for p in prompts], params, repeats)
    table = Table(f"long outputs, T={params.temperature:g}, {len(prompts)} prompts")
    for mark in marks(params.max_new_tokens):
        plain = up_to(runs[PLAIN], mark)
        repeated = mean(repetition(one.tokens[0][:mark]) for one in runs[PLAIN][0])
        for name in drafters:
            seen = up_to(runs[name], mark)
            row: dict[str, Any] = {"tokens": mark, "method": name, "tokens_per_s": round(seen[0], 1)}
            row |= {"over_plain": round(seen[0] / plain[0], 3), "acceptance_length": round(seen[1], 3)}
            row["equal"] = all(
                a.tokens[0][:mark] == b.tokens[0][:mark] for a, b in zip(runs[name][0], runs[PLAIN][0], strict=True)
            )
            table.rows.append(row | {"repeated_4grams": round(repeated, 3)})
    return table


def marks(longest: int) -> list[int]:
    """Twice as many each time, the last one being all.

    >>> marks(4096), marks(300), marks(50)
    ([128, 256, 512, 1024, 2048, 4096], [128, 256, 300], [50])
    """
    made = []
    at = FIRST
    while at < longest:
        made.append(at)
        at *= 2
    return [*made, longest]


def up_to(repeats: Sequence[Sequence[Run]], mark: int) -> tuple[float, float]:
    """Tokens/s (median over repeats) and acceptance length up to the first round that reaches `mark` tokens."""
    speeds, tokens, rounds = [], 0, 0
    for batches in repeats:
        ends = [next((i for i, (n, _) in enumerate(one.marks) if n >= mark), one.calls - 1) for one in batches]
        emitted = sum(one.marks[i][0] for one, i in zip(batches, ends, strict=True))
        speeds.append(emitted / sum(one.marks[i][1] for one, i in zip(batches, ends, strict=True)))
        tokens, rounds = tokens + emitted, rounds + sum(i + 1 for i in ends)
    return median(speeds), tokens / rounds
