"""What a draft thinks at every position of the target's own output, written down without timing.

Plain decoding is run with the draft beside it: at every token the draft proposes a chain of several tokens, which is
noted and not verified. So each position has the draft's laws from a true context, as the loop would have met them had a
round begun there, and any stop policy can be replayed on the notes afterwards (`curves`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..core.params import SamplingParams
from ..core.sampling import log_law, widen
from ..core.tree import TokenTree
from ..drafting.drafter import DrafterWrapper, ModelDrafter
from ..drafting.expansions.chain import Chain
from ..drafting.law import DraftLaw
from ..drafting.stop import FixedLength
from ..drafts.base import DraftModel
from ..engine.decode import start
from ..engine.round import run_round
from ..target.target import Target, TargetOutput


@dataclass
class Watched:
    """A list entry for each emitted token, in order.

    Attributes:
        matches: how many tokens of the chain drafted before it are the target's own.
        entropy, confidence: of the draft's law at each depth of that chain: nats at temperature 1, largest probability.
        overlap: sum of min(p, q) of the two laws of this token at the serving temperature; greedy: do they agree?
        overlap_1: the same at temperature 1, all other options off: what SVIP's bound is about.
    """

    matches: list[int] = field(default_factory=list)
    entropy: list[list[float]] = field(default_factory=list)
    confidence: list[list[float]] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)
    overlap_1: list[float] = field(default_factory=list)


class _LogitsRecorder:
    """A target that remembers the logits of its last forward."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.logits = torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.target, name)

    def forward(self, *args: Any, **options: Any) -> TargetOutput:
        out = self.target.forward(*args, **options)
        self.logits = out.logits
        return out


class _LawRecorder(Chain):
    """A chain that keeps the laws it grew from."""

    def __init__(self) -> None:
        self.laws: list[DraftLaw] = []

    def grow(self, tree: TokenTree, frontier: Tensor, law: DraftLaw) -> Tensor:
        self.laws.append(law)
        return super().grow(tree, frontier, law)


class _DraftOnly(DrafterWrapper):
    """Drafts as another drafter does, and proposes nothing."""

    tree: TokenTree | None = None

    def propose(self, batch: Batch) -> TokenTree:
        self.tree = self.inner.propose(batch)
        root = TokenTree(batch.roots, capacity=1)
        root.memo = self.tree.memo
        return root


@torch.no_grad()
def watch(target: Target, model: DraftModel, prompt: list[int], params: SamplingParams, depth: int) -> Watched:
    """The notes of one prompt; the draft runs `depth` tokens ahead, less at the end and past its max lag.

    Raises:
        InputError: see `start`.
    """
    noting = _LawRecorder()
    drafter = _DraftOnly(ModelDrafter(model, noting, FixedLength(depth)))
    heard: Any = _LogitsRecorder(target)
    state = start(heard, drafter, [prompt], params)
    (row,), seen = state.rows, Watched()
    drafted: list[list[int]] = []
    while row.finish is None:
        noting.laws = []
        run_round(heard, drafter, state)
        assert drafter.tree is not None
        drafted.append(drafter.tree.tokens[0, 1:].tolist())
        seen.entropy.append([round(float(law.entropy[0, 0]), 4) for law in noting.laws])
        seen.confidence.append([round(float(law.confidence[0, 0]), 4) for law in noting.laws])
        p, q = heard.logits[0, 0], noting.laws[0].logits[0, 0]
        seen.overlap.append(round(overlap(p, q, params), 4))
        seen.overlap_1.append(round(overlap(p, q, SamplingParams(1.0)), 4))
    emitted = row.new_tokens
    seen.matches = [_matches(chain, emitted[at:]) for at, chain in enumerate(drafted)]
    return seen


def overlap(p: Tensor, q: Tensor, params: SamplingParams) -> float:
    """Sum of min(p, q) of two laws given by logits `(vocab,)`, with temperature and truncation applied to both.

    >>> overlap(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.8, 0.2]).log(), SamplingParams(1.0))
    0.7
    """
    if params.greedy:
        return float(p.argmax() == q.argmax())
    laws = [log_law(widen(logits).double(), params).exp() for logits in (p, q)]
    return round(float(torch.minimum(*laws).sum()), 6)


def _matches(chain: list[int], emitted: list[int]) -> int:
    count = 0
    for drafted, token in zip(chain, emitted, strict=False):
        if drafted != token:
            break
        count += 1
    return count
