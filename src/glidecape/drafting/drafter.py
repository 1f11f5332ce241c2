"""The drafter: runs a draft model along an expansion until the stop policy ends it, and keeps the draft's cache right."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..cache import KVCache
from ..masks import tree_mask
from ..state import DecodeState
from ..tree import TokenTree
from .expansion import Expansion
from .law import draft_law
from .stop import StopPolicy


class DraftModel(Protocol):
    """A network that proposes tokens. It writes its keys and values to the scratch of `own`; who is committed is the
    drafter's business.

    Attributes:
        max_lag: deepest node it was trained for.
        reads_hidden: does it read the target's last hidden states? Then the target's cache keeps them.
        trusts_own: are its keys and values of an accepted node still right once the target has verified the node? If not,
            accepted tokens are run again in the next round, with the target's true hidden states.
    """

    max_lag: int
    reads_hidden: bool
    trusts_own: bool

    def new_cache(self, batch: int, capacity: int) -> KVCache: ...

    def catch_up(self, tokens: Tensor, positions: Tensor, own: KVCache, target_cache: KVCache) -> None:
        """Write the keys and values of committed tokens `(batch, count)`, without drafting from them."""

    def step(
        self,
        tokens: Tensor,
        positions: Tensor,
        own: KVCache,
        own_mask: Tensor | None,
        target_cache: KVCache,
        scratch_positions: Tensor,
        parents: Tensor | None,
    ) -> Tensor:
        """Run queries `(batch, queries)`; logits `(batch, queries, vocab)`.

        Args:
            own_mask: `(batch, 1, queries, slots)` over the slots of `own`; None: every slot.
            scratch_positions: `(batch, scratch)` of all scratch slots of `own`, the queries' last.
            parents: `(batch, queries)` scratch slots of the queries' parents, where `own` keeps hidden states. None: not
                kept, or the first step of a round, whose queries are committed tokens and the root.
        """


class Drafter(Protocol):
    """Makes proposals. All its state lives in `state.draft`, row by row."""

    @property
    def reads_hidden(self) -> bool:
        """Must the target's cache keep last hidden states?"""

    def budget(self, tokens: int) -> int:
        """Most nodes of a proposal, the root included, for rows that emit at most so many tokens."""

    def admit(self, state: DecodeState) -> None: ...

    def propose(self, state: DecodeState) -> TokenTree: ...

    def commit(self, state: DecodeState, tree: TokenTree, paths: list[list[int]]) -> None: ...


class NoDraft:
    """Plain decoding: the empty proposal."""

    reads_hidden = False

    def budget(self, tokens: int) -> int:
        return 1

    def admit(self, state: DecodeState) -> None:
        state.draft = None

    def propose(self, state: DecodeState) -> TokenTree:
        return TokenTree(state.roots)

    def commit(self, state: DecodeState, tree: TokenTree, paths: list[list[int]]) -> None:
        return None


class Around:
    """Passes everything on to another drafter: a base for drafters that watch one, or change one thing of it."""

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner

    @property
    def reads_hidden(self) -> bool:
        return self.inner.reads_hidden

    def budget(self, tokens: int) -> int:
        return self.inner.budget(tokens)

    def admit(self, state: DecodeState) -> None:
        self.inner.admit(state)

    def propose(self, state: DecodeState) -> TokenTree:
        return self.inner.propose(state)

    def commit(self, state: DecodeState, tree: TokenTree, paths: list[list[int]]) -> None:
        self.inner.commit(state, tree, paths)


@dataclass
class DraftState:
    """The draft's cache. Its committed length is the trusted one: tokens past it are run again at the next round.

    `ran` holds the tree nodes of this round in the order they were run, one column of nodes a slot. `lengths` are the
    next lengths of the rows where the stop policy adapts them, else None.
    """

    own: KVCache
    ran: list[Tensor]
    lengths: list[int] | None = None

    def select(self, rows: list[int]) -> None:
        self.own.select(rows)
        if self.lengths is not None:
            self.lengths = [self.lengths[i] for i in rows]


class ModelDrafter:
    """draft model x expansion x stop policy."""

    def __init__(self, model: DraftModel, expansion: Expansion, stop: StopPolicy) -> None:
        self.model, self.expansion, self.stop = model, expansion, stop
        self.cap = min(stop.cap, model.max_lag)

    @property
    def reads_hidden(self) -> bool:
        return self.model.reads_hidden

    def budget(self, tokens: int) -> int:
        return self.expansion.budget(min(self.cap, max(1, tokens - 1)))

    def admit(self, state: DecodeState) -> None:
        """Read the prompts, all but their last tokens."""
        own = self.model.new_cache(len(state.rows), state.cache.capacity)
        self._catch_up(state, own, [len(row.tokens) - 1 for row in state.rows])
        state.draft = DraftState(own, [], self._first_lengths(len(state.rows)))

    def _first_lengths(self, rows: int) -> list[int] | None:
        start = getattr(self.stop, "start", None)
        return None if start is None else [min(start, self.cap)] * rows

    def _catch_up(self, state: DecodeState, own: KVCache, upto: list[int], chunk: int = 512) -> None:
        device = own.keys[0].device
        while any(have < want for have, want in zip(own.lengths, upto, strict=True)):
            spans = [(have, min(want, have + chunk)) for have, want in zip(own.lengths, upto, strict=True)]
            width = max(end - start for start, end in spans)
            pieces = [row.tokens[start:end] for row, (start, end) in zip(state.rows, spans, strict=True)]
            tokens = torch.tensor([piece + [0] * (width - len(piece)) for piece in pieces], device=device)
            start = torch.tensor(own.lengths, device=device)[:, None]
            self.model.catch_up(tokens, start + torch.arange(width, device=device), own, state.cache)
            own.commit([len(piece) for piece in pieces])

    def propose(self, state: DecodeState) -> TokenTree:
        tree, own = TokenTree(state.roots), state.draft.own
        roots = state.root_positions
        # A proposal longer than what its row may still emit would be verified for nothing.
        caps = [min(self.cap, max(1, row.budget - 1)) for row in state.rows]
        if state.draft.lengths is not None:
            caps = [min(cap, length) for cap, length in zip(caps, state.draft.lengths, strict=True)]
        frontier = torch.zeros(tree.batch, 1, dtype=torch.long, device=roots.device)
        logits = self._first_step(state, own)
        state.draft.ran = [frontier]
        depth = 0
        while True:
            positions = roots[:, None] + depth
            law = draft_law(state, tree, frontier, logits, positions.expand_as(frontier), self.expansion.draws)
            frontier = self.expansion.grow(tree, frontier, law)
            depth += 1
            more = depth < max(caps) and self.stop.more(tree, depth, law)
            if more is not False and depth >= min(caps):
                more = more & torch.tensor([depth < cap for cap in caps], device=roots.device)
            if isinstance(more, Tensor):
                frontier = frontier.masked_fill(~more[:, None], -1)
                more = bool((frontier >= 0).any())  # not `more`: a stopped row has no say
            if not more or frontier.shape[1] == 0:
                return self.expansion.finish(tree)
            logits = self._step(state, own, tree, frontier, roots)

    def _first_step(self, state: DecodeState, own: KVCache) -> Tensor:
        """Run every token that the draft has not run yet, up to the root; logits `(batch, 1, vocab)` at the root."""
        device = own.keys[0].device
        pieces = [row.tokens[length:] for row, length in zip(state.rows, own.lengths, strict=True)]
        width = max(len(piece) for piece in pieces)
        tokens = torch.tensor([piece + [0] * (width - len(piece)) for piece in pieces], device=device)
        positions = torch.tensor(own.lengths, device=device)[:, None] + torch.arange(width, device=device)
        sees_all = width == 1 and len(set(own.lengths)) == 1
        mask = None if sees_all else tree_mask(own.lengths, None, width, max(own.lengths) + width)
        logits = self.model.step(tokens, positions, own, mask, state.cache, positions, None)
        last = torch.tensor([len(piece) - 1 for piece in pieces], device=device)
        # The root stays scratch slot 0: it is the first token of this round's tree.
        own.commit([len(piece) - 1 for piece in pieces])
        own.scratch = 1
        return logits.gather(1, last[:, None, None].expand(-1, 1, logits.shape[-1]))

    def _step(self, state: DecodeState, own: KVCache, tree: TokenTree, frontier: Tensor, roots: Tensor) -> Tensor:
        """Run the frontier; logits `(batch, width, vocab)`. Rows with no frontier node run a dummy."""
        at = frontier.clamp(min=0)
        state.draft.ran.append(frontier)
        slots = torch.cat(state.draft.ran, 1)  # (batch, slots): the node in each scratch slot, -1 for a dummy
        ran = slots.clamp(min=0)
        depths = tree.depth.gather(1, ran)
        keys = max(own.lengths) + ran.shape[1]
        chain = ran.shape[1] == len(state.draft.ran)  # width 1 throughout: every slot is an ancestor
        if chain:
            mask = tree_mask(own.lengths, None, 1, keys) if len(set(own.lengths)) > 1 else None
        else:
            above = tree.ancestors.gather(1, at[..., None].expand(-1, -1, tree.nodes))
            above = above.gather(2, ran[:, None].expand(-1, at.shape[1], -1)) & (slots >= 0)[:, None]
            mask = tree_mask(own.lengths, above, at.shape[1], keys)
        parents = None
        if own.hidden is not None and chain:
            parents = at.new_full(at.shape, ran.shape[1] - 2)
        elif own.hidden is not None:  # a parent was run before its children, the root in slot 0
            parents = (slots[:, None] == tree.parents.gather(1, at)[..., None]).int().argmax(-1)
        scratch = roots[:, None] + depths
        positions = roots[:, None] + tree.depth.gather(1, at)
        logits = self.model.step(tree.tokens.gather(1, at), positions, own, mask, state.cache, scratch, parents)
        own.scratch += at.shape[1]
        return logits

    def commit(self, state: DecodeState, tree: TokenTree, paths: list[list[int]]) -> None:
        self._trust(state, tree, paths)
        if state.draft.lengths is not None:
            state.draft.lengths = [
                min(self.cap, self.stop.next_length(length, len(path) - 1 == end))  # type: ignore[attr-defined]
                for length, path, end in zip(state.draft.lengths, paths, tree.deepest.tolist(), strict=True)
            ]

    def _trust(self, state: DecodeState, tree: TokenTree, paths: list[list[int]]) -> None:
        """Trust the longest beginning of each path that was run; its slots move next to the draft's committed ones."""
        ran = torch.cat(state.draft.ran if self.model.trusts_own else state.draft.ran[:1], 1).tolist()
        trusted = []
        for row, (path, in_slot) in enumerate(zip(paths, ran, strict=True)):
            slot = {node: at for at, node in enumerate(in_slot)}
            if tree.grown_as is not None:  # a pruned tree has numbers of its own
                path = tree.grown_as[row, path].tolist()
            trusted.append([slot[node] for node in itertools.takewhile(slot.__contains__, path)])
        state.draft.own.keep(trusted)
