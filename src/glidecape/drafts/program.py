"""A draft's step as a compiled program: the same code that runs eagerly, on a cache of traced tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..core.cache import KVCache
from ..target.packages import Program, Run, compiled
from ..target.program import KEYS, NODES, ROWS, SCRATCH, SLOTS, TracedCache, chain, traced

if TYPE_CHECKING:
    from ..target.target import Target

TARGET_KEYS, TARGET_SLOTS = Dim("target_keys", min=1, max=2**31), Dim("target_slots", min=2, max=2**31)


class NetworkDraft:
    """What the drafts with a network of their own share: a step that is compiled or not.

    Attributes:
        module: the network, bound to its target.
        layers_read: target layers whose keys and values it reads.
        uses_parents: do its steps below the root read their parents' hidden states?
    """

    module: Any
    reads_hidden: bool
    layers_read: Sequence[int] = ()
    uses_parents = False

    def __init__(self) -> None:
        self.compiled: dict[bool, Run] = {}  # by: is it a step below the root, where that makes a difference

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """See `DraftModel`."""
        raise NotImplementedError

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
        raise NotImplementedError

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
        inputs += [*own.own_keys, *own.own_values]
        inputs += [target_cache.own_keys[layer] for layer in self.layers_read]
        inputs += [target_cache.own_values[layer] for layer in self.layers_read]
        inputs += [one.hidden[one.rows] for one in (own, target_cache) if self.reads_hidden and one.hidden is not None]
        if self.uses_parents and parents is not None:
            inputs.append(parents)
        return run([one.contiguous() for one in inputs])[0]

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """Draft by compiled programs from now on; False where it stays eager, which is said. See `Target.compile`."""
        self.compiled = {}
        for below_root in (False, True) if self.uses_parents else (False,):
            run = compiled(self.program(below_root), mode, say)
            if run is None:
                self.compiled = {}
                return False
            self.compiled[below_root] = run
        return True

    def program(self, below_root: bool) -> Program:
        """Its step, to be compiled."""
        parts = self.module.target_parts
        facts = {"kind": self.module.kind, "config": asdict(self.module.config), "below the root": below_root}
        name = f"a step of the {self.module.kind} draft" + (" below the root" if below_root else "")
        return Program(name, facts, (self.module,), lambda: self._example(below_root), (parts,))

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
        keys, values = (dict(zip(draft.layers_read, ts, strict=True)) for ts in (target_keys, target_values))
        target = TracedCache(keys, values, target_lengths, target_slots.shape[0], hidden=of_target)
        return draft.run(tokens, positions, own, ancestors, target, scratch_positions, parents[0] if parents else None)
