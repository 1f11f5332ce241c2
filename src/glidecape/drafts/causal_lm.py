"""A standalone causal LM as a draft: vanilla speculative decoding. It keeps its own cache and never sees the target."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..core.cache import KVCache
from ..target.target import Target
from .base import Queries
from .sharing import SharedDraft


class StandaloneDraft(SharedDraft):
    """Any causal LM that `Target` accepts, joined to the decode loop (a `DraftModel`).

    >>> from glidecape import StandaloneDraft, Target, make_drafter
    >>> model = Target.from_pretrained("path/to/model")
    >>> make_drafter("vanilla", StandaloneDraft(model), length=4)  # the best draft there is, and the slowest
    ModelDrafter(StandaloneDraft(path/to/model: 0.032 M parameters, bfloat16 on cpu), Chain, FixedLength)
    """

    kind = "lm"

    def __init__(self, model: Target) -> None:
        self.model = model
        self.reads_hidden, self.trusts_own = False, True
        self.max_lag = 2**31 - 1  # no lag: it reads only what it wrote itself

    def __repr__(self) -> str:
        return f"StandaloneDraft({self.model.summary})"

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        return self.model.new_cache(batch, capacity)

    def catch_up(self, tokens: Tensor, positions: Tensor, own: KVCache, target_cache: KVCache) -> None:
        self.model.forward(tokens, positions, own, logits_to_keep=1)

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """See `Target.compile`."""
        return self.model.compile(mode, say)

    def step(self, queries: Queries, own: KVCache, target_cache: KVCache) -> Tensor:
        q = queries
        scratch = q.scratch_positions
        return self.model.forward(q.tokens, q.positions, own, q.ancestors, scratch_positions=scratch).logits
