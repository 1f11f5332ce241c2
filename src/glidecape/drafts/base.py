"""What a draft is to the decode loop: the protocols that the author of a new draft implements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ..core.cache import KVCache


@runtime_checkable
class DepthModel(Protocol):
    """A network that predicts every depth at once, from the target's last hidden states alone.

    Attributes:
        max_lag: deepest node it was trained for.
        reads_hidden: must the target's cache keep last hidden states?
    """

    max_lag: int
    reads_hidden: bool

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """Predict by a compiled program from now on; see `Target.compile`."""

    def all_depths(self, target_cache: KVCache) -> Tensor:
        """Logits `(batch, max_lag, vocab)` of the nodes one, two, … below the root."""


@dataclass
class Queries:
    """What a draft runs in one step.

    Attributes:
        tokens, positions: `(batch, queries)`; positions are absolute.
        scratch_positions: `(batch, scratch)` of all scratch slots of the draft's own cache, the queries' last.
        ancestors: `(batch, queries, scratch)` which of these slots a query may read besides the committed ones; None: every
            one before it.
        parents: `(batch, queries)` scratch slots of the queries' parents, where the draft's own cache keeps hidden states.
            None: not kept, or the first step of a round, whose queries are committed tokens and the root.
    """

    tokens: Tensor
    positions: Tensor
    scratch_positions: Tensor
    ancestors: Tensor | None = None
    parents: Tensor | None = None


class Ranked(NamedTuple):
    """The tokens that a draft ranks first after each query.

    Attributes:
        tokens: `(batch, queries, count)` int64, best first; scores: what they are ranked by; log_q: their log-probabilities at
            temperature 1.
        norm: `(batch, queries)` logsumexp of the scores of all tokens.
        entropy, confidence: `(batch, queries)` of the law at temperature 1: nats, largest probability.
    """

    tokens: Tensor
    scores: Tensor
    log_q: Tensor
    norm: Tensor
    entropy: Tensor
    confidence: Tensor


@dataclass
class Step:
    """What a step of a draft gives.

    Attributes:
        logits: `(batch, queries, vocab)`.
        scores: of the same shape, what tokens are ranked by, and `ranked`, the first of them: where a program made them.
    """

    logits: Tensor
    scores: Tensor | None = None
    ranked: Ranked | None = None


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

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """An empty cache of `batch` row slots for its own keys and values."""

    def catch_up(self, tokens: Tensor, positions: Tensor, own: KVCache, target_cache: KVCache) -> None:
        """Write the keys and values of committed tokens `(batch, count)`, without drafting from them."""

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """Draft by a compiled program from now on; see `Target.compile`."""

    def step(self, queries: Queries, own: KVCache, target_cache: KVCache) -> Tensor:
        """Run queries; logits `(batch, queries, vocab)`."""
