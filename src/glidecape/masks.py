"""Every attention mask of GlideCape. Masks are bool, True = may attend, shape `(batch, 1, queries, keys)`.

`visible` is the one primitive of the draft's cross-attention: how many target keys a query may read. Training,
evaluation and decoding differ only in how they fill it in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tree_mask(lengths: list[int], ancestors: Tensor | None, queries: int, keys: int) -> Tensor | None:
    """Who sees what when `queries` scratch slots follow `lengths[row]` committed slots in a cache of `keys` slots.

    Args:
        lengths: committed slots of each row.
        ancestors: `(batch, queries, scratch)`, True where scratch slot j is query i itself or its ancestor; the scratch
            slots begin at `lengths[row]`. None: a chain whose last `queries` slots are the queries.
        keys: slots that the attention reads, at least `max(lengths) + scratch`.

    Returns:
        The mask, or None when it would be all True.
    """
    if ancestors is None:
        scratch = keys - max(lengths)
        if queries == 1 and len(set(lengths)) == 1:
            return None
        ancestors = torch.ones(queries, scratch, dtype=torch.bool).tril(scratch - queries)
        ancestors = ancestors.expand(len(lengths), -1, -1)
    batch, _, scratch = ancestors.shape
    if len(set(lengths)) == 1:
        committed = ancestors.new_ones(batch, queries, lengths[0])
        padding = ancestors.new_zeros(batch, queries, keys - lengths[0] - scratch)
        return torch.cat([committed, ancestors, padding], dim=2)[:, None]
    start = torch.tensor(lengths, device=ancestors.device)[:, None]
    slot = (
        torch.arange(keys, device=ancestors.device) - start
    )  # (batch, keys): scratch slot number, negative: committed
    inside = (slot >= 0) & (slot < scratch)
    index = slot.clamp(0, scratch - 1)[:, None].expand(-1, queries, -1)
    return ((slot < 0)[:, None] | (inside[:, None] & ancestors.gather(2, index)))[:, None]


def visible_mask(visible: Tensor, keys: int) -> Tensor:
    """Cross-attention mask for `visible (batch, queries)`: query i sees target keys 0 .. visible[i]-1.

    A query that may see nothing gets key 0, so that softmax has something to normalise; its output must be zeroed.
    """
    slot = torch.arange(keys, device=visible.device)
    return (slot < visible.clamp(min=1)[..., None])[:, None]


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


def slot_positions(lengths: list[int], scratch: Tensor, keys: int) -> Tensor:
    """Positions of the first `keys` slots of a cache, `(batch, keys)`.

    A committed slot's position is its number; a scratch slot's is its node's, `scratch (batch, slots)`. Slots past the
    scratch have any.
    """
    start = torch.tensor(lengths, device=scratch.device)[:, None]
    slot = torch.arange(keys, device=scratch.device).expand(len(lengths), -1)
    return torch.where(slot < start, slot, scratch.gather(1, (slot - start).clamp(0, scratch.shape[1] - 1)))


def window_mask(positions: Tensor, keys: Tensor, window: int) -> Tensor:
    """Who sees what by position alone: itself and the `window - 1` positions before; `(batch, 1, queries, keys)`.

    Args:
        positions: `(batch, queries)`; keys: `(batch, keys)`, positions too.
    """
    back = positions[:, :, None] - keys[:, None, :]
    return ((back >= 0) & (back < window))[:, None]
