"""The oracle of `auto` in the loop: rounds that know the text, and propose what makes it in the least time.

At every token of a text it is recorded how many of the draft's first choices the target takes there, whether the next token is
among those that the draft ranked, and how many copied tokens are right. Under the measured costs the fastest rounds to the
end of the text follow by dynamic programming. They are then run by `auto`'s own code and timed like any other rounds.

This is exact where the output is fixed (greedily, or given shared noise), and where a draft does not depend on the rounds
before it: for draft LMs, and for GliDe of one layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..batch.batch import Batch
from ..batch.row import Row
from ..core.params import SamplingParams
from ..core.tree import TokenTree
from ..costmodel import RoundCosts
from ..drafting.auto.acceptance import Array
from ..drafting.auto.drafter import DEPTH, NODES, RANKED, AutoDrafter
from ..drafting.auto.fixed import FixedRounds, Shape
from ..drafting.auto.state import GREEDY, NGRAM, SAMPLED, Level, RowState
from ..drafting.expansions.cape import Cape
from ..drafting.lookup import NgramIndex
from ..errors import InputError
from ..fit import record
from ..target.target import Target

Known = tuple[float, int | None, tuple[int, ...]]


@dataclass(frozen=True)
class Place:
    """Of a token of a text, what the target takes of a proposal that begins there.

    Attributes:
        chain: the draft's first choices.
        ranked: the same, where the last token may be any that the draft ranked.
        copied: tokens copied from the text before.
    """

    chain: int
    ranked: int
    copied: int


def fastest(places: Sequence[Place], costs: RoundCosts, depths: int) -> list[Shape]:
    """The round to run at each token of a text, so that the whole text takes the least time.

    Args:
        depths: drafted, most.

    >>> [one.nodes for one in fastest([Place(0, 0, 2), Place(0, 0, 0), Place(0, 0, 0)], RoundCosts.linear(0.1, 0.2), 4)]
    [2, 0, 0]
    """
    time, best = [0.0] * (len(places) + 1), []
    for at in reversed(range(len(places))):
        left = len(places) - at - 1
        found = ((cost + time[at + 1 + min(n, left)], shape) for shape, cost, n in _rounds(places[at], costs, depths))
        time[at], shape = min(found, key=lambda one: one[0])
        best.append(shape)
    return best[::-1]


def _rounds(place: Place, costs: RoundCosts, depths: int) -> Iterator[tuple[Shape, float, int]]:
    """The rounds that may be run at a token: each with its cost over a plain one, and the tokens that it has accepted."""
    yield Shape(0, 0), 1.0, 0
    for length, cost in costs.chains:
        yield Shape(length, length, chain=True), 1.0 + cost, min(place.chain, length)
    for nodes in range(1, place.copied + 1):
        yield Shape(0, nodes), costs.verify(1 + nodes), nodes
    for depth in range(1, min(place.ranked, depths) + 1):
        yield Shape(depth, depth), costs.of(depth, depth), depth
    if costs.length and place.ranked:
        for depth in range(costs.length, max(costs.length, min(place.ranked, depths)) + 1):
            nodes = min(place.ranked, depth)
            more = costs.whole + costs.draft * (depth - costs.length)
            yield Shape(depth, nodes, whole=True), more + costs.verify(1 + nodes), nodes


class Oracle(FixedRounds):
    """An `AutoDrafter` that knows the texts, see `learn_text`. It decodes one row at a time.

    Args:
        of: the drafter whose rounds it runs, with prices.
    """

    def __init__(self, of: AutoDrafter) -> None:
        super().__init__(of)
        self._texts: dict[Known, tuple[list[int], list[Shape]]] = {}
        self._following: list[int] = []

    def __repr__(self) -> str:
        return f"Oracle({super().__repr__()})"

    def learn_text(self, target: Target, prompt: Sequence[int], params: SamplingParams, text: Sequence[int]) -> None:
        """Know what plain decoding makes of a prompt: `text`, token ids.

        Raises:
            InputError: there is no draft, or it predicts all depths at once.
        """
        if self.runner is None:
            raise InputError("this oracle needs a draft")
        depths = min(DEPTH, self.runner.model.max_lag)
        model: Any = self.runner.model
        chain, ranked = (
            record(target, model, [prompt], params, expansion, depths)[0] for expansion in (None, Cape((RANKED - 1,)))
        )
        tokens, index, places = [*prompt, *text], NgramIndex(NGRAM), []
        for at, (first, any_of) in enumerate(zip(chain, ranked, strict=True), len(prompt)):
            words = index.match(tokens[:at], NODES)[1] if self.copying else []
            agreed = _agreement(words, tokens[at:])
            places.append(Place(first.accepted, any_of.accepted, agreed))
        kind = GREEDY if params.greedy else SAMPLED
        costs = self.prices[kind].at(1, len(prompt) + len(text) // 2)
        self._texts[_known(params, prompt)] = list(text), fastest(places, costs, depths)

    def propose(self, batch: Batch) -> TokenTree:
        (row,) = batch.rows
        at = len(row.tokens) - row.prompt_length
        text, shapes = self._texts[_known(row.params, row.tokens[: row.prompt_length])]
        self.shape, self._following = shapes[at], text[at:]
        return super().propose(batch)

    def _copy(self, row: Row, own: RowState) -> tuple[int, list[int]]:
        """The tokens that are right, where they are what is proposed."""
        if self.shape.depths or not self.shape.nodes:
            return 0, []
        match, words = AutoDrafter._copy(self, row, own)
        return match, words[: self.shape.nodes]

    def _levels(self, ranked: Sequence[Tensor], depth: int, kinds: list[int], recent: Array) -> list[Level]:
        levels = super()._levels(ranked, depth, kinds, recent)
        for at, level in enumerate(levels, depth - 1):
            level.p = (level.tokens == (self._following[at] if at < len(self._following) else -1)).astype(float)
        return levels


def _known(params: SamplingParams, prompt: Sequence[int]) -> Known:
    """What decides the beginning of a text."""
    return params.temperature, params.seed, tuple(prompt)


def _agreement(words: Sequence[int], following: Sequence[int]) -> int:
    """How many of `words` are the tokens that follow."""
    wrong = (at for at, (a, b) in enumerate(zip(words, following, strict=False)) if a != b)
    return next(wrong, min(len(words), len(following)))
