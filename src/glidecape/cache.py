"""`KVCache`: keys and values of a transformer, written in place, read through views.

A row's first `lengths[row]` slots are committed: the keys and values of tokens 0 .. lengths-1. Slots from there on are
scratch: this round's tree nodes, in node order. `keep` moves accepted scratch next to the committed prefix, which is
legal because a path node of depth k has position lengths + k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .compat import Cache
from .errors import InputError


def cache_bytes(
    layers: int, batch: int, heads: int, capacity: int, head_dim: int, dtype: torch.dtype, hidden: int = 0
) -> int:
    """Bytes that a cache will take: batch x capacity x (2 x layers x heads x head_dim + hidden) x bytes an element."""
    return batch * capacity * (2 * layers * heads * head_dim + hidden) * dtype.itemsize


class _Slots:
    """What transformers asks of a cache layer besides writing: it is a full-attention layer, whatever the mask says."""

    is_sliding = False
    is_compileable = False
    is_initialized = True


class KVCache(Cache):
    """Preallocated `(batch, kv_heads, capacity, head_dim)` keys and values a layer.

    Layers may differ in heads and head size (`shapes`), as in targets with several attention types.

    Args:
        shapes: `(kv_heads, head_dim)` of each layer.
        batch: rows.
        capacity: slots a row, committed and scratch.
        hidden: width of the last hidden states, kept beside keys and values for drafts that read them; 0: not kept.

    Attributes:
        hidden: `(batch, capacity, width)` or None; slots as those of the keys.

    Raises:
        InputError: the cache would need more memory than `limit_bytes` (the amount is named), or a write does not fit.

    >>> cache = KVCache([(2, 4)], batch=1, capacity=8)
    >>> k = torch.arange(3.0).view(1, 1, 3, 1).expand(1, 2, 3, 4)
    >>> _ = cache.write(0, k, k)
    >>> cache.keep([[0, 2]])
    >>> cache.lengths, cache.committed(0)[0][0, 0, :, 0].tolist()
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
        super().__init__(layers=[_Slots() for _ in shapes])
        needed = sum(cache_bytes(1, batch, h, capacity, d, dtype) for h, d in shapes)
        needed += cache_bytes(0, batch, 0, capacity, 0, dtype, hidden)
        if limit_bytes is not None and needed > limit_bytes:
            raise InputError(
                f"the key-value cache needs {needed / 2**20:,.0f} MiB for {batch} row(s) of {capacity} tokens, more than "
                f"the {limit_bytes / 2**20:,.0f} MiB allowed: lower the batch, the prompt length or max_new_tokens"
            )
        self.capacity, self.dtype = capacity, dtype
        where = devices or [torch.device(device)] * len(shapes)
        self.keys = [
            torch.zeros(batch, h, capacity, d, dtype=dtype, device=w) for (h, d), w in zip(shapes, where, strict=True)
        ]
        self.values = [
            torch.zeros(batch, h, capacity, d, dtype=dtype, device=w) for (h, d), w in zip(shapes, where, strict=True)
        ]
        self.hidden = torch.zeros(batch, capacity, hidden, dtype=dtype, device=where[-1]) if hidden else None
        self.lengths = [0] * batch
        self.scratch = 0  # scratch slots in use before the next write

    @property
    def nbytes(self) -> int:
        kept = [*self.keys, *self.values, *([] if self.hidden is None else [self.hidden])]
        return sum(t.nbytes for t in kept)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next scratch slots of every row; returns views of all slots up to there.

        "Next" is after the first `self.scratch` ones. A drafter, whose rounds take several forwards, counts them up;
        committing resets the count.

        Args:
            keys, values: `(batch, kv_heads, queries, head_dim)`.

        Returns:
            Keys and values `(batch, kv_heads, max(lengths) + scratch + queries, head_dim)`.
        """
        count = keys.shape[2]
        end = max(self.lengths) + self.scratch + count
        if end > self.capacity:
            raise InputError(f"the cache holds {self.capacity} tokens a row, but {end} are needed")
        own_keys, own_values = self.keys[layer], self.values[layer]
        if len(set(self.lengths)) == 1:
            own_keys[:, :, end - count : end] = keys
            own_values[:, :, end - count : end] = values
        else:
            for row, length in enumerate(self.lengths):
                start = length + self.scratch
                own_keys[row, :, start : start + count] = keys[row]
                own_values[row, :, start : start + count] = values[row]
        return own_keys[:, :, :end], own_values[:, :, :end]

    def write_hidden(self, hidden: Tensor) -> None:
        """Write the last hidden states `(batch, queries, width)` of the queries just written by the last `write`."""
        assert self.hidden is not None
        count = hidden.shape[1]
        for row, length in enumerate(self.lengths):
            start = length + self.scratch
            self.hidden[row, start : start + count] = hidden[row]

    def hidden_at(self, slots: Tensor) -> Tensor:
        """Hidden states `(batch, count, width)` of slots `(batch, count)`; zero for negative ones, which have none."""
        assert self.hidden is not None
        at = slots.clamp(min=0)[..., None].expand(-1, -1, self.hidden.shape[2])
        return self.hidden.gather(1, at).masked_fill_((slots < 0)[..., None], 0.0)

    def committed(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of the committed keys and values, `(batch, kv_heads, max(lengths), head_dim)`: never a clone.

        Rows shorter than the longest hold unspecified values past their length.
        """
        end = max(self.lengths)
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def keep(self, paths: list[list[int]]) -> None:
        """Commit, for each row, the scratch slots named by its path (ascending), and drop the rest."""
        for row, path in enumerate(paths):
            start = self.lengths[row]
            if path != list(range(len(path))):
                for keys, values in zip(self.keys, self.values, strict=True):
                    source = torch.tensor(path, device=keys.device) + start
                    keys[row, :, start : start + len(path)] = keys[row, :, source]
                    values[row, :, start : start + len(path)] = values[row, :, source]
                if self.hidden is not None:
                    source = torch.tensor(path, device=self.hidden.device) + start
                    self.hidden[row, start : start + len(path)] = self.hidden[row, source]
            self.lengths[row] = start + len(path)
        self.scratch = 0

    def commit(self, counts: list[int]) -> None:
        """Commit the first `counts[row]` scratch slots of each row as they stand."""
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]
        self.scratch = 0

    def truncate(self, lengths: list[int]) -> None:
        """Forget committed slots past `lengths[row]`."""
        if any(new > old for new, old in zip(lengths, self.lengths, strict=True)):
            raise InputError(f"cannot truncate a cache of lengths {self.lengths} to {lengths}")
        self.lengths = list(lengths)
        self.scratch = 0

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]
        self.hidden = None if self.hidden is None else self.hidden[rows]
        self.lengths = [self.lengths[r] for r in rows]

    # --- what transformers calls on its `Cache`

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kw: Any) -> Any:
        return self.write(layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths) + self.scratch

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return max(self.lengths) + self.scratch

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return max(self.lengths) + self.scratch + query_length, 0

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self.keys)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self.keys)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self.keys)

    @property
    def is_compileable(self) -> bool:
        return False
