"""Every attention mask of GlideCape. Masks are bool, True = may attend, shape `(batch, 1, queries, keys)`.

`visible` is the one primitive of the draft's cross-attention: how many target keys a query may read. Training,
evaluation and decoding differ only in how they fill it in.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Rows(Protocol):
    """Where the rows of a cache stand; what `tree_mask` needs to know of a `KVCache`."""

    @property
    def lengths(self) -> Tensor:
        """Committed tokens of each row, `(rows,)`."""

    longest: int
    ragged: bool
    scratch: int


def tree_mask(cache: Rows, ancestors: Tensor | None, queries: int) -> Tensor | None:
    """Who sees what when `queries` slots are run after the committed and the scratch slots of a cache.

    Args:
        ancestors: `(batch, queries, scratch + queries)`, True where scratch slot j is query i itself or its ancestor. None: a
            chain, in which each slot comes after all before it.

    Returns:
        `(batch, 1, queries, longest + scratch + queries)`, or None when it would be all True.
    """
    lengths, scratch = cache.lengths, cache.scratch + queries
    batch, keys = lengths.shape[0], cache.longest + scratch
    if ancestors is None:
        if queries == 1 and not cache.ragged:
            return None
        chain = torch.ones(queries, scratch, dtype=torch.bool, device=lengths.device).tril(scratch - queries)
        ancestors = chain.expand(batch, -1, -1)
    if not cache.ragged:
        return torch.cat([ancestors.new_ones(batch, queries, cache.longest), ancestors], dim=2)[:, None]
    return paths_mask(lengths, ancestors, keys)


def paths_mask(lengths: Tensor, ancestors: Tensor, keys: int) -> Tensor:
    """Who sees which of a cache's first `keys` slots: a row's committed ones, and the scratch slots of a query's own path.

    Args:
        ancestors: `(batch, queries, scratch)`, as in `tree_mask`, of all scratch slots.
    """
    queries, scratch = ancestors.shape[1:]
    slot = torch.arange(keys, device=lengths.device) - lengths[:, None]  # (batch, keys): negative where committed
    index = slot.clamp(0, scratch - 1)[:, None].expand(-1, queries, -1)
    inside = ((slot >= 0) & (slot < scratch))[:, None]
    return ((slot < 0)[:, None] | (inside & ancestors.gather(2, index)))[:, None]


def path_slots(lengths: Tensor, scratch: Tensor, ancestors: Tensor, keys: int) -> Tensor:
    """The slots in which positions 0 .. keys-1 of each query's own path lie, `(batch, queries, keys)`; past the query any.

    Args:
        scratch: `(batch, slots)` positions of the scratch slots.
        ancestors: `(batch, queries, slots)`, as in `tree_mask`.
    """
    slots, first = scratch.shape[1], lengths[:, None]
    depth = torch.arange(slots, device=scratch.device)
    on_path = ancestors[:, :, None] & ((scratch - first)[:, None] == depth[:, None])[:, None]
    by_depth = on_path.int().argmax(-1)  # (batch, queries, slots)
    position = torch.arange(keys, device=scratch.device)
    inside = (position - first).clamp(0, slots - 1)[:, None].expand(-1, ancestors.shape[1], -1)
    return torch.where(position < first[..., None], position, first[..., None] + by_depth.gather(2, inside))


def documents_mask(begins: Tensor) -> Tensor:
    """Who sees whom among the documents of a window: each token its own document up to itself; `(batch, queries, queries)`.

    Args:
        begins: `(batch, queries)`, the slot at which the document of each token begins.
    """
    slot = torch.arange(begins.shape[1], device=begins.device)
    return (slot >= begins[..., None]) & (slot <= slot[:, None])


def visible_mask(visible: Tensor, keys: int, begins: Tensor | None = None) -> Tensor:
    """Cross-attention mask for `visible (batch, queries)`: query i sees target keys 0 .. visible[i]-1, counted from the slot
    `begins[i]` where that is given.

    A query that may see nothing gets key 0, so that softmax has something to normalise; its output must be zeroed.
    """
    slot = torch.arange(keys, device=visible.device)
    if begins is None:
        return (slot < visible.clamp(min=1)[..., None])[:, None]
    first = begins[..., None]
    return ((slot >= first) & (slot < first + visible.clamp(min=1)[..., None]))[:, None]


def block_visible(phase: Tensor, length: int, block: int) -> Tensor:
    """Target keys that queries 0 .. length-1 see when every `block` tokens a new round of drafting begins.

    `phase (batch,)` in 0 .. block-1 is the root of the first whole block. A query at position j of a block that begins
    at b sees keys 0 .. b-1: lag j - b + 1, so lags 1 .. block are equally frequent. Before the first root nothing is
    visible.

    Source: GliDe paper, section 4.1. Differs: the phase is free; the first block sees nothing (LongSpec), where the
    official code lets it see itself.
    """
    position = torch.arange(length, device=phase.device)
    begun = (position - phase[:, None]) // block * block + phase[:, None]
    return begun.clamp(min=0)


def lag_one_visible(positions: Tensor) -> Tensor:
    """What prompt tokens and caught-up tokens see: every key before their own."""
    return positions


def slot_positions(lengths: Tensor, scratch: Tensor, keys: int) -> Tensor:
    """Positions of the first `keys` slots of a cache, `(batch, keys)`.

    A committed slot's position is its number; a scratch slot's is its node's, `scratch (batch, slots)`. Slots past the
    scratch have any.
    """
    start = lengths[:, None]
    slot = torch.arange(keys, device=scratch.device).expand(lengths.shape[0], -1)
    return torch.where(slot < start, slot, scratch.gather(1, (slot - start).clamp(0, scratch.shape[1] - 1)))


def window_mask(positions: Tensor, keys: Tensor, window: int) -> Tensor:
    """Who sees what by position alone: itself and the `window - 1` positions before; `(batch, 1, queries, keys)`.

    Args:
        positions: `(batch, queries)`; keys: `(batch, keys)`, positions too.
    """
    back = positions[:, :, None] - keys[:, None, :]
    return ((back >= 0) & (back < window))[:, None]
