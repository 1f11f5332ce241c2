"""The drafter: runs a draft model along an expansion until the stop policy ends it, and keeps the draft's cache right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol, cast

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.row import Outcome
from ..core.cache import KVCache
from ..core.transfer import to_device, to_host
from ..core.tree import TokenTree
from ..drafts.base import DraftModel, Queries, Ranked, Step
from ..drafts.program import NetworkDraft
from .expansions.base import Expansion
from .expansions.cape import Cape
from .expansions.chain import Chain
from .law import draft_law
from .stop import AdaptiveStop, FixedLength, StopPolicy

WIDTHS = 32  # the draft reads multiples of so many tokens: a CPU takes milliseconds to generate code for a new width
LAG = 32  # tokens that the first step of a draft catches up with, most


class Drafter(Protocol):
    """Makes proposals. All its state lives in `batch.draft`, row by row; see `DrafterState`."""

    @property
    def reads_hidden(self) -> bool:
        """Must the target's cache keep last hidden states?"""

    def budget(self, tokens: int) -> int:
        """Most nodes of a proposal, the root included, for rows that emit at most so many tokens."""

    def begin(self, rows: int, capacity: int) -> DrafterState | None:
        """The state for so many row slots of `capacity` tokens each."""

    def read(self, batch: Batch) -> None:
        """Catch up with what was committed to the rows in use while their prompts are read."""

    def propose(self, batch: Batch) -> TokenTree:
        """A tree for every row."""

    def commit(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        """Learn which nodes were committed; the rows' tokens hold them already."""

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """Draft by compiled programs from now on, see `Target.compile`."""


class DrafterState(Protocol):
    """What a drafter keeps of each row slot."""

    def exchange(self, one: int, other: int) -> None:
        """What is kept of two row slots changes places."""

    def copy(self, source: int, goal: int, length: int) -> None:
        """A new row begins in slot `goal`. Its first `length` tokens are those of slot `source`, which may be the same."""


class NoDraft:
    """Plain decoding: the empty proposal."""

    reads_hidden = False

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """There is nothing to compile."""
        return False

    def budget(self, tokens: int) -> int:
        return 1

    def begin(self, rows: int, capacity: int) -> None:
        return None

    def read(self, batch: Batch) -> None:
        return None

    def propose(self, batch: Batch) -> TokenTree:
        return lone_roots(batch.roots)

    def commit(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        return None


def lone_roots(roots: Tensor) -> TokenTree:
    """The empty proposal for rows with these roots, `(batch,)`."""
    none = roots[:, None, None][:, :0]
    return TokenTree.comb(roots, none, none.float())


class DrafterWrapper:
    """Passes everything on to another drafter: a base for drafters that watch one, or change one thing of it."""

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner

    @property
    def reads_hidden(self) -> bool:
        return self.inner.reads_hidden

    def budget(self, tokens: int) -> int:
        return self.inner.budget(tokens)

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        return self.inner.compile(mode, say)

    def begin(self, rows: int, capacity: int) -> DrafterState | None:
        return self.inner.begin(rows, capacity)

    def read(self, batch: Batch) -> None:
        self.inner.read(batch)

    def propose(self, batch: Batch) -> TokenTree:
        return self.inner.propose(batch)

    def commit(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        self.inner.commit(batch, outcomes)


@dataclass
class DraftState:
    """The draft's cache. Its committed length is the trusted one: tokens past it are run again at the next round.

    Attributes:
        ran: this round's tree nodes in the order they were run, `(rows, width)` a step, -1 for a dummy.
        lengths: next lengths of the row slots where the stop policy adapts them, else None; `first` is a new row's.
        around: the state of a drafter that uses this one, if one does.
    """

    own: KVCache
    ran: list[Tensor] = field(default_factory=list)
    lengths: list[int] | None = None
    first: int = 0
    around: DrafterState | None = None

    def exchange(self, one: int, other: int) -> None:
        self.own.exchange(one, other)
        if self.around is not None:
            self.around.exchange(one, other)
        if self.lengths is not None:
            self.lengths[one], self.lengths[other] = self.lengths[other], self.lengths[one]

    def copy(self, source: int, goal: int, length: int) -> None:
        self.own.copy(source, goal, min(length, self.own.length(source)))
        if self.around is not None:
            self.around.copy(source, goal, length)
        if self.lengths is not None:
            self.lengths[goal] = self.first


class ModelDrafter:
    """draft model x expansion x stop policy.

    Attributes:
        cap: depths of a proposal, most.
        limit: the same for the next one; whoever lowers it does so by what is known before.
    """

    def __init__(self, model: DraftModel, expansion: Expansion, stop: StopPolicy) -> None:
        self.model, self.expansion, self.stop = model, expansion, stop
        self.cap = self.limit = min(stop.cap, model.max_lag)

    @property
    def reads_hidden(self) -> bool:
        return self.model.reads_hidden

    def budget(self, tokens: int) -> int:
        return self.expansion.budget(min(self.cap, max(1, tokens - 1)))

    def begin(self, rows: int, capacity: int) -> DraftState:
        return self._begin(self.model.new_cache(rows, capacity), rows)

    def _begin(self, own: KVCache, rows: int) -> DraftState:
        start = getattr(self.stop, "start", None)
        first = min(start or 0, self.cap)
        return DraftState(own, lengths=None if start is None else [first] * rows, first=first)

    def read(self, batch: Batch, chunk: int = 512) -> None:
        own, cache = batch.draft.own, batch.cache
        own.use(batch.first, batch.last)
        while max(want - have for have, want in zip(own.host_lengths, cache.host_lengths, strict=True)) > 0:
            spans = zip(batch.rows, own.host_lengths, cache.host_lengths, strict=True)
            # Padding is written, too, and must fit behind the row that is known best.
            most = min(chunk, own.capacity - own.longest)
            pieces = [row.tokens[have : min(want, have + most)] for row, have, want in spans]
            tokens, positions = _padded(pieces, own, most)
            self.model.catch_up(tokens, positions, own, cache)
            own.commit([len(piece) for piece in pieces])

    def __repr__(self) -> str:
        return f"ModelDrafter({self.model!r}, {type(self.expansion).__name__}, {type(self.stop).__name__})"

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """See `Drafter`."""
        done = self.model.compile(mode, say)
        if done and self._whole is not None and isinstance(self.model, NetworkDraft):
            self.model.compile_chain(self.cap, self._whole.width, mode, say)
        return done

    @property
    def _whole(self) -> Chain | None:
        """The expansion, if a program may draft all depths at once: a chain, with siblings or not, of fixed length."""
        fixed = type(self.expansion) in {Chain, Cape} and type(self.stop) is FixedLength
        return cast("Chain", self.expansion) if fixed else None

    def propose(self, batch: Batch) -> TokenTree:
        own, rows = batch.draft.own, batch.rows
        own.use(batch.first, batch.last)
        self.resume(batch)
        # A proposal longer than what its row may still emit would be verified for nothing.
        caps = [min(self.limit, max(1, row.budget - 1)) for row in rows]
        if batch.draft.lengths is not None:
            caps = [min(cap, length) for cap, length in zip(caps, batch.draft.lengths[batch.first :], strict=False)]
        shortest, longest = min(caps), max(caps)
        if (compiled := self._compiled_chain(batch, own, caps)) is not None:
            return compiled
        tree = TokenTree(batch.roots, self.expansion.capacity(longest))
        frontier = torch.zeros(tree.batch, 1, dtype=torch.long, device=batch.device)
        row_caps = to_device(caps, batch.device) if shortest < longest else None
        step = self.first_step(batch, own)
        batch.draft.ran = [frontier]
        for depth in itertools.count(1):
            law = draft_law(batch, tree, frontier, step, depth - 1, self.expansion.draws)
            frontier = self.expansion.grow(tree, frontier, law)
            more = depth < longest and self.stop.more(tree, depth, law)
            # Without a policy that looks at the law, the host knows that the row of the largest cap drafts on.
            unknown = isinstance(more, Tensor) or self.expansion.may_end
            if more is not False and depth >= shortest and row_caps is not None:
                more = more & (row_caps > depth)
            if isinstance(more, Tensor):
                frontier = frontier.masked_fill(~more[:, None], -1)
            if more is not False and unknown:
                # Asked of the frontier: a stopped row has no say.
                more = to_host((frontier >= 0).any())
            if more is False or frontier.shape[1] == 0:
                break
            step = self._step(batch, own, tree, frontier)
        tree = self.expansion.finish(tree)
        tree.memo = torch.cat(batch.draft.ran, 1)
        return tree

    def resume(self, batch: Batch) -> None:
        """Catch up after many rounds without the draft: the first step takes a few tokens, and its padding must fit behind the
        row that is known best."""
        own = batch.draft.own
        lag = max(want - have for want, have in zip(batch.cache.host_lengths, own.host_lengths, strict=True))
        if lag > min(LAG, own.capacity - own.longest - self.budget(self.cap + 1)):
            self.read(batch)

    def _compiled_chain(self, batch: Batch, own: KVCache, caps: list[int]) -> TokenTree | None:
        """The proposal of a whole chain by one program; None where there is none for it."""
        length, expansion = max(caps), self._whole
        if expansion is None:
            return None
        ranked = self.draft_whole(batch, own, length, expansion.width)
        if ranked is None:
            return None
        depths = None
        if min(caps) < length:
            depths = torch.arange(length, device=batch.device) < to_device(caps, batch.device)[:, None]
        tree = expansion.comb(batch.roots, ranked, depths)
        tree.memo = _run_by_chain(tree.batch, length, expansion.width, batch.device)
        return tree

    def draft_whole(self, batch: Batch, own: KVCache, length: int, ranked: int) -> Ranked | None:
        """What is ranked first at each depth of a chain, by one program; None where there is none for these rows."""
        laws, cache, model = batch.laws, batch.cache, self.model
        if not laws.bare or not isinstance(model, NetworkDraft) or (length, ranked) not in model.chains:
            return None
        ranking = laws.ranking(cache.host_lengths, batch.root_positions, 0, length, model.vocab_size)
        pieces = [row.tokens[have:] for row, have in zip(batch.rows, own.host_lengths, strict=True)]
        last = [len(piece) - 1 for piece in pieces]
        return model.draft_chain(_side_by_side(pieces, own), last, own, cache, (length, ranked), ranking)

    def _run(self, batch: Batch, queries: Queries, own: KVCache, depth: int, kept: Tensor | None = None) -> Step:
        """A step whose logits are of nodes of this depth; `kept`: of these queries alone."""
        laws, model = batch.laws, self.model
        if laws.bare and isinstance(model, NetworkDraft) and model.compiled:
            cache, width = batch.cache, (queries.tokens if kept is None else kept).shape[1]
            ranking = laws.ranking(cache.host_lengths, batch.root_positions, depth, 1, model.vocab_size)
            if ranking is not None:
                ranking = ranking[0], ranking[1].expand(-1, width, -1)
            found = model.ranked_step(queries, own, cache, kept, ranking)
            if found is not None:
                return found
        logits = model.step(queries, own, batch.cache)
        return Step(logits if kept is None else logits.gather(1, kept[..., None].expand(-1, -1, logits.shape[-1])))

    def first_step(self, batch: Batch, own: KVCache) -> Step:
        """Run every token that the draft has not run yet, up to the root; what follows the root."""
        pieces = [row.tokens[length:] for row, length in zip(batch.rows, own.host_lengths, strict=True)]
        tokens, positions = _padded(pieces, own)
        counts = [len(piece) - 1 for piece in pieces]
        step = self._run(batch, Queries(tokens, positions, positions), own, 0, to_device(counts, own.device)[:, None])
        # The root stays scratch slot 0: it is the first token of this round's tree.
        own.commit(counts)
        own.scratch = 1
        return step

    def _step(self, batch: Batch, own: KVCache, tree: TokenTree, frontier: Tensor) -> Step:
        """Run the frontier. Rows with no frontier node run a dummy."""
        at, roots = frontier.clamp(min=0), batch.root_positions
        ran, parents = batch.draft.ran, None
        ran.append(frontier)
        if own.scratch + at.shape[1] == len(ran):  # width 1 throughout
            return self.next_step(batch, own, tree.tokens.gather(1, at), tree.levels)
        slots = torch.cat(ran, 1)  # (batch, slots): the node in each scratch slot, -1 for a dummy
        nodes = slots.clamp(min=0)
        scratch = roots[:, None] + tree.depth.gather(1, nodes)
        above = tree.ancestors.gather(1, at[..., None].expand(-1, -1, tree.nodes))
        above = above.gather(2, nodes[:, None].expand(-1, at.shape[1], -1)) & (slots >= 0)[:, None]
        if own.hidden is not None:  # a parent was run before its children, the root in slot 0
            parents = (slots[:, None] == tree.parents.gather(1, at)[..., None]).int().argmax(-1)
        positions = scratch[:, -at.shape[1] :]
        queries = Queries(tree.tokens.gather(1, at), positions, scratch, above, parents)
        step = self._run(batch, queries, own, tree.levels)
        own.scratch += at.shape[1]
        return step

    def next_step(self, batch: Batch, own: KVCache, tokens: Tensor, depth: int) -> Step:
        """Run the next tokens `(batch, 1)` of a chain, at this depth; every slot that was run is their ancestor."""
        roots = batch.root_positions
        scratch = roots[:, None] + torch.arange(depth + 1, device=roots.device)
        parents = None if own.hidden is None else tokens.new_full(tokens.shape, depth - 1)
        step = self._run(batch, Queries(tokens, scratch[:, -1:], scratch, parents=parents), own, depth)
        own.scratch += 1
        return step

    def commit(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        self._trust(batch.draft, outcomes)
        lengths = batch.draft.lengths
        if lengths is not None:
            stop = cast("AdaptiveStop", self.stop)
            for slot, one in enumerate(outcomes, batch.first):
                lengths[slot] = min(self.cap, stop.next_length(lengths[slot], len(one.path) - 1 == one.depth))

    def _trust(self, draft: DraftState, outcomes: Sequence[Outcome]) -> None:
        """Trust the longest beginning of each path that was run; its slots move next to the draft's committed ones."""
        trusted = []
        for one in outcomes:
            in_slot = one.memo if self.model.trusts_own else one.memo[:1]
            slot = {node: at for at, node in enumerate(in_slot)}
            trusted.append([slot[node] for node in itertools.takewhile(slot.__contains__, one.grown)])
        draft.own.keep(trusted)


@lru_cache(maxsize=64)
def _run_by_chain(batch: int, length: int, width: int, device: torch.device) -> Tensor:
    """Which node of a comb is in each scratch slot after a chain was drafted whole: that of each depth but the last."""
    nodes = ((torch.arange(length, device=device) - 1) * width + 1).clamp(min=0)
    return nodes.repeat(batch, 1)


def _side_by_side(pieces: list[list[int]], own: KVCache, room: int = 0) -> Tensor:
    """Tokens `(rows, width)`, padded; `room`: to a multiple of `WIDTHS`, and at most so wide."""
    width = max(map(len, pieces))
    width = max(width, min(room, -(-width // WIDTHS) * WIDTHS))
    return to_device([piece + [0] * (width - len(piece)) for piece in pieces], own.device)


def _padded(pieces: list[list[int]], own: KVCache, room: int = 0) -> tuple[Tensor, Tensor]:
    """The same, and their positions if they follow what `own` has committed."""
    tokens = _side_by_side(pieces, own, room)
    return tokens, own.lengths[:, None] + torch.arange(tokens.shape[1], device=own.device)
