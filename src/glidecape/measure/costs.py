"""v(n), the time to verify n nodes over a plain step, measured in the loop itself."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..batch.batch import Batch
from ..core.params import SamplingParams
from ..core.stats import Stats
from ..core.tree import TokenTree
from ..drafting.drafter import NoDraft
from ..engine.decode import start
from ..engine.round import run_round
from ..errors import InputError
from ..target.target import Target

SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 17, 24, 33, 48)


@dataclass(frozen=True)
class Verification:
    """v(n) at `sizes` (the root counted), and the seconds of a plain step."""

    sizes: tuple[int, ...]
    ratios: tuple[float, ...]
    step_s: float


class _Sized(NoDraft):
    """Proposes `length` copies of the root, so that verification of any size can be timed in the loop itself."""

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
    params: SamplingParams,
    sizes: Sequence[int] = SIZES,
    repeats: int = 15,
) -> Verification:
    """v(n) for each of `sizes`; medians, sizes taking turns round by round.

    `prompts` is the batch that is decoded meanwhile. All of a round but drafting counts: the target's forward, each node's
    law (noise or arg-max), the walk, the cache. Differs from `bench.costs`, which times forwards alone.

    Raises:
        InputError: sizes that do not begin with 1, or a prompt too long for the rounds that are timed.
    """
    if list(sizes)[:1] != [1]:
        raise InputError("v(n) is a ratio over one node: let the sizes begin with 1")
    drafter, longest = _Sized(max(sizes) - 1), max(map(len, prompts))
    room = min(target.context - longest, (1 + repeats) * sum(sizes))
    state = start(target, drafter, prompts, SamplingParams(params.temperature, max_new_tokens=room, ignore_eos=True))
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(1 + repeats):
        for size in sizes:
            if any(row.finish or row.budget <= size for row in state.rows):
                break
            drafter.length, one = size - 1, Stats()
            run_round(target, drafter, state, one)
            if turn:  # the first is a warm-up
                times[size].append(one.total_s - one.draft_s)
    if not all(times.values()):
        raise InputError(
            f"prompts of {longest} tokens leave no room to time verification in {target.context}: cut them"
        )
    step = statistics.median(times[1])
    ratios = tuple(round(statistics.median(times[size]) / step, 4) for size in sizes)
    return Verification(tuple(sizes), ratios, step)
