"""`KVCache`: keys and values of a transformer in a fixed number of row slots, written in place, read through views.

A row's first `lengths[row]` slots are committed: the keys and values of tokens 0 .. lengths-1. Slots from there on are
scratch: this round's tree nodes, in node order. `keep` moves accepted scratch next to the committed prefix, which is
legal because a path node of depth k has position lengths + k.

Lengths are kept twice, on the device for masks and positions, and on the host, which decides how many slots are read.
They change only by numbers that the host knows, so no call waits for the device. A forward runs the rows of `use`; rows
are admitted and forgotten without copying anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat import Cache
from ..errors import InputError
from . import pages
from .transfer import to_device


def cache_bytes(
    layers: int, batch: int, heads: int, capacity: int, head_dim: int, dtype: torch.dtype, hidden: int = 0
) -> int:
    """Bytes that a cache will take: batch x capacity x (2 x layers x heads x head_dim + hidden) x bytes an element."""
    return batch * capacity * (2 * layers * heads * head_dim + hidden) * dtype.itemsize


class _Slots:
    """What transformers asks of a cache layer besides writing: it is a full-attention layer, whatever the mask says.

    It is not a `CacheLayerMixin`, which would own the layer's tensors: they belong to the cache, which moves them together.
    """

    is_sliding = False
    is_compileable = False
    is_initialized = True


Stores = Sequence[Tensor] | Mapping[int, Tensor]  # of each layer, by its number


class SlotCache(Cache, ABC):
    """What a cache in row slots is to transformers and to drafts, whoever made its tensors.

    Attributes:
        own_keys, own_values: `(rows, kv_heads, slots, head_dim)` by layer, of the rows in use.
        own_hidden: `(rows, slots, width)` of the rows in use, where hidden states are kept.
        longest: most committed tokens of a row.
    """

    own_keys: Stores
    own_values: Stores
    own_hidden: Tensor
    longest: int

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[_Slots() for _ in range(layers)])

    @abstractmethod
    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next scratch slots of every row; returns keys and values of all slots up to there."""

    def hidden_at(self, slots: Tensor) -> Tensor:
        """Hidden states `(rows, count, width)` of slots `(rows, count)`; zero for negative ones, which have none."""
        at = slots.clamp(min=0)[..., None].expand(-1, -1, self.own_hidden.shape[2])
        return self.own_hidden.gather(1, at).masked_fill((slots < 0)[..., None], 0.0)

    def committed(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of the committed keys and values, `(rows, kv_heads, longest, head_dim)`: never a clone.

        Rows shorter than the longest hold unspecified values past their length.
        """
        return self.own_keys[layer][:, :, : self.longest], self.own_values[layer][:, :, : self.longest]

    # --- what transformers calls on its `Cache`

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
        return self.write(layer_idx, key_states, value_states)


class KVCache(SlotCache):
    """Preallocated `(rows, kv_heads, capacity, head_dim)` keys and values a layer.

    Layers may differ in heads and head size (`shapes`), as in targets with several attention types.

    Args:
        shapes: `(kv_heads, head_dim)` of each layer.
        batch: row slots.
        capacity: slots a row, committed and scratch.
        hidden: width of the last hidden states, kept beside keys and values for drafts that read them; 0: not kept.
        device: of lengths and hidden states, and of what drafts read.
        devices: of each layer, where they differ.

    Attributes:
        keys, values: of each layer, of all row slots; `own_keys` and `own_values` of the rows in use.
        hidden: `(rows, capacity, width)` or None; slots as those of the keys.
        scratch: scratch slots in use before the next write, the same in each row.
        lengths: committed tokens of each row in use, `(rows,)` int64 on the device.
        longest: most committed tokens of a row.
        ragged: do the rows' lengths differ?

    Raises:
        InputError: the cache would need more memory than `limit_bytes` (the amount is named), or a write does not fit.

    >>> cache = KVCache([(2, 4)], batch=1, capacity=8)
    >>> k = torch.arange(3.0).view(1, 1, 3, 1).expand(1, 2, 3, 4)
    >>> _ = cache.write(0, k, k)
    >>> cache.keep([[0, 2]])
    >>> cache.host_lengths, cache.committed(0)[0][0, 0, :, 0].tolist()
    ([2], [0.0, 2.0])
    """

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        batch: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        devices: list[torch.device] | None = None,
        limit_bytes: int | None = None,
        hidden: int = 0,
    ) -> None:
        super().__init__(len(shapes))
        needed = sum(cache_bytes(1, batch, h, capacity, d, dtype) for h, d in shapes)
        needed += cache_bytes(0, batch, 0, capacity, 0, dtype, hidden)
        if limit_bytes is not None and needed > limit_bytes:
            raise InputError(
                f"the key-value cache needs {needed / 2**20:,.0f} MiB for {batch} row(s) of {capacity} tokens, more than "
                f"the {limit_bytes / 2**20:,.0f} MiB allowed: lower the batch, the prompt length or max_new_tokens"
            )
        self.capacity, self.dtype, self.device = capacity, dtype, torch.device(device)
        where = devices or [self.device] * len(shapes)
        places = list(zip(shapes, where, strict=True))
        # Layers that are alike lie side by side, so that `keep` moves what was accepted in all of them at once.
        stacks = {
            place: pages.zeros(
                2 * places.count(place), batch, place[0][0], capacity, place[0][1], dtype=dtype, device=place[1]
            )
            for place in dict.fromkeys(places)
        }
        self._stacks = list(stacks.values())
        # `data`: no views to autograd, which would refuse writes with gradients into what was made without.
        layers = {place: iter([one.data for one in stack]) for place, stack in stacks.items()}
        pairs = [(next(layers[place]), next(layers[place])) for place in places]
        self.keys, self.values = [key for key, _ in pairs], [value for _, value in pairs]
        self.hidden = torch.zeros(batch, capacity, hidden, dtype=dtype, device=self.device) if hidden else None
        self._lengths = torch.zeros(batch, dtype=torch.long, device=self.device)
        self._host_lengths = [0] * batch
        self._rooms: dict[tuple[torch.Size, torch.device], Tensor] = {}
        self.rows = slice(-1, -1)
        self.use(0, batch)

    def use(self, first: int, last: int) -> None:
        """Run the row slots `first` to `last` - 1 from now on; all other calls are about these rows."""
        if self.rows == slice(first, last):
            self.scratch = 0
            return
        self.rows = slice(first, last)
        self.lengths = self._lengths[self.rows]
        # Views of these rows, made once: every layer of every forward writes through them.
        self.own_keys = [one[self.rows] for one in self.keys]
        self.own_values = [one[self.rows] for one in self.values]
        if self.hidden is not None:
            self.own_hidden = self.hidden[self.rows]
        self._forget()

    def _forget(self) -> None:
        """Nothing is in scratch, and what depends on the rows' lengths is made anew."""
        self.scratch = 0
        self._brought: dict[int, tuple[Tensor, Tensor]] = {}
        self.longest = max(self.host_lengths, default=0)
        self.ragged = len(set(self.host_lengths)) > 1
        self._slots: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def host_lengths(self) -> list[int]:
        """The same numbers on the host."""
        return self._host_lengths[self.rows]

    def length(self, slot: int) -> int:
        """Committed tokens of a row slot, in use or not."""
        return self._host_lengths[slot]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self._stores, *self._rooms.values()))

    @property
    def slots(self) -> int:
        """Row slots, in use or not."""
        return len(self._host_lengths)

    def committed(self, layer: int) -> tuple[Tensor, Tensor]:
        """See `SlotCache`. Those of a layer on another device are copied to the cache's own, once for each round."""
        keys, values = super().committed(layer)
        if keys.device == self.device:
            return keys, values
        if layer not in self._brought:
            self._brought[layer] = keys.to(self.device, non_blocking=True), values.to(self.device, non_blocking=True)
        return self._brought[layer]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next scratch slots of every row; returns views of all slots up to there.

        "Next" is after the first `self.scratch` ones. A drafter, whose rounds take several forwards, counts them up;
        committing resets the count.

        Args:
            keys, values: `(rows, kv_heads, queries, head_dim)`.

        Returns:
            Keys and values `(rows, kv_heads, longest + scratch + queries, head_dim)`.
        """
        count = keys.shape[2]
        end = self.end_of_write(count)
        own_keys, own_values = self.own_keys[layer], self.own_values[layer]
        if self.ragged:
            at = self._next_slots(count, own_keys.device)
            own_keys.transpose(1, 2)[at] = keys.transpose(1, 2)
            own_values.transpose(1, 2)[at] = values.transpose(1, 2)
        else:
            own_keys[:, :, end - count : end] = keys
            own_values[:, :, end - count : end] = values
        return own_keys[:, :, :end], own_values[:, :, :end]

    def end_of_write(self, count: int) -> int:
        """Slots up to the end of the next write of `count` scratch slots, in the longest row.

        Raises:
            InputError: it does not fit.
        """
        end = self.longest + self.scratch + count
        if end > self.capacity:
            raise InputError(f"the cache holds {self.capacity} tokens a row, but {end} are needed")
        return end

    def _next_slots(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row and slot of each query of the next write, made once for all layers."""
        key = (self.scratch, count, device)
        if key not in self._slots:
            rows = torch.arange(len(self.host_lengths), device=device)[:, None]
            lengths = self.lengths if device == self.lengths.device else self.lengths.to(device, non_blocking=True)
            slots = lengths[:, None] + torch.arange(self.scratch, self.scratch + count, device=device)
            self._slots[key] = rows, slots
        return self._slots[key]

    def write_hidden(self, hidden: Tensor) -> None:
        """Write the last hidden states `(rows, queries, width)` of the queries just written by the last `write`."""
        assert self.hidden is not None
        own, count = self.hidden[self.rows], hidden.shape[1]
        if hidden.device != own.device:
            hidden = hidden.to(own.device, non_blocking=True)
        if self.ragged:
            own[self._next_slots(count, own.device)] = hidden
        else:
            start = self.longest + self.scratch
            own[:, start : start + count] = hidden

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit, for each row, the scratch slots named by its path (ascending), and drop the rest."""
        counts = [len(path) for path in paths]
        moved = [j for path in paths for j, slot in enumerate(path) if slot != j]
        if moved:
            self._move(paths, min(moved), max(counts))
        self.commit(counts)

    def _move(self, paths: Sequence[Sequence[int]], first: int, last: int) -> None:
        """Copy the path nodes at depths `first` to `last` - 1 to their places; shorter paths copy slots to themselves."""
        table = [[*path[first:last], *range(max(first, len(path)), last)] for path in paths]
        slots, start = to_device(table, self.device), self.lengths[:, None]
        source, goal = start + slots, start + torch.arange(first, last, device=self.device)
        rows = torch.arange(len(paths), device=self.device)[:, None]
        hidden = [] if self.hidden is None else [self.hidden[self.rows][None]]
        for store in [*(stack[:, self.rows].transpose(2, 3) for stack in self._stacks), *hidden]:
            if store.device == source.device:
                r, to, of = rows, goal, source
            else:
                r, to, of = (one.to(store.device, non_blocking=True) for one in (rows, goal, source))
            store[:, r, to] = store[:, r, of]

    def commit(self, counts: Sequence[int]) -> None:
        """Commit the first `counts[row]` scratch slots of each row as they stand."""
        self._set([n + c for n, c in zip(self.host_lengths, counts, strict=True)])

    def truncate(self, lengths: Sequence[int]) -> None:
        """Forget committed slots past `lengths[row]`."""
        if any(new > old for new, old in zip(lengths, self.host_lengths, strict=True)):
            raise InputError(f"cannot truncate a cache of lengths {self.host_lengths} to {list(lengths)}")
        self._set(list(lengths))

    def _set(self, lengths: list[int]) -> None:
        self._host_lengths[self.rows] = lengths
        if self.device.type == "cpu" and type(self.lengths) is Tensor:
            self.lengths.numpy()[:] = lengths  # without PyTorch's dispatch
        else:
            self.lengths.copy_(to_device(lengths, self.device))
        self._forget()

    # --- row slots, in use or not

    def exchange(self, one: int, other: int) -> None:
        """What is committed in row slots `one` and `other` changes places."""
        first, second = self._host_lengths[one], self._host_lengths[other]
        for store in self._stores:
            room = self._room(store) if first else store[one]
            room[..., :first, :] = store[one, ..., :first, :]
            store[one, ..., :second, :] = store[other, ..., :second, :]
            store[other, ..., :first, :] = room[..., :first, :]
        self._set_length(one, second)
        self._set_length(other, first)

    def copy(self, source: int, goal: int, length: int) -> None:
        """Commit to row slot `goal` the first `length` committed tokens of row slot `source` alone; both may be one."""
        for store in self._stores if source != goal else ():
            store[goal, ..., :length, :] = store[source, ..., :length, :]
        self._set_length(goal, length)

    def reserve(self) -> None:
        """Take now the memory that `exchange` needs, so that it is there later."""
        for store in self._stores:
            self._room(store)

    @property
    def _stores(self) -> list[Tensor]:
        """All tensors, `(rows, …, capacity, width)`."""
        return [*self.keys, *self.values, *([] if self.hidden is None else [self.hidden])]

    def _room(self, store: Tensor) -> Tensor:
        """Room for one row of a store; those of one shape share it."""
        key = store.shape[1:], store.device
        if key not in self._rooms:
            self._rooms[key] = torch.empty_like(store[0])
        return self._rooms[key]

    def _set_length(self, slot: int, length: int) -> None:
        self._host_lengths[slot] = length
        self._lengths[slot] = length
        self._forget()

    # --- what transformers calls on its `Cache`

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.longest + self.scratch

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.longest + self.scratch + query_length, 0
