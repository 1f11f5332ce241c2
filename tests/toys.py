"""Toy models for exact tests: logits are a function of the whole context, on the shipped cache and masks.

A toy stores each token's id as its key and the token's position as its value, with one layer, one head and head
dimension 1. A forward reads its context back through the mask, so a wrong compaction, mask or position is seen at once:
the positions of what a query sees must be 0, 1, 2, … up to its own.
"""

from __future__ import annotations

import copy
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import compress

import torch
from torch import Tensor

from glidecape.batch.batch import Batch
from glidecape.batch.row import Emitted
from glidecape.core.cache import KVCache
from glidecape.core.masks import tree_mask
from glidecape.core.params import SamplingParams
from glidecape.core.verify import verdict_numbers
from glidecape.drafting.drafter import Drafter, ModelDrafter
from glidecape.drafts.base import Queries
from glidecape.engine.decode import start
from glidecape.engine.round import run_round
from glidecape.target.target import TargetOutput

Context = tuple[int, ...]
Rule = Callable[[Context], Tensor]


def random_rule(name: str, vocab: int = 3, sharpness: float = 1.0) -> Rule:
    """Logits `(vocab,)` float64, normal numbers seeded by `name` and the whole context."""
    known: dict[Context, Tensor] = {}

    def logits(context: Context) -> Tensor:
        if context not in known:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{context}".encode()))
            known[context] = sharpness * torch.randn(vocab, dtype=torch.float64, generator=generator)
        return known[context]

    return logits


def scripted_rule(script: Sequence[Sequence[int]], vocab: int) -> Rule:
    """After a context of n tokens the choices are `script[n]`, most probable first, whatever the tokens are."""

    def logits(context: Context) -> Tensor:
        made = torch.full((vocab,), -8.0, dtype=torch.float64)
        for rank, token in enumerate(script[len(context)] if len(context) < len(script) else [0]):
            made[token] = -2.0 * rank
        return made

    return logits


def _read(
    rule: Rule, vocab: int, tokens: Tensor, positions: Tensor, cache: KVCache, mask: Tensor | None, lenient: bool
) -> Tensor:
    """Write the tokens and compute their logits `(batch, nodes, vocab)` from what each query sees."""
    queries = tokens.shape[1]
    keys, values = cache.write(0, tokens[:, None, :, None].double(), positions[:, None, :, None].double())
    slots = keys.shape[2]
    if mask is None:
        mask = torch.ones(queries, slots, dtype=torch.bool).tril(slots - queries)[None, None]
    seen = mask.expand(tokens.shape[0], 1, queries, slots)[:, 0].tolist()
    ids, places = keys[:, 0, :, 0].long().tolist(), values[:, 0, :, 0].long().tolist()
    out = torch.zeros(*tokens.shape, vocab, dtype=torch.float64)
    out[..., -1] = 9.0  # what a dummy says
    for row, own in enumerate(positions.tolist()):
        for query, position in enumerate(own):
            found = list(compress(places[row], seen[row][query]))
            at = dict(zip(found, compress(ids[row], seen[row][query]), strict=True))
            context = tuple(map(at.get, range(position + 1)))
            right = len(at) == len(found) == position + 1 and None not in context
            dummy = lenient and cache.scratch > 0 and position == cache.host_lengths[row]  # runs the root once more
            assert right or dummy, f"row {row} query {query} at {position} sees {found}"
            if right:
                out[row, query] = rule(context)
    return out


class ToyTarget:
    """What `run_round` needs of a target."""

    device = torch.device("cpu")
    context = 10_000
    chunk = 4
    tokenizer = None
    verdict = staticmethod(verdict_numbers)

    def __init__(self, rule: Rule, vocab: int = 3, eos: tuple[int, ...] = ()) -> None:
        self.rule, self.vocab_size, self.eos_token_ids = rule, vocab, eos
        self.forwards = 0

    def new_cache(self, batch: int, capacity: int, limit_bytes: int | None = None, hidden: bool = False) -> KVCache:
        return KVCache([(1, 1)], batch, capacity, torch.float64, limit_bytes=limit_bytes)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache,
        ancestors: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> TargetOutput:
        self.forwards += 1
        mask = tree_mask(cache, ancestors, tokens.shape[1])
        return TargetOutput(_read(self.rule, self.vocab_size, tokens, positions, cache, mask, lenient=False))


class ToyDraft:
    """A `DraftModel`.

    Rows that stopped early run dummies, the root once more, which may see anything: nothing may come of their logits.
    """

    reads_hidden, trusts_own = False, True

    def __init__(self, rule: Rule, vocab: int = 3, max_lag: int = 1000) -> None:
        self.rule, self.vocab, self.max_lag = rule, vocab, max_lag

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        return KVCache([(1, 1)], batch, capacity, torch.float64)

    def catch_up(self, tokens: Tensor, positions: Tensor, own: KVCache, target_cache: KVCache) -> None:
        mask = tree_mask(own, None, tokens.shape[1])
        _read(self.rule, self.vocab, tokens, positions, own, mask, lenient=False)

    def step(self, queries: Queries, own: KVCache, target_cache: KVCache) -> Tensor:
        tokens = queries.tokens
        assert queries.scratch_positions.shape[1] == own.scratch + tokens.shape[1]
        mask = tree_mask(own, queries.ancestors, tokens.shape[1])
        return _read(self.rule, self.vocab, tokens, queries.positions, own, mask, lenient=True)


class ReRun(ToyDraft):
    """A `ToyDraft` that, as EAGLE does, runs accepted tokens once more."""

    trusts_own = False


class ToyHeads:
    """A `DepthModel`: the law of depth d is a rule of the committed tokens and d, and knows nothing of the root."""

    reads_hidden = False

    def __init__(self, rule: Rule, max_lag: int = 4) -> None:
        self.rule, self.max_lag = rule, max_lag

    def all_depths(self, target_cache: KVCache) -> Tensor:
        known = [
            tuple(target_cache.keys[0][row, 0, :length, 0].long().tolist())
            for row, length in enumerate(target_cache.host_lengths)
        ]
        return torch.stack([torch.stack([self.rule((*seen, -d)) for d in range(self.max_lag)]) for seen in known])


def check_invariants(state: Batch) -> None:
    """Committed slots hold every known token but the last one, at its place; the draft trusts true tokens only."""
    own = getattr(state.draft, "own", None)
    caches = [state.cache, *([own] if own is not None and own.keys else [])]
    assert state.cache.host_lengths == [len(row.tokens) - 1 for row in state.rows]
    for cache in caches:
        assert cache.scratch == 0
        assert cache.lengths.tolist() == cache.host_lengths
        for i, row in enumerate(state.rows):
            length = cache.length(i)
            assert length <= len(row.tokens) - 1
            assert cache.keys[0][i, 0, :length, 0].tolist() == row.tokens[:length]
            assert cache.values[0][i, 0, :length, 0].tolist() == list(range(length))


def run_checked(
    target: ToyTarget,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    **options: object,
) -> tuple[list[list[int]], list[Emitted], list[str | None]]:
    """Decode with the shipped `start` and `run_round`, all invariants checked after each round.

    Returns:
        The new tokens of each prompt, all events in order, and how each prompt ended.
    """
    state = start(target, drafter, prompts, params, **options)  # type: ignore[arg-type]
    rows, events = list(state.rows), []
    check_invariants(state)
    while True:
        for slot in reversed([i for i, row in enumerate(state.rows) if row.finish is not None]):
            state.release(slot)
        if not state.rows:
            break
        events += run_round(target, drafter, state)  # type: ignore[arg-type]
        check_invariants(state)
        if isinstance(drafter, ModelDrafter):
            assert all((column >= 0).any() for column in state.draft.ran), "a draft step ran no node"
    return [row.new_tokens for row in rows], events, [row.finish for row in rows]


class EnumeratingChance:
    """A `Chance` that follows a script of outcomes and, past its end, takes the first possible one.

    Going through all scripts depth first (`next_script`) visits every outcome of a random procedure once, and `weight`
    is the probability of the outcome just run.
    """

    def __init__(self, script: Sequence[int] = ()) -> None:
        self.script, self.taken, self.options, self.weight = list(script), [], [], 1.0

    def _choose(self, law: dict[int, float]) -> int:
        possible = [outcome for outcome, p in law.items() if p > 0]
        at = len(self.taken)
        index = self.script[at] if at < len(self.script) else 0
        self.taken.append(index)
        self.options.append(len(possible))
        self.weight *= law[possible[index]]
        return possible[index]

    def bernoulli(self, probability: float) -> bool:
        assert 0 <= probability <= 1
        return bool(self._choose({1: probability, 0: 1 - probability}))

    def categorical(self, law: Tensor) -> int:
        assert law.dtype == torch.float64
        assert abs(float(law.sum()) - 1) < 1e-12
        return self._choose(dict(enumerate(law.tolist())))

    def next_script(self) -> list[int] | None:
        """The script after this run's, or None if it was the last."""
        for at in reversed(range(len(self.taken))):
            if self.taken[at] + 1 < self.options[at]:
                return [*self.taken[:at], self.taken[at] + 1]
        return None


def exact_law(
    target: ToyTarget,
    drafter: Drafter,
    prompt: Sequence[int],
    params: SamplingParams,
    length: int = 3,
) -> Counter[Context]:
    """The joint law of the first `length` emitted tokens, by enumeration of every random outcome of every round.

    Histories that led to the same tokens, the same trusted length of the draft's cache and the same next length are merged
    before the next round; `check_invariants` makes sure that their caches hold the same.
    """
    law: Counter[Context] = Counter()
    first = start(target, drafter, [prompt], params)  # type: ignore[arg-type]
    waiting: dict[tuple[Context, tuple[int, ...]], tuple[float, Batch]] = {((), ()): (1.0, first)}
    while waiting:
        key = min(waiting, key=lambda k: len(k[0]))  # shortest first: nothing is merged into a state already run
        reach, state = waiting.pop(key)
        script: list[int] | None = []
        while script is not None:
            own = copy.deepcopy(state)
            own.rows[0].chance = chance = EnumeratingChance(script)
            if hasattr(drafter, "expansion"):
                drafter.expansion.chance = chance  # for test expansions that draw more than a chain
            run_round(target, drafter, own)  # type: ignore[arg-type]
            check_invariants(own)
            weight, tokens = reach * chance.weight, tuple(own.rows[0].new_tokens)
            if len(tokens) >= length:
                law[tokens[:length]] += weight
            else:
                held = (own.draft.own.host_lengths[0], *(own.draft.lengths or ())) if hasattr(own.draft, "own") else ()
                after = (tokens, held)
                waiting[after] = (weight + (waiting[after][0] if after in waiting else 0.0), own)
            script = chance.next_script()
    return law


def total_variation(one: Counter[Context], other: Counter[Context]) -> float:
    return sum(abs(one[key] - other[key]) for key in {*one, *other}) / 2
