"""A target's forward as a compiled program: transformers' own model code, exported with our attention and cache.

One package serves any number of rows, nodes and keys, trees and prompts alike: all sizes are dynamic. Masks are made inside,
from ancestors and lengths, and fused into what reads them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..compat import Cache
from ..core.cache import KVCache
from ..core.masks import tree_mask
from .attention import LAYOUT, Layout
from .packages import Run

if TYPE_CHECKING:
    from .target import Target

ROWS, NODES, SCRATCH = Dim("rows", min=1, max=4096), Dim("nodes", min=1, max=65_536), Dim("scratch", min=1, max=65_536)
KEYS, SLOTS, KEPT = Dim("keys", min=1, max=2**31), Dim("slots", min=2, max=2**31), Dim("kept", min=1, max=65_536)


class Slots(Cache):
    """What a model writes to and reads from inside a program: tensors `(rows, kv_heads, slots, head_dim)` a layer.

    Args:
        at: `(rows, queries)` slots to write to.
        keys_read: the first slots, which are read.
    """

    class Layer:
        is_sliding, is_compileable, is_initialized = False, False, True

    def __init__(self, keys: list[Tensor], values: list[Tensor], at: Tensor, keys_read: int) -> None:
        super().__init__(layers=[self.Layer() for _ in keys])
        self.keys, self.values, self.at, self.keys_read = keys, values, at, keys_read
        self.rows = torch.arange(at.shape[0], device=at.device)[:, None]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        for store, new in ((self.keys[layer], keys), (self.values[layer], values)):
            store.transpose(1, 2).index_put_((self.rows, self.at), new.transpose(1, 2))
        return self.keys[layer][:, :, : self.keys_read], self.values[layer][:, :, : self.keys_read]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
        return self.write(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.keys_read, 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.keys)

    @property
    def is_compileable(self) -> bool:
        return False


class Standing:
    """Where rows stand, as `tree_mask` asks; inside a program rows always count as ragged."""

    ragged = True

    def __init__(self, lengths: Tensor, scratch: int, keys: int) -> None:
        self.lengths, self.scratch, self.longest = lengths, scratch, keys - scratch


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
        queries, scratch = tokens.shape[1], ancestors.shape[2]
        before = scratch - queries
        standing = Standing(lengths, before, key_slots.shape[0] - queries)
        mask = tree_mask(standing, ancestors, queries)
        at = lengths[:, None] + torch.arange(before, scratch, device=tokens.device)
        cache = Slots(keys, values, at, key_slots.shape[0])
        hidden: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            hidden.append(output[0] if isinstance(output, tuple) else output.last_hidden_state)

        hook = self.body[0].register_forward_hook(keep)
        token = LAYOUT.set(Layout(lengths, positions, scratch_positions, mask))
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


def example(target: Target) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Example inputs of a `TargetProgram`, and which of their sizes are dynamic."""
    rows, nodes, scratch, keys, slots = 2, 5, 8, 48, 64
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
        torch.arange(nodes - 1, device=target.device),
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
    """A target's forward on a `KVCache`, by a compiled program."""

    def __init__(self, run: Run) -> None:
        self.run = run

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
        end = cache.end_of_write(nodes)
        scratch = positions if scratch_positions is None else scratch_positions
        if ancestors is None:
            ancestors = chain(rows, nodes, scratch.shape[1], device)
        first = nodes - logits_to_keep if logits_to_keep else 0
        inputs = [tokens, positions, torch.arange(end, device=device), ancestors, cache.lengths, scratch]
        inputs.append(torch.arange(first, nodes, device=device))
        logits, hidden = self.run([*(one.contiguous() for one in inputs), *cache.own_keys, *cache.own_values])
        if cache.hidden is not None:
            cache.write_hidden(hidden)
        return logits
