"""A draft's step as a compiled program: the same code that runs eagerly, on a cache of traced tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..core.cache import KVCache
from ..core.transfer import to_device
from ..target.packages import Program, Run, compiled
from ..target.program import KEYS, NODES, ROWS, SCRATCH, SLOTS, TracedCache, chain, traced
from .sharing import SharedDraft

if TYPE_CHECKING:
    from ..target.target import Target

COMMITTED = Dim("committed", min=1, max=2**31)
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
        self.chains: dict[tuple[int, bool], Run] = {}  # by: length, and whether noise is added

    @abstractmethod
    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """See `DraftModel`."""

    @abstractmethod
    def run(
        self,
        tokens: Tensor,
        positions: Tensor,
        own: Any,
        ancestors: Tensor | None,
        target_cache: Any,
        scratch_positions: Tensor,
        parents: Tensor | None = None,
    ) -> Tensor:
        """`DraftModel.step`, eagerly, on a `KVCache` or a `TracedCache`."""

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        own: KVCache,
        ancestors: Tensor | None,
        target_cache: KVCache,
        scratch_positions: Tensor,
        parents: Tensor | None = None,
    ) -> Tensor:
        """See `DraftModel`."""
        run = self.compiled.get(self.uses_parents and parents is not None)
        if run is None or target_cache.longest == 0:  # a program reads at least one key
            return self.run(tokens, positions, own, ancestors, target_cache, scratch_positions, parents)
        (rows, queries), device = tokens.shape, tokens.device
        slots = torch.arange(max(own.end_of_write(queries), target_cache.longest), device=device)
        scratch = own.scratch + queries
        if ancestors is None:
            ancestors = chain(rows, queries, scratch, device)
        # The positions of committed tokens that are run again are those of their slots, as everywhere.
        inputs = [tokens, positions, slots[: own.longest + scratch], ancestors, own.lengths, scratch_positions]
        inputs += [slots[: target_cache.longest], target_cache.lengths]
        inputs += self._stores(own, target_cache)
        if self.uses_parents and parents is not None:
            inputs.append(parents)
        return run([one.contiguous() for one in inputs])[0]

    def draft_chain(
        self, tokens: Tensor, last: list[int], own: KVCache, target_cache: KVCache, length: int, noise: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """All steps of a chain in one program; None where there is none for it.

        Args:
            tokens: `(batch, queries)` that were not run yet, padded; the root of row i is in column `last[i]`.
            length: tokens to draft.
            noise: `(batch, length, vocab)` to be added to the logits times the temperature; None: greedy.

        Returns:
            Tokens `(batch, length)` and their log-probabilities at temperature 1. The root is in scratch slot 0 of `own`
            then, and all nodes but the last in the slots after it.
        """
        run = self.chains.get((length, noise is not None))
        if run is None or target_cache.longest == 0:
            return None
        (rows, queries), device = tokens.shape, tokens.device
        committed = [n + count for n, count in zip(own.host_lengths, last, strict=True)]
        slots = torch.arange(max(own.end_of_write(queries + length), target_cache.longest), device=device)
        positions = own.lengths[:, None] + slots[:queries]
        inputs = [tokens, positions, slots[: own.longest + queries], chain(rows, queries, queries, device), own.lengths]
        inputs += [positions, slots[: target_cache.longest], target_cache.lengths]
        inputs += self._stores(own, target_cache)
        inputs += [to_device(last, device), slots[: max(committed)]]
        drafted, log_prob = run([one.contiguous() for one in (*inputs, *([] if noise is None else [noise]))])
        own.commit(last)
        own.scratch = length
        return drafted, log_prob

    def traced_target(
        self, keys: list[Tensor], values: list[Tensor], lengths: Tensor, slots: Tensor, hidden: Tensor | None
    ) -> TracedCache:
        """The target's cache inside a program; `slots (keys,)`: as many are read."""
        by_layer = [dict(zip(self.layers_read, one, strict=True)) for one in (keys, values)]
        return TracedCache(by_layer[0], by_layer[1], lengths, slots.shape[0], hidden=hidden)

    def _stores(self, own: KVCache, target_cache: KVCache) -> list[Tensor]:
        """What a program reads and writes of both caches."""
        stores = [*own.own_keys, *own.own_values]
        stores += [target_cache.own_keys[layer] for layer in self.layers_read]
        stores += [target_cache.own_values[layer] for layer in self.layers_read]
        return stores + ([own.own_hidden, target_cache.own_hidden] if self.reads_hidden else [])

    @property
    def vocab_size(self) -> int:
        return self.module.target_parts.target.vocab_size

    def has_chain(self, length: int, noisy: bool) -> bool:
        """Is there a program for chains of this length?"""
        return (length, noisy) in self.chains

    def compile_chain(self, length: int, noisy: bool, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """Draft chains of this length by one program from now on, greedily or with noise; False where it cannot be."""
        if (length, noisy) in self.chains:
            return True
        name = f"a chain of {length} of the {self.module.kind} draft" + (" with noise" if noisy else "")
        program = self._program(name, lambda: self._chain_example(length, noisy), chain=length, noisy=noisy)
        run = compiled(program, mode, say)
        if run is not None:
            self.chains[length, noisy] = run
        return run is not None

    def _chain_example(self, length: int, noisy: bool) -> tuple[nn.Module, tuple[Any, ...], tuple[Any, ...]]:
        _, example, dynamic = self._example(False)
        inputs: list[Any] = list(example[:13])
        rows, queries = inputs[0].shape
        device, longest = inputs[0].device, int(inputs[4].max())
        inputs[2], inputs[3] = torch.arange(longest + queries, device=device), chain(rows, queries, queries, device)
        inputs[5] = inputs[1]
        inputs += [torch.full((rows,), queries - 1, device=device), torch.arange(longest + queries - 1, device=device)]
        sizes = [*dynamic[:3], {0: ROWS, 1: NODES, 2: NODES}, dynamic[4], {0: ROWS, 1: NODES}, *dynamic[6:13]]
        sizes += [{0: ROWS}, {0: COMMITTED}]
        inputs.append([torch.zeros(rows, length, self.vocab_size, device=device)] if noisy else [])
        sizes.append([{0: ROWS}] if noisy else [])
        return ChainProgram(self, length), tuple(inputs), tuple(sizes)

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """Draft by compiled programs from now on; False where it stays eager, which is said. See `Target.compile`."""
        if self.compiled:
            return True
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
        return Program(name, facts, (self.module,), make, (parts,))

    def _example(self, below_root: bool) -> tuple[nn.Module, tuple[Any, ...], tuple[Any, ...]]:
        """The program, example inputs, and which of their sizes are dynamic."""
        target: Target = self.module.target_parts.target
        rows, queries, scratch, keys, seen, device = 2, 3, 5, 48, 40, self.module.target_parts.target.device
        own, cache = self.new_cache(rows, 64), target.new_cache(rows, 60, hidden=self.reads_hidden)
        start = torch.full((rows,), keys - scratch, device=device)
        positions = start[:, None] + torch.arange(scratch, device=device)
        if self.module.rotary_layer is not None:
            self.module.rotary(positions)  # makes its table
        inputs: list[Any] = [
            torch.zeros(rows, queries, dtype=torch.long, device=device),
            positions[:, scratch - queries :].contiguous(),
            torch.arange(keys, device=device),
            chain(rows, queries, scratch, device),
            start,
            positions,
            torch.arange(seen, device=device),
            torch.full((rows,), seen, device=device),
            own.keys,
            own.values,
            [cache.keys[layer] for layer in self.layers_read],
            [cache.values[layer] for layer in self.layers_read],
            [one.hidden for one in (own, cache) if self.reads_hidden and one.hidden is not None],
            [torch.zeros(rows, queries, dtype=torch.long, device=device)] if below_root else [],
        ]
        tree = {0: ROWS, 1: NODES, 2: SCRATCH}
        stores, read = [{0: ROWS, 2: SLOTS}] * len(own.keys), [{0: ROWS, 2: TARGET_SLOTS}] * len(self.layers_read)
        hidden = [{0: ROWS, 1: SLOTS}, {0: ROWS, 1: TARGET_SLOTS}] if self.reads_hidden else []
        dynamic: list[Any] = [
            {0: ROWS, 1: NODES},
            {0: ROWS, 1: NODES},
            {0: KEYS},
            tree,
            {0: ROWS},
            {0: ROWS, 1: SCRATCH},
        ]
        dynamic += [{0: TARGET_KEYS}, {0: ROWS}, stores, stores, read, read, hidden]
        dynamic.append([{0: ROWS, 1: NODES}] if below_root else [])
        return DraftProgram(self), tuple(inputs), tuple(dynamic)


class DraftProgram(nn.Module):
    """`NetworkDraft.run` of tensors alone; logits `(rows, queries, vocab)`."""

    def __init__(self, draft: NetworkDraft) -> None:
        super().__init__()
        self.module = draft.module
        parts = vars(draft.module.target_parts).values()
        self.shared = nn.ModuleList([part for part in parts if isinstance(part, nn.Module)])
        self.draft = [draft]

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        own_slots: Tensor,
        ancestors: Tensor,
        own_lengths: Tensor,
        scratch_positions: Tensor,
        target_slots: Tensor,
        target_lengths: Tensor,
        own_keys: list[Tensor],
        own_values: list[Tensor],
        target_keys: list[Tensor],
        target_values: list[Tensor],
        hidden: list[Tensor],
        parents: list[Tensor],
    ) -> Tensor:
        (draft,) = self.draft
        of_own, of_target = hidden or (None, None)
        own = traced(own_keys, own_values, own_lengths, own_slots, tokens.shape[1], ancestors.shape[2], of_own)
        target = draft.traced_target(target_keys, target_values, target_lengths, target_slots, of_target)
        return draft.run(tokens, positions, own, ancestors, target, scratch_positions, parents[0] if parents else None)


class ChainProgram(DraftProgram):
    """A whole chain: the step to the root, then each next token chosen and run; its tokens and their log-probabilities."""

    def __init__(self, draft: NetworkDraft, length: int) -> None:
        super().__init__(draft)
        self.length = length

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        positions: Tensor,
        first_slots: Tensor,
        ancestors: Tensor,
        own_lengths: Tensor,
        scratch_positions: Tensor,
        target_slots: Tensor,
        target_lengths: Tensor,
        own_keys: list[Tensor],
        own_values: list[Tensor],
        target_keys: list[Tensor],
        target_values: list[Tensor],
        hidden: list[Tensor],
        last: Tensor,
        committed_slots: Tensor,
        noise: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """See `NetworkDraft.draft_chain`; `committed_slots`: as many as the longest row has when the root is committed to."""
        (draft,) = self.draft
        caches = (own_keys, own_values, target_keys, target_values, hidden)
        logits = super().forward(
            tokens, positions, first_slots, ancestors, own_lengths, positions, target_slots, target_lengths, *caches, []
        )
        logits = logits.gather(1, last[:, None, None].expand(-1, 1, logits.shape[2]))
        of_own, of_target = hidden or (None, None)
        target = draft.traced_target(target_keys, target_values, target_lengths, target_slots, of_target)
        stores = [dict(enumerate(one)) for one in (own_keys, own_values)]
        roots, longest = own_lengths + last, committed_slots.shape[0]
        chosen, log_probs = [], []
        for depth in range(self.length):
            scores = logits[:, 0].float()
            ranked = scores + noise[0][:, depth] if noise else scores
            token = ranked.argmax(-1, keepdim=True)
            chosen.append(token)
            log_probs.append(scores.gather(1, token) - scores.logsumexp(-1, keepdim=True))
            if depth < self.length - 1:
                own = TracedCache(stores[0], stores[1], roots, longest, longest + depth + 2, depth + 1, of_own)
                at = roots[:, None] + torch.arange(depth + 2, device=roots.device)
                parents = torch.full_like(token, depth) if draft.uses_parents else None
                logits = draft.run(token, at[:, -1:], own, None, target, at, parents)
        return torch.cat(chosen, 1), torch.cat(log_probs, 1)
