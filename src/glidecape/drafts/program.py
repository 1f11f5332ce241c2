"""A draft's step as a compiled program: the same code that runs eagerly, on a cache of traced tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..core.cache import KVCache
from ..core.transfer import to_device
from ..target.packages import Program, Run, compiled
from ..target.program import EXAMPLE, KEPT, KEYS, NODES, ROWS, SCRATCH, SLOTS, TracedCache, chain, traced
from .base import Queries, Ranked, Step
from .sharing import SharedDraft

DraftCache = KVCache | TracedCache  # what a step runs on: eagerly, or in an export

if TYPE_CHECKING:
    from ..target.target import Target

TOP = 16  # tokens that a step ranks
TARGET_KEYS, TARGET_SLOTS = Dim("target_keys", min=1, max=2**31), Dim("target_slots", min=2, max=2**31)


class NetworkDraft(SharedDraft, ABC):
    """What the drafts with a network of their own share: a step that is compiled or not.

    Attributes:
        module: the network, bound to its target.
        layers_read: target layers whose keys and values it reads.
        uses_parents: do its steps below the root read their parents' hidden states?
    """

    module: Any
    base: str
    max_lag: int
    reads_hidden: bool
    layers_read: Sequence[int] = ()
    uses_parents = False

    def __init__(self) -> None:
        self.compiled: dict[bool, Run] = {}  # by: is it a step below the root, where that makes a difference
        self.chains: dict[tuple[int, int], Run] = {}  # by length and ranked tokens

    @abstractmethod
    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """See `DraftModel`."""

    @abstractmethod
    def hidden(self, queries: Queries, own: DraftCache, target_cache: DraftCache) -> Tensor:
        """Last hidden states `(batch, queries, width)`; keys and values are written."""

    def run(self, queries: Queries, own: DraftCache, target_cache: DraftCache, kept: Tensor | None = None) -> Tensor:
        """Logits `(batch, kept, vocab)`, eagerly or in an export; `kept (batch, kept)`: of these queries, None: of all."""
        hidden = self.hidden(queries, own, target_cache)
        if kept is not None:
            hidden = hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[2]))
        return self.module.logits(hidden)

    def step(self, queries: Queries, own: KVCache, target_cache: KVCache) -> Tensor:
        """See `DraftModel`."""
        found = self.ranked_step(queries, own, target_cache)
        return self.run(queries, own, target_cache) if found is None else found.logits

    def ranked_step(
        self,
        queries: Queries,
        own: KVCache,
        target_cache: KVCache,
        kept: Tensor | None = None,
        ranking: tuple[Tensor, Tensor] | None = None,
    ) -> Step | None:
        """A step by a compiled program, which also ranks tokens; None where there is none for it.

        Args:
            kept: `(batch, kept)`, see `run`.
            ranking: see `Laws.ranking`; None: greedily.
        """
        q = queries
        run = self.compiled.get(self.uses_parents and q.parents is not None)
        if run is None or target_cache.longest == 0:  # a program reads at least one key
            return None
        (rows, count), device = q.tokens.shape, q.tokens.device
        slots = torch.arange(max(own.end_of_write(count), target_cache.longest), device=device)
        scratch = own.scratch + count
        ancestors = chain(rows, count, scratch, device) if q.ancestors is None else q.ancestors
        # The positions of committed tokens that are run again are those of their slots, as everywhere.
        inputs = [q.tokens, q.positions, slots[: own.longest + scratch], ancestors, own.lengths, q.scratch_positions]
        inputs += [slots[: target_cache.longest], target_cache.lengths]
        inputs += self._stores(own, target_cache)
        if self.uses_parents and q.parents is not None:
            inputs.append(q.parents)
        kept = slots[:count].expand(rows, -1) if kept is None else kept
        inputs += [kept, *(greedily(rows, kept.shape[1], self.vocab_size, device) if ranking is None else ranking)]
        logits, scores, *ranked = run([one.contiguous() for one in inputs])
        return Step(logits, scores, Ranked(*ranked))

    def draft_chain(
        self,
        tokens: Tensor,
        last: list[int],
        own: KVCache,
        target_cache: KVCache,
        size: tuple[int, int],
        ranking: tuple[Tensor, Tensor] | None,
    ) -> Ranked | None:
        """All steps of a chain in one program; None where there is none for it.

        Args:
            tokens: `(batch, queries)` that were not run yet, padded; the root of row i is in column `last[i]`.
            size: tokens to draft, and tokens to rank at each depth.
            ranking: see `Laws.ranking`, with noise for each depth; None: greedily.

        Returns:
            What may follow each node of the chain, with depths for queries. The root is in scratch slot 0 of `own` then, and
            all nodes but the last in the slots after it.
        """
        run = self.chains.get(size)
        if run is None or target_cache.longest == 0:
            return None
        (rows, queries), device, length = tokens.shape, tokens.device, size[0]
        committed = [n + count for n, count in zip(own.host_lengths, last, strict=True)]
        slots = torch.arange(max(own.end_of_write(queries + length), target_cache.longest), device=device)
        positions = own.lengths[:, None] + slots[:queries]
        inputs = [tokens, positions, slots[: own.longest + queries], chain(rows, queries, queries, device), own.lengths]
        inputs += [positions, slots[: target_cache.longest], target_cache.lengths]
        inputs += self._stores(own, target_cache)
        inputs += [to_device(last, device), slots[: max(committed) + length]]
        inputs += greedily(rows, length, self.vocab_size, device) if ranking is None else ranking
        found = run([one.contiguous() for one in inputs])
        own.commit(last)
        own.scratch = length
        return Ranked(*found)

    def traced_target(self, step: StepInputs) -> TracedCache:
        """The target's cache inside a program."""
        keys, values = (dict(zip(self.layers_read, one, strict=True)) for one in (step.target_keys, step.target_values))
        hidden = step.hidden[1] if step.hidden else None
        return TracedCache(keys, values, step.target_lengths, step.target_slots.shape[0], hidden=hidden)

    def _stores(self, own: KVCache, target_cache: KVCache) -> list[Tensor]:
        """What a program reads and writes of both caches."""
        stores = [*own.own_keys, *own.own_values]
        stores += [target_cache.own_keys[layer] for layer in self.layers_read]
        stores += [target_cache.own_values[layer] for layer in self.layers_read]
        return stores + ([own.own_hidden, target_cache.own_hidden] if self.reads_hidden else [])

    @property
    def vocab_size(self) -> int:
        return self.module.target_parts.target.vocab_size

    def compile_chain(self, length: int, ranked: int, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """Draft chains of this length, with so many tokens ranked at each depth, by one program from now on; False where it
        cannot be."""
        size = length, ranked
        if size in self.chains:
            return True
        if self.module.target_parts.target.placed:
            return False
        name = f"a chain of {length} of the {self.module.kind} draft" + (
            f", {ranked} tokens each" if ranked > 1 else ""
        )
        program = self._program(name, lambda: self._chain_example(length, ranked), chain=length, ranked=ranked)
        run = compiled(program, mode, say)
        if run is not None:
            self.chains[size] = run
        return run is not None

    def _chain_example(self, length: int, ranked: int) -> tuple[nn.Module, tuple[Any, ...], tuple[Any, ...]]:
        _, *examples = self._example(False)
        step, sizes = (StepInputs._make(one[0]) for one in examples)
        (rows, queries), device = step.tokens.shape, step.tokens.device
        longest = step.own_slots.shape[0] - step.scratch_positions.shape[1]
        step = step._replace(
            own_slots=torch.arange(longest + queries, device=device),
            ancestors=chain(rows, queries, queries, device),
            scratch_positions=step.positions,
        )
        sizes = sizes._replace(ancestors={0: ROWS, 1: NODES, 2: NODES}, scratch_positions={0: ROWS, 1: NODES})
        last = torch.full((rows,), queries - 1, device=device)
        slots = torch.arange(longest + 2 * queries + length, device=device)
        ranking = torch.ones(rows, device=device), torch.zeros(rows, length, self.vocab_size, device=device)
        inputs = (tuple(step), last, slots, *ranking)
        return (
            ChainProgram(self, length, ranked),
            inputs,
            (tuple(sizes), {0: ROWS}, {0: Dim("ends", min=length + 1, max=2**31)}, {0: ROWS}, {0: ROWS}),
        )

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """Draft by compiled programs from now on; False where it stays eager, which is said. See `Target.compile`."""
        if self.compiled:
            return True
        if self.module.target_parts.target.placed:
            return False  # of which the target says so
        for below_root in (False, True) if self.uses_parents else (False,):
            run = compiled(self.program(below_root), mode, say)
            if run is None:
                self.compiled = {}
                return False
            self.compiled[below_root] = run
        return True

    def program(self, below_root: bool) -> Program:
        """Its step, to be compiled."""
        name = f"a step of the {self.module.kind} draft" + (" below the root" if below_root else "")
        return self._program(name, lambda: self._example(below_root), below_root=below_root)

    def _program(self, name: str, make: Callable[[], tuple[Any, ...]], **facts: Any) -> Program:
        parts = self.module.target_parts
        # The target's configuration says how its rotary embedding turns, which is in the program.
        facts |= {"kind": self.module.kind, "config": asdict(self.module.config)}
        facts["target"] = parts.target.config.to_json_string()
        return Program(name, facts, (self.module,), make, (parts,), in_8_bits=True, device=parts.target.device)

    def _example(self, below_root: bool) -> tuple[nn.Module, tuple[Any, ...], tuple[Any, ...]]:
        """The program, example inputs, and which of their sizes are dynamic."""
        target: Target = self.module.target_parts.target
        (rows, queries, wanted, scratch, keys, slots), device = EXAMPLE, target.device
        seen, target_slots = keys - 10, slots - 4
        own, cache = self.new_cache(rows, slots), target.new_cache(rows, target_slots, hidden=self.reads_hidden)
        start = torch.full((rows,), keys - scratch, device=device)
        positions = start[:, None] + torch.arange(scratch, device=device)
        if self.module.rotary_layer is not None:
            self.module.rotary(positions)  # makes its table
        tokens = torch.zeros(rows, queries, dtype=torch.long, device=device)
        inputs = StepInputs(
            tokens=tokens,
            positions=positions[:, scratch - queries :].contiguous(),
            own_slots=torch.arange(keys, device=device),
            ancestors=chain(rows, queries, scratch, device),
            own_lengths=start,
            scratch_positions=positions,
            target_slots=torch.arange(seen, device=device),
            target_lengths=torch.full((rows,), seen, device=device),
            own_keys=own.keys,
            own_values=own.values,
            target_keys=[cache.keys[layer] for layer in self.layers_read],
            target_values=[cache.values[layer] for layer in self.layers_read],
            hidden=[one.hidden for one in (own, cache) if self.reads_hidden and one.hidden is not None],
        )
        of_tokens, stores = {0: ROWS, 1: NODES}, [{0: ROWS, 2: SLOTS}] * len(own.keys)
        read = [{0: ROWS, 2: TARGET_SLOTS}] * len(self.layers_read)
        hidden = [{0: ROWS, 1: SLOTS}, {0: ROWS, 1: TARGET_SLOTS}] if self.reads_hidden else []
        of_own = ({0: KEYS}, {0: ROWS, 1: NODES, 2: SCRATCH}, {0: ROWS}, {0: ROWS, 1: SCRATCH})
        of_target = ({0: TARGET_KEYS}, {0: ROWS})
        sizes = StepInputs._make((of_tokens, of_tokens, *of_own, *of_target, stores, stores, read, read, hidden))
        parents = [torch.zeros_like(tokens)] if below_root else []  # a tensor of its own: no alias
        kept = torch.arange(wanted, device=device).repeat(rows, 1)
        ranking = torch.ones(rows, device=device), torch.zeros(rows, wanted, self.vocab_size, device=device)
        return (
            DraftProgram(self),
            (tuple(inputs), parents, kept, *ranking),
            (tuple(sizes), [of_tokens] if below_root else [], {0: ROWS, 1: KEPT}, {0: ROWS}, {0: ROWS, 1: KEPT}),
        )


class StepInputs(NamedTuple):
    """The inputs of a draft's programs; while one is exported also the dynamic sizes of each.

    Attributes:
        tokens, positions, scratch_positions, ancestors: see `Queries`.
        own_slots, target_slots: `(keys,)` 0, 1, …: as many slots of the cache are read.
        own_lengths, target_lengths: `(rows,)` committed tokens.
        own_keys, own_values: of each of the draft's layers; target_keys, target_values: of each target layer that is read.
        hidden: hidden states of both caches, the draft's first; none where they are not read.
    """

    tokens: Any
    positions: Any
    own_slots: Any
    ancestors: Any
    own_lengths: Any
    scratch_positions: Any
    target_slots: Any
    target_lengths: Any
    own_keys: list[Any]
    own_values: list[Any]
    target_keys: list[Any]
    target_values: list[Any]
    hidden: list[Any]


class DraftProgram(nn.Module):
    """`NetworkDraft.run` of tensors alone, and the ranking of its logits: all that `NetworkDraft.ranked_step` gives."""

    def __init__(self, draft: NetworkDraft) -> None:
        super().__init__()
        self.module = draft.module
        parts = vars(draft.module.target_parts).values()
        self.shared = nn.ModuleList([part for part in parts if isinstance(part, nn.Module)])
        self.draft = [draft]

    def forward(
        self, inputs: tuple[Any, ...], parents: list[Tensor], kept: Tensor, sharpness: Tensor, noise: Tensor
    ) -> tuple[Tensor, ...]:
        """`inputs`: the fields of `StepInputs`, a plain tuple, because a program's signature names no class of ours."""
        logits = self.logits(StepInputs._make(inputs), parents, kept)
        scores, ranked = rank_first(logits, sharpness, noise, TOP)
        return logits, scores, *ranked

    def logits(self, s: StepInputs, parents: list[Tensor], kept: Tensor) -> Tensor:
        """`(rows, kept, vocab)`."""
        of_own = s.hidden[0] if s.hidden else None
        scratch = s.ancestors.shape[2]
        own = traced(s.own_keys, s.own_values, s.own_lengths, s.own_slots, s.tokens.shape[1], scratch, of_own)
        queries = Queries(s.tokens, s.positions, s.scratch_positions, s.ancestors, parents[0] if parents else None)
        return self.draft[0].run(queries, own, self.draft[0].traced_target(s), kept)


class ChainProgram(DraftProgram):
    """A whole chain: the step to the root, then each next token chosen and run, and what is ranked first at each depth."""

    def __init__(self, draft: NetworkDraft, length: int, ranked: int) -> None:
        super().__init__(draft)
        self.length, self.ranked = length, ranked

    def forward(  # type: ignore[override]
        self, inputs: tuple[Any, ...], last: Tensor, end_slots: Tensor, sharpness: Tensor, noise: Tensor
    ) -> tuple[Tensor, ...]:
        """See `NetworkDraft.draft_chain`; `end_slots`: as many as the longest row has at the end of its chain."""
        (draft,), step = self.draft, StepInputs._make(inputs)
        logits = self.logits(step._replace(scratch_positions=step.positions), [], last[:, None])
        of_own, target = step.hidden[0] if step.hidden else None, draft.traced_target(step)
        stores = [dict(enumerate(one)) for one in (step.own_keys, step.own_values)]
        roots, longest = step.own_lengths + last, end_slots.shape[0] - self.length
        found: list[Ranked] = []
        for depth in range(self.length):
            found.append(rank_first(logits, sharpness, noise[:, depth : depth + 1], self.ranked)[1])
            if depth < self.length - 1:
                token = found[-1].tokens[:, :, 0]
                own = TracedCache(stores[0], stores[1], roots, longest, longest + depth + 2, depth + 1, of_own)
                at = roots[:, None] + torch.arange(depth + 2, device=roots.device)
                parents = torch.full_like(token, depth) if draft.uses_parents else None
                logits = draft.run(Queries(token, at[:, -1:], at, parents=parents), own, target)
        return tuple(torch.cat(column, 1) for column in zip(*found, strict=True))


def rank_first(logits: Tensor, sharpness: Tensor, noise: Tensor, count: int) -> tuple[Tensor, Ranked]:
    """The scores `(batch, queries, vocab)` that tokens are ranked by, and the `count` first of them; see `Laws.ranking`."""
    wide = logits.float()
    scores = wide * sharpness[:, None, None] + noise
    values, tokens = scores.max(-1, keepdim=True) if count == 1 else scores.topk(min(count, scores.shape[-1]))
    log_q = wide.log_softmax(-1)
    q = log_q.exp()
    entropy = torch.special.entr(q).sum(-1)
    return scores, Ranked(tokens, values, log_q.gather(2, tokens), scores.logsumexp(-1), entropy, q.amax(-1))


@lru_cache(maxsize=8)
def greedily(rows: int, queries: int, vocab: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The ranking of greedy rows: logits as they are, and no noise."""
    return torch.ones(rows, device=device), torch.zeros(rows, queries, vocab, device=device)
