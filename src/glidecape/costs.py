"""What the parts of a round cost on this machine, timed in the loop itself: v(n), a plain step, and a step of a draft."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .batch.batch import Batch
from .core.params import SamplingParams
from .core.stats import Stats
from .core.tree import TokenTree
from .drafting.drafter import ModelDrafter, NoDraft
from .drafting.expansions.chain import Chain
from .drafting.stop import FixedLength
from .drafts.base import DraftModel
from .engine.decode import start
from .engine.round import run_round, seconds
from .errors import InputError
from .target.target import Target

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 24, 33, 48)
REPEATS = 15
LONG, SHORT = 4, 1  # draft lengths whose difference is the cost of steps


@dataclass(frozen=True)
class Verification:
    """v(n), the time to verify n nodes over a plain step, at `sizes` (the root counted); and the seconds of a plain step."""

    sizes: tuple[int, ...]
    ratios: tuple[float, ...]
    step_s: float


class _Sized(NoDraft):
    """Proposes `length` copies of the root, so that verification of any size can be timed."""

    def __init__(self, most: int) -> None:
        self.length, self.most = 0, most

    def budget(self, tokens: int) -> int:
        return 1 + self.most

    def propose(self, batch: Batch) -> TokenTree:
        roots = batch.roots
        tree = TokenTree(roots, 1 + self.length)
        above = torch.zeros_like(roots)[:, None]
        for _ in range(self.length):
            above = tree.add(above, roots[:, None], torch.zeros(tree.batch, 1, device=roots.device))
        return tree


def verification_ratios(
    target: Target,
    prompts: Sequence[Sequence[int]],
    temperature: float = 0.0,
    sizes: Sequence[int] = SIZES,
    repeats: int = REPEATS,
) -> Verification:
    """v(n) for each of `sizes`; medians, sizes taking turns round by round, every round right after the prompts.

    `prompts` is the batch that is decoded. All of a round but drafting counts: the target's forward, each node's law (noise
    or arg-max), the verdict, the cache.

    Raises:
        InputError: sizes that do not begin with 1, or a prompt that leaves no room in the context for the largest.
    """
    if list(sizes)[:1] != [1]:
        raise InputError("v(n) is a ratio over one node: let the sizes begin with 1")
    drafter, params = (
        _Sized(max(sizes) - 1),
        SamplingParams(temperature, max_new_tokens=max(sizes) + 1, ignore_eos=True),
    )
    batch = start(target, drafter, prompts, params)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(1 + repeats):
        for size in sizes:
            drafter.length, one = size - 1, Stats()
            run_round(target, drafter, batch, one)
            for row in batch.rows:
                del row.tokens[row.prompt_length :]
            batch.cache.truncate([row.prompt_length - 1 for row in batch.rows])
            if turn:  # the first is a warm-up
                times[size].append(one.total_s - one.draft_s)
    step = statistics.median(times[1])
    ratios = tuple(round(statistics.median(times[size]) / step, 4) for size in sizes)
    return Verification(tuple(sizes), ratios, step)


@torch.no_grad()
def draft_step_s(target: Target, model: DraftModel, prompt: Sequence[int], repeats: int = REPEATS) -> float:
    """Seconds of a draft step after a prompt: the difference of a long and a short chain, medians."""
    drafters = {length: ModelDrafter(model, Chain(), FixedLength(length)) for length in (LONG, SHORT)}
    params = SamplingParams(max_new_tokens=LONG + 2)
    batches = {length: start(target, drafter, [prompt], params) for length, drafter in drafters.items()}
    times: dict[int, list[float]] = {length: [] for length in drafters}
    for _ in range(repeats):
        for length, drafter in drafters.items():
            batch, stats = batches[length], Stats()
            started = seconds(batch, stats)
            drafter.propose(batch)
            times[length].append(seconds(batch, stats) - started)
            batch.draft.own.keep([[]])  # forget the proposal: the next one begins at the same root
    return max(0.0, statistics.median(times[LONG]) - statistics.median(times[SHORT])) / (LONG - SHORT)
