"""A target's forward as a compiled program: transformers' own model code, exported with our attention and cache.

One package serves any number of rows, nodes and keys, trees and prompts alike: all sizes are dynamic. Products and attention
are operators of ours, whose sums have one order: see `operators`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..core.cache import KVCache, SlotCache
from ..core.masks import tree_mask
from ..core.tree import TokenTree
from ..core.verify import verdict_numbers
from .attention import LAYOUT, Layout
from .packages import Program, Run

if TYPE_CHECKING:
    from .target import Target

ROWS, NODES, SCRATCH = Dim("rows", min=1, max=4096), Dim("nodes", min=1, max=65_536), Dim("scratch", min=1, max=65_536)
KEYS, SLOTS, KEPT = Dim("keys", min=1, max=2**31), Dim("slots", min=2, max=2**31), Dim("kept", min=1, max=65_536)


# Sizes of an example: no two are equal, nor a size of a usual model, because a compiler takes equal ones for the same.
# Rows, nodes, nodes whose logits are wanted, scratch slots, slots that are read, slots.
EXAMPLE = 11, 13, 9, 17, 53, 131


class TracedCache(SlotCache):
    """A `KVCache` inside a program: the caller's tensors are inputs, which are written in place.

    Args:
        keys, values: `(rows, kv_heads, slots, head_dim)` by layer.
        lengths: `(rows,)` committed tokens.
        longest: slots up to the end of the longest row's committed ones.
        end: slots that are read after the write.
        scratch: scratch slots in use before it.
        hidden: `(rows, slots, width)`; None: not kept.
    """

    ragged = True  # what is right for ragged rows is right for all

    def __init__(
        self,
        keys: Mapping[int, Tensor],
        values: Mapping[int, Tensor],
        lengths: Tensor,
        longest: int,
        end: int = 0,
        scratch: int = 0,
        hidden: Tensor | None = None,
    ) -> None:
        super().__init__(len(keys))
        self.own_keys, self.own_values, self.hidden = keys, values, hidden
        if hidden is not None:
            self.own_hidden = hidden
        self.lengths, self.longest, self.end, self.scratch = lengths, longest, end, scratch
        self._slots: tuple[Tensor, Tensor] | None = None

    def _next_slots(self, count: int) -> tuple[Tensor, Tensor]:
        """Row and slot of each query of the write, made once for all layers: there is one write in its life."""
        if self._slots is None:
            rows = torch.arange(self.lengths.shape[0], device=self.lengths.device)[:, None]
            first = self.scratch
            self._slots = rows, self.lengths[:, None] + torch.arange(first, first + count, device=rows.device)
        return self._slots

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """See `KVCache.write`."""
        (rows, slots), end = self._next_slots(keys.shape[2]), self.end
        heads = torch.arange(keys.shape[1], device=rows.device)[:, None]
        for store, new in ((self.own_keys[layer], keys), (self.own_values[layer], values)):
            # Into the store itself: written through a view of it, the compiler would copy the whole store.
            store.index_put_((rows[:, None], heads, slots[:, None]), new)
        return self.own_keys[layer][:, :, :end], self.own_values[layer][:, :, :end]

    def write_hidden(self, hidden: Tensor) -> None:
        """See `KVCache.write_hidden`."""
        self.own_hidden.index_put_(self._next_slots(hidden.shape[1]), hidden)

    # --- what transformers calls on its `Cache`

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.end, 0


class TargetProgram(nn.Module):
    """`forward` of tensors alone: logits, and the last hidden states of all nodes."""

    def __init__(self, target: Target) -> None:
        super().__init__()
        self.model, self.context, self.cache_argument = target.model, target.context, target.cache_argument
        self.body = [target.body]  # in a list: it is part of the model already

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        key_slots: Tensor,
        ancestors: Tensor,
        lengths: Tensor,
        scratch_positions: Tensor,
        kept: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """See `Target.forward`.

        Args:
            key_slots: `(keys,)` 0, 1, …: as many slots are read.
            kept: `(kept,)` nodes whose logits are wanted.
        """
        cache = traced(keys, values, lengths, key_slots, tokens.shape[1], ancestors.shape[2])
        hidden: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

        hook = self.body[0].register_forward_hook(keep)
        exporting = torch.compiler.is_exporting()  # a GPU's graphs capture what runs eagerly
        mask = None if exporting else tree_mask(cache, ancestors, tokens.shape[1])
        token = LAYOUT.set(Layout(lengths, positions, scratch_positions, mask, ancestors if exporting else None))
        try:
            out = self.model(
                input_ids=tokens,
                position_ids=positions.clamp(max=self.context - 1),
                **{self.cache_argument: cache},
                use_cache=True,
                logits_to_keep=kept,
            )
        finally:
            LAYOUT.reset(token)
            hook.remove()
        return out.logits, hidden[0]


def traced(
    keys: list[Tensor],
    values: list[Tensor],
    lengths: Tensor,
    key_slots: Tensor,
    queries: int,
    scratch: int,
    hidden: Tensor | None = None,
) -> TracedCache:
    """A cache in which the last `queries` of `scratch` slots are to be written; the slots of `key_slots (keys,)` are read."""
    end, stores = key_slots.shape[0], [dict(enumerate(one)) for one in (keys, values)]
    return TracedCache(stores[0], stores[1], lengths, end - scratch, end, scratch - queries, hidden)


def example(target: Target) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Example inputs of a `TargetProgram`, and which of their sizes are dynamic."""
    rows, nodes, kept, scratch, keys, slots = EXAMPLE
    cache = KVCache(target.shapes, rows, slots, target.dtype, target.device)
    start = torch.full((rows,), keys - scratch, device=target.device)
    positions = start[:, None] + torch.arange(scratch, device=target.device)
    inputs = (
        torch.zeros(rows, nodes, dtype=torch.long, device=target.device),
        positions[:, scratch - nodes :].contiguous(),
        torch.arange(keys, device=target.device),
        chain(rows, nodes, scratch, target.device),
        start,
        positions,
        torch.arange(kept, device=target.device),
        cache.keys,
        cache.values,
    )
    stores = [{0: ROWS, 2: SLOTS}] * len(target.shapes)
    tree = {0: ROWS, 1: NODES, 2: SCRATCH}
    dynamic = ({0: ROWS, 1: NODES}, {0: ROWS, 1: NODES}, {0: KEYS}, tree, {0: ROWS}, {0: ROWS, 1: SCRATCH}, {0: KEPT})
    return inputs, (*dynamic, stores, stores)


@lru_cache(maxsize=256)
def chain(rows: int, queries: int, scratch: int, device: torch.device) -> Tensor:
    """Ancestors `(rows, queries, scratch)` of a chain, in which each slot comes after all before it."""
    one = torch.ones(queries, scratch, dtype=torch.bool, device=device).tril(scratch - queries)
    return one.repeat(rows, 1, 1)


class CompiledTarget:
    """A target's forward on a `KVCache`, by a compiled program.

    Attributes:
        pairs: does a lone node get a neighbour? Some models' code does not export for one.
    """

    def __init__(self, run: Run) -> None:
        self.run, self.pairs = run, False

    def __call__(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache,
        ancestors: Tensor | None,
        logits_to_keep: int,
        scratch_positions: Tensor | None,
    ) -> Tensor:
        """See `Target.forward`; logits `(batch, nodes, vocab)`."""
        (rows, nodes), device = tokens.shape, tokens.device
        scratch = positions if scratch_positions is None else scratch_positions
        if ancestors is None:
            ancestors = chain(rows, nodes, scratch.shape[1], device)
        if nodes == 1 and self.pairs and cache.longest + cache.scratch + 2 <= cache.capacity:
            # A neighbour after it, whose slot the next write takes.
            next_position = positions + 1
            both = torch.cat([ancestors, torch.zeros_like(ancestors[:, :, :1])], 2).repeat(1, 2, 1)
            both[:, 1, -1] = True
            tokens, positions = tokens.expand(rows, 2), torch.cat([positions, next_position], 1)
            scratch = torch.cat([scratch, next_position], 1)
            return self(tokens, positions, cache, both, 0, scratch)[:, :1]
        end = cache.end_of_write(nodes)
        first = nodes - logits_to_keep if logits_to_keep else 0
        inputs = [tokens, positions, torch.arange(end, device=device), ancestors, cache.lengths, scratch]
        inputs.append(torch.arange(first, nodes, device=device))
        logits, hidden = self.run([*(one.contiguous() for one in inputs), *cache.own_keys, *cache.own_values])
        if cache.hidden is not None:
            cache.write_hidden(hidden)
        return logits


class VerdictProgram(nn.Module):
    """`verdict_numbers` of tensors alone."""

    def forward(
        self,
        numbers: Tensor,
        valid: Tensor,
        ancestors: Tensor,
        scores: Tensor,
        columns: Tensor,
        grown_as: Tensor,
        memo: Tensor,
    ) -> Tensor:
        """`columns (levels + 1,)`: as many as depths."""
        tree = TokenTree.of(numbers, valid, ancestors, columns.shape[0] - 1)
        tree.grown_as, tree.memo = grown_as, memo
        return verdict_numbers(tree, scores)


def verdict_program(device: torch.device) -> Program:
    """The program of verdicts, the same for all models."""

    def make() -> tuple[nn.Module, tuple[Any, ...], tuple[Any, ...]]:
        rows, nodes, levels, slots, _, vocab = EXAMPLE
        drafted = torch.zeros(rows, nodes - 1, device=device)
        tree = TokenTree.comb(drafted[:, 0].long(), drafted.long()[..., None], drafted[..., None])
        grown = torch.arange(nodes, device=device).repeat(rows, 1)
        inputs = (
            tree.numbers,
            tree.valid,
            tree.ancestors,
            torch.rand(rows, nodes, vocab, device=device),
            torch.arange(levels + 1, device=device),
            grown,
        )
        of_tree = ({1: ROWS, 2: NODES}, {0: ROWS, 1: NODES}, {0: ROWS, 1: NODES, 2: NODES})
        width, depths, kept = (Dim(name, min=1, max=2**31) for name in ("vocab", "depths", "memo"))
        sizes = (*of_tree, {0: ROWS, 1: NODES, 2: width}, {0: depths}, {0: ROWS, 1: NODES}, {0: ROWS, 1: kept})
        return VerdictProgram(), (*inputs, torch.zeros(rows, slots, dtype=torch.long, device=device)), sizes

    return Program("the verdict", {"kind": "verdict"}, (), make, device=device)


class CompiledVerdict:
    """`verdict_numbers` by a compiled program."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __call__(self, tree: TokenTree, scores: Tensor) -> Tensor:
        """See `verdict_numbers`."""
        number = torch.arange(max(tree.nodes, tree.levels + 1), device=scores.device)
        grown = number[: tree.nodes].expand(tree.batch, -1) if tree.grown_as is None else tree.grown_as
        memo = grown[:, :1] if tree.memo is None else tree.memo
        inputs = [tree.numbers, tree.valid, tree.ancestors, scores.float(), number[: tree.levels + 1], grown, memo]
        return self.run([one.contiguous() for one in inputs])[0]
