"""Rounds that are timed in the loop itself, and forgotten: the batch is as before each of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from .batch.batch import Batch
from .core.cache import KVCache
from .core.params import SamplingParams
from .core.stats import Stats
from .core.tree import TokenTree
from .drafting.drafter import Drafter, NoDraft
from .engine.decode import new_rows
from .engine.engine import Engine
from .engine.round import run_round
from .target.target import Target

ALONE = 8  # rounds of one kind after which the next are among their like
LIMIT_S = 1.0  # a cell that has taken more is measured once after its warm-up
SPREAD = 4  # tokens by which one row of a batch is shorter than the one before, up to eight


class Sized(NoDraft):
    """Proposes `limit` copies of the root, so that verification of any size can be timed."""

    def __init__(self, most: int) -> None:
        self.limit, self.most = 0, most

    def budget(self, tokens: int) -> int:
        return 1 + self.most

    def propose(self, batch: Batch) -> TokenTree:
        roots = batch.roots
        tree = TokenTree(roots, 1 + self.limit)
        above = torch.zeros_like(roots)[:, None]
        for _ in range(self.limit):
            above = tree.add(above, roots[:, None], torch.zeros(tree.batch, 1, device=roots.device))
        return tree


def in_turn(
    timed: Sequence[Callable[[], float]], turns: int = 4, patience: float = 0.0, limit: float = math.inf
) -> list[list[float]]:
    """The times of each, all one after the other in each turn, since a machine that drifts slows all of them; the first turn is
    a warm-up, and left out. There are `turns`, more as long as all took less than `patience` seconds, and only two where they
    take more than `limit`."""
    times: list[list[float]] = [[] for _ in timed]
    while (
        len(times[0]) < 2
        or (len(times[0]) < turns and sum(map(sum, times)) < limit)
        or (len(times[0]) < 40 and sum(map(sum, times)) < patience)
    ):
        for column, one in zip(times, timed, strict=True):
            column.append(one())
    return [column[1:] for column in times]


def among_its_like(once: Callable[[], float]) -> float:
    """The fastest of rounds that follow others of their kind."""
    times: list[float] = []
    while len(times) < 2 * ALONE and (len(times) < 4 or sum(times) < LIMIT_S / 2):
        times.append(once())
    return min(times[len(times) // 2 :])


def unread_batch(target: Target, drafter: Drafter, count: int, context: int, temperature: float, nodes: int) -> Batch:
    """So many rows with so many tokens before them, which nobody has read: for rounds of so many nodes, most."""
    params = SamplingParams(temperature, max_new_tokens=nodes + 1, ignore_eos=True)
    text = [(7 * i * i + i) % target.vocab_size for i in range(context)]
    batch = Engine(target, drafter, count, context + nodes + 2, nodes + 1).batch
    # Lengths differ, as in every batch of texts.
    for row in new_rows(target, [text[: max(2, context - SPREAD * (i % 8))] for i in range(count)], params):
        batch.admit(row)
    batch.use(0, count)
    for cache in _caches(batch):
        for one in (*cache.keys, *cache.values):
            one.fill_(0.01)  # memory that was never written may be read from one page
        cache.commit(_read(batch, cache))
    return batch


def _read(batch: Batch, cache: KVCache) -> list[int]:
    """How much of each row a cache holds before a round: all but the root. After a chain whose every token was accepted the
    draft has not run the last of them, either: so it is in every second row of a batch."""
    return [row.prompt_length - 1 - (i % 2 if cache is not batch.cache else 0) for i, row in enumerate(batch.rows)]


def _caches(batch: Batch) -> list[KVCache]:
    own = getattr(batch.draft, "own", None)
    return [batch.cache] if own is None else [batch.cache, own]


def forgotten_round(target: Target, drafter: Drafter, batch: Batch) -> Stats:
    """What a round took; the batch is as before then."""
    stats = Stats()
    run_round(target, drafter, batch, stats)
    for row in batch.rows:
        del row.tokens[row.prompt_length :]
    for cache in _caches(batch):
        cache.truncate(_read(batch, cache))
    return stats
