"""Drafting chains for rows that another engine decodes, with the draft's own keys and values kept by request.

Rows come in any order, leave, are preempted and come back. So nothing is known by a row's place: what is kept of a request
counts for the longest beginning of its tokens that it was made of, and the rest is made again.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.masks import lag_one_visible, window_mask
from ...core.transfer import to_device, to_host
from ...core.tree import TokenTree
from ...drafting.expansions.chain import Chain
from ...drafting.law import DraftLaw
from ...drafting.stop import StopPolicy
from ...drafts.glide.network import GlideModel
from ...target.attention import attend

KV = tuple[Tensor, Tensor]
FAR = 2**40  # the position of a slot that holds nothing: after every query
CHUNK = 512  # tokens of a row that are caught up with in one step


@dataclass
class DraftRow:
    """A row that wants a draft.

    Attributes:
        request: which request it is, whatever its place.
        tokens: `(length,)` int, all that is known. The last one is the root, whose target keys are not there yet.
        cap: most tokens to draft, at least 1.
    """

    request: str
    tokens: NDArray[Any]
    cap: int


@dataclass
class Kept:
    """The draft's own keys and values of a request.

    Attributes:
        tokens: `(length,)` int, the tokens up to the last one that has keys.
        first: the first position whose keys are kept.
        layers: keys and values of each layer of the draft, `(2, heads, length - first, head_dim)`.
    """

    tokens: NDArray[Any]
    first: int
    layers: list[Tensor]

    def agreed(self, tokens: NDArray[Any]) -> int:
        """How many of these tokens, from the beginning, are those that it was made of."""
        both = min(len(self.tokens), len(tokens))
        different = np.flatnonzero(self.tokens[:both] != tokens[:both])
        return int(different[0]) if len(different) else both


class OwnKeys:
    """The draft's self-attention over slots that know their positions (a `SelfAttention`).

    A slot that holds nothing is `FAR`. Queries see slots of the last `window` positions, their own included; 0: all.

    Args:
        network: the draft's.
        rows, slots: how many of each.

    Attributes:
        filled: slots written so far; columns: those that hold something, of each row by position.
    """

    def __init__(self, network: GlideModel, rows: int, slots: int) -> None:
        c, weight = network.config, network.norm.weight
        shape = (c.layers, 2, rows, c.heads, slots, c.head_dim)
        self.store = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.at = torch.full((rows, slots), FAR, device=weight.device)
        self.window, self.filled = c.window or FAR, 0
        self.columns: list[list[int]] = [[] for _ in range(rows)]
        self.mask = self.valid = torch.empty(0)

    def place(self, positions: Tensor, counts: Sequence[int]) -> None:
        """The next slots are for queries at these positions, `(rows, queries)`: of each row its first `counts`."""
        queries = positions.shape[1]
        last = self.filled + queries
        self.valid = torch.arange(queries, device=positions.device) < to_device(counts, positions.device)[:, None]
        self.at[:, self.filled : last] = positions.masked_fill(~self.valid, FAR)
        for columns, count in zip(self.columns, counts, strict=True):
            columns += range(self.filled, self.filled + count)
        self.mask = window_mask(positions, self.at[:, :last], self.window)
        self.filled = last

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Keys and values `(rows, heads, queries, head_dim)` into the slots placed last; padding as 0."""
        slots = self.store[layer, :, :, :, self.filled - keys.shape[2] : self.filled]
        # Padding sees nothing, so it may be no number, which a mask would let through.
        slots[0], slots[1] = (one.masked_fill(~self.valid[:, None, :, None], 0.0) for one in (keys, values))

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        self.write(layer, k, v)
        keys, values = self.store[layer, :, :, :, : self.filled]
        return attend(q, keys, values, self.mask, scale)


class RowDrafter:
    """GliDe drafting chains for rows whose target keys and values somebody hands it.

    Args:
        network: bound to its target, or lent its parts.
        stop: when a row's chain ends.
        cap: tokens drafted, most.

    Lossless: each drafted token is a point mass, the draft's first choice.
    """

    def __init__(self, network: GlideModel, stop: StopPolicy, cap: int) -> None:
        self.network, self.stop, self.cap = network, stop, cap
        self.kept: dict[str, Kept] = {}

    def forget(self, alive: Container[str]) -> None:
        """Drop what is kept of requests that are not alive."""
        for request in [one for one in self.kept if one not in alive]:
            del self.kept[request]

    def draft(self, rows: Sequence[DraftRow], cross: dict[int, KV]) -> list[list[int]]:
        """The tokens that are to be verified after each row's root, one at least.

        Args:
            rows: at least one.
            cross: by the number of a target layer that is read, its keys and values `(rows, kv_heads, keys, head_dim)` of the
                tokens before the root, for the longest row; anything past a shorter row's.
        """
        network, device = self.network, self.network.norm.weight.device
        lengths = to_device([len(row.tokens) - 1 for row in rows], device)[:, None]
        caps = [min(row.cap, self.cap) for row in rows]
        own = self._caught_up(rows, cross, lengths, max(caps))
        tokens = to_device([int(row.tokens[-1]) for row in rows], device)[:, None]
        tree, frontier = TokenTree(tokens[:, 0], 1 + max(caps)), torch.zeros_like(tokens)
        limits, chain = to_device(caps, device), Chain()
        for depth in itertools.count(1):
            positions = lengths + depth - 1
            own.place(positions, [1] * len(rows))
            hidden = network.hidden(tokens, positions, cross, self._visible(positions, lengths), own)
            logits = network.logits(hidden)
            law = DraftLaw(logits, logits, frontier)
            frontier = chain.grow(tree, frontier, law)
            more = (limits > depth) & self.stop.more(tree, depth, law)
            frontier = frontier.masked_fill(~more[:, None], -1)
            if not to_host((frontier >= 0).any()):
                break
            tokens = tree.tokens[:, -1:]  # of a row that stopped, something that nobody reads
        drafted = [
            list(itertools.compress(chosen[1:], valid[1:]))
            for chosen, valid in zip(to_host(tree.tokens), to_host(tree.valid), strict=True)
        ]
        self._keep(rows, own, drafted, tree.levels)
        return drafted

    def _visible(self, positions: Tensor, lengths: Tensor) -> Tensor:
        """Target keys that queries read, as `GlideDraft` has it: in a round those committed at its start."""
        deep = self.network.config.layers > 1
        return torch.minimum(lag_one_visible(positions), lengths) if deep else lengths

    def _caught_up(self, rows: Sequence[DraftRow], cross: dict[int, KV], lengths: Tensor, room: int) -> OwnKeys:
        """The draft's own keys of every row's tokens before the root, as far as it looks back, and room for more."""
        found = [self._usable(row) for row in rows]
        missing = [row.tokens[begin : len(row.tokens) - 1] for row, (_, begin) in zip(rows, found, strict=True)]
        before = max(0 if kept is None else begin - kept.first for kept, begin in found)
        own = OwnKeys(self.network, len(rows), before + max(map(len, missing)) + room)
        if before:
            firsts = [0 if kept is None else kept.first for kept, _ in found]
            counts = [0 if kept is None else begin - kept.first for kept, begin in found]
            own.place(to_device(firsts, lengths.device)[:, None] + torch.arange(before, device=lengths.device), counts)
            for row, ((kept, _), count) in enumerate(zip(found, counts, strict=True)):
                for layer, keys in enumerate(kept.layers if kept is not None else ()):
                    own.store[layer, :, row, :, :count] = keys[:, :, :count]
        begins = to_device([begin for _, begin in found], lengths.device)[:, None]
        for start in range(0, max(map(len, missing)), CHUNK):
            self._catch_up([piece[start : start + CHUNK] for piece in missing], begins + start, own, cross, lengths)
        return own

    def _usable(self, row: DraftRow) -> tuple[Kept | None, int]:
        """What is kept of a row, if it is of use, and the first position whose keys are missing."""
        length, window, layers = len(row.tokens) - 1, self.network.config.window, self.network.config.layers
        # A layer's keys are made of what the layer below saw in its own window.
        fresh = max(0, length - layers * (window - 1)) if window else 0
        kept = self.kept.get(row.request)
        if kept is not None:
            agreed = kept.agreed(row.tokens[:length])
            if agreed >= fresh and kept.first <= (max(0, agreed - window + 1) if window else 0):
                return kept, agreed
        return None, fresh

    def _catch_up(
        self, pieces: list[NDArray[Any]], begins: Tensor, own: OwnKeys, cross: dict[int, KV], lengths: Tensor
    ) -> None:
        """Make the draft's keys of these tokens of each row, from positions `begins (rows, 1)` on."""
        width, device = max(map(len, pieces)), lengths.device
        tokens = to_device([[*piece.tolist(), *[0] * (width - len(piece))] for piece in pieces], device)
        positions = begins + torch.arange(width, device=device)
        own.place(positions, [len(piece) for piece in pieces])
        if self.network.config.layers == 1:
            own.write(0, *self.network.first_keys_values(tokens, positions))
        else:
            self.network.hidden(tokens, positions, cross, self._visible(positions, lengths), own)

    def _keep(self, rows: Sequence[DraftRow], own: OwnKeys, drafted: list[list[int]], ran: int) -> None:
        """Remember the keys of each row's root and of the drafted tokens that were run: all but the last one.

        `ran`: steps that the draft ran, the same for all rows.
        """
        window = self.network.config.window
        for number, (row, tokens) in enumerate(zip(rows, drafted, strict=True)):
            known = np.concatenate([row.tokens, np.array(tokens[:-1], dtype=row.tokens.dtype)])
            columns = own.columns[number]
            columns = columns[: len(columns) - ran + len(tokens)]
            if window:  # the next round begins after this root, at the earliest
                columns = columns[-(window - 1 + len(tokens)) :]
            at = to_device(columns, own.store.device)
            layers = [one[:, number].index_select(2, at) for one in own.store]
            self.kept[row.request] = Kept(known, len(known) - len(columns), layers)
