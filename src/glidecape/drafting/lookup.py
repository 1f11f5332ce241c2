"""Prompt lookup: what followed the same words earlier in the prompt or output is proposed again. There is no draft model.

Source: A. Saxena, "Prompt lookup decoding" (2023); transformers' `prompt_lookup_num_tokens`. Differs: among equally long
matches the latest one counts, as text repeats what is near more often; a row without a match proposes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..batch.batch import Batch
from ..batch.row import Outcome, Row
from ..core.transfer import to_device
from ..core.tree import TokenTree
from ..errors import InputError


@dataclass
class NgramIndex:
    """Where the n-grams of one row were last followed by something.

    Attributes:
        longest: n-grams of 1 .. longest tokens are known.
        after: from an n-gram to the place of the token that followed it last.
        known: tokens of the row whose n-grams before them are in `after`.

    >>> NgramIndex(3).propose([1, 2, 3, 9, 2, 3], 2)
    [9, 2]
    """

    longest: int
    after: dict[tuple[int, ...], int] = field(default_factory=dict)
    known: int = 0

    def propose(self, tokens: list[int], length: int) -> list[int]:
        """Up to `length` tokens that followed the longest n-gram which ends `tokens` and occurred before; [] for none."""
        place = self.place(tokens)[0]
        return tokens[place : place + length] if place else []

    def place(self, tokens: list[int]) -> tuple[int, int]:
        """Where that n-gram was followed last, and its length; (0, 0) for none."""
        for at in range(self.known, len(tokens)):
            for n in range(1, min(self.longest, at) + 1):
                self.after[tuple(tokens[at - n : at])] = at
        self.known = len(tokens)
        for n in range(min(self.longest, len(tokens)), 0, -1):
            place = self.after.get(tuple(tokens[-n:]))
            if place is not None:
                return place, n
        return 0, 0

    def match(self, tokens: list[int], length: int, longest: int = 32) -> tuple[int, list[int]]:
        """How many tokens before the place agree with the end of `tokens`, `longest` at most, and what followed there.

        >>> NgramIndex(1).match([5, 1, 2, 9, 1, 2], 1)
        (2, [9])
        """
        place, n = self.place(tokens)
        if not place:
            return 0, []
        while n < min(place, longest) and tokens[place - n - 1] == tokens[-n - 1]:
            n += 1
        return n, tokens[place : place + length]


@dataclass
class LookupState:
    """One index a row slot."""

    indexes: list[NgramIndex]

    def exchange(self, one: int, other: int) -> None:
        self.indexes[one], self.indexes[other] = self.indexes[other], self.indexes[one]

    def copy(self, source: int, goal: int, length: int) -> None:
        self.indexes[goal] = NgramIndex(self.indexes[goal].longest)


class LookupDrafter:
    """Prompt lookup as a `Drafter`: a chain of tokens copied from the row itself.

    Args:
        length: tokens proposed at most.
        ngram: longest n-gram that is looked for; the longest match is used.

    Lossless: every node is chosen deterministically, so verify takes it for a point mass.
    """

    reads_hidden = False

    def __init__(self, length: int = 5, ngram: int = 3) -> None:
        if length < 1 or ngram < 1:
            raise InputError(f"prompt lookup needs a length and an n-gram of at least 1, not {length} and {ngram}")
        self.length, self.ngram = length, ngram
        self.limit = length  # of the next proposal

    def compile(self, mode: str = "on", say: Callable[[str], None] = print) -> bool:
        """There is nothing to compile."""
        return False

    def budget(self, tokens: int) -> int:
        return 1 + min(self.length, max(1, tokens - 1))

    def begin(self, rows: int, capacity: int) -> LookupState:
        return LookupState([NgramIndex(self.ngram) for _ in range(rows)])

    def read(self, batch: Batch) -> None:
        return None

    def propose(self, batch: Batch) -> TokenTree:
        copies = [
            self._allowed(row, index.propose(row.tokens, min(self.limit, max(1, row.budget - 1))))
            for row, index in zip(batch.rows, batch.draft.indexes[batch.first :], strict=False)
        ]
        width = max(map(len, copies))
        tree = TokenTree(batch.roots, 1 + width)
        if width:
            # The words are on the host, so they cross together; -1 where a row has no more.
            words = to_device([copy + [-1] * (width - len(copy)) for copy in copies], batch.device)
            above = words.new_zeros(tree.batch, 1)
            for depth in range(width):
                word = words[:, depth : depth + 1]
                above = tree.add(above, word.clamp(min=0), torch.zeros_like(word, dtype=torch.float), word >= 0)
        return tree

    def _allowed(self, row: Row, copy: list[int]) -> list[int]:
        """A copy up to the first token that the row's constraint forbids."""
        if row.grammar is None:
            return copy
        row.grammar.update(row.new_tokens)
        return copy[: row.grammar.follows(copy)]

    def commit(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        return None
