"""`Stream`: token ids of documents one after the other; `Windows`: what a training sees of them, batch after batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..errors import DataError

PIECE = 2**24  # tokens that are in memory at once


def first_held_out(count: int) -> int:
    """Of a text of so many tokens the last 2 % are held out, or 512 tokens, where that is no more than half."""
    return count - min(max(512, count // 50), count // 2)


def places_of(tokens: np.ndarray, wanted: Sequence[int]) -> np.ndarray:
    """Where these tokens stand in a stream, ascending, int64; a piece of it is in memory at a time.

    >>> places_of(np.array([0, 5, 7, 0, 9]), [0, 7])
    array([0, 2, 3])
    """
    pieces = range(0, len(tokens), PIECE)
    found = [np.flatnonzero(np.isin(tokens[first : first + PIECE], wanted)) + first for first in pieces]
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class Stream:
    """Token ids one document after the other. The arrays may be mapped from files, and larger than memory.

    Attributes:
        tokens: `(tokens,)`.
        learned: which of them are to be learned, bool, same length; None: all.
        documents: where each document begins, with the end-of-text token, ascending, int64; None: there is no such token.
        begin: where `tokens` begin among `documents`.
        known: the digest, where it is known already.
    """

    tokens: np.ndarray
    learned: np.ndarray | None = None
    documents: np.ndarray | None = None
    begin: int = 0
    known: str = ""

    def split(self) -> dict[str, Stream]:
        """ "train" and "valid", which is held out; `known` is the first one's."""
        cut = first_held_out(len(self.tokens))
        valid = replace(self[cut:], known="", begin=self.begin + cut)
        return {"train": self[:cut], "valid": valid}

    def __getitem__(self, part: slice) -> Stream:
        return replace(self, tokens=self.tokens[part], learned=None if self.learned is None else self.learned[part])

    @property
    def digest(self) -> str:
        """What tells streams apart: a short sha256 of its tokens and of which are learned."""
        if self.known:
            return self.known
        found = hashlib.sha256()
        for values in (self.tokens, self.learned):
            for first in range(0, 0 if values is None else len(values), PIECE):
                assert values is not None
                found.update(values[first : first + PIECE].tobytes())
        return found.hexdigest()[:16]


class Windows:
    """Non-overlapping windows of a token stream, visited in a seeded order, epoch after epoch.

    `batch(step, rows, length)` depends on its arguments and the seed alone: resuming needs no iterator state. Windows
    in which nothing is to be learned are passed over. Memory: 16 bytes a window, wherever the stream lies.

    Args:
        apart: are the documents of a window to be kept apart (`batch_begins`)?

    Raises:
        DataError: they are, and nothing marks where they begin.
    """

    def __init__(self, text: Stream, seed: int = 0, apart: bool = False) -> None:
        if apart and text.documents is None:
            raise DataError(
                "the tokenizer has no end-of-text token to stand between documents: leave --documents joined"
            )
        self.text, self.seed, self.apart = text, seed, apart
        self._usable: dict[int, np.ndarray] = {}

    def batch(self, step: int, rows: int, length: int) -> torch.Tensor:
        """Token ids `(rows, length)`, int64."""
        return self._cut(self.text.tokens, np.int64, step, rows, length)

    def batch_learned(self, step: int, rows: int, length: int) -> torch.Tensor | None:
        """Which tokens of that batch are to be learned, `(rows, length)` bool; None: all."""
        return None if self.text.learned is None else self._cut(self.text.learned, np.bool_, step, rows, length)

    def batch_begins(self, step: int, rows: int, length: int) -> torch.Tensor | None:
        """Where in its window the document of each token of that batch begins, `(rows, length)` int64; None: they are not kept
        apart. What is left of a document that began in an earlier window begins at 0."""
        if not self.apart or self.text.documents is None:
            return None
        found = np.zeros((rows, length), dtype=np.int64)
        for row, first in zip(found, self._places(step, rows, length), strict=True):
            at = self.text.begin + first
            some = slice(*np.searchsorted(self.text.documents, [at, at + length]))
            inside = self.text.documents[some] - at
            row[inside] = inside
        return torch.from_numpy(np.maximum.accumulate(found, axis=1))

    def marked_batch(
        self, step: int, rows: int, length: int, place: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`batch`, `batch_learned` and `batch_begins`; `place` brings each tensor to where it is needed."""
        wanted = (step, rows, length)
        learned, begins = self.batch_learned(*wanted), self.batch_begins(*wanted)
        return (
            place(self.batch(*wanted)),
            None if learned is None else place(learned),
            None if begins is None else place(begins),
        )

    def _cut(self, values: np.ndarray, dtype: Any, step: int, rows: int, length: int) -> torch.Tensor:
        picked = [values[at : at + length].astype(dtype) for at in self._places(step, rows, length)]
        return torch.from_numpy(np.stack(picked))

    def _places(self, step: int, rows: int, length: int) -> list[int]:
        """Where in the stream the windows of a batch begin."""
        numbers, places = self.usable(length), []
        for i in range(step * rows, (step + 1) * rows):
            epoch, at = divmod(i, len(numbers))
            places.append(int(numbers[self._order(epoch, len(numbers))[at]]) * length)
        return places

    def usable(self, length: int) -> np.ndarray:
        """Windows of that length that can be used, by their number in the stream.

        Raises:
            DataError: there is none.
        """
        if length not in self._usable:
            tokens, learned = self.text.tokens, self.text.learned
            count = len(tokens) // length
            if count < 1:
                raise DataError(f"the data holds {len(tokens)} tokens, fewer than one window of {length}: add text")
            numbers = np.arange(count)
            if learned is not None:  # a window's first token has nothing before it to be predicted from
                numbers = numbers[learned[: count * length].reshape(count, length)[:, 1:].any(1)]
            if not len(numbers):
                raise DataError(f"no window of {length} tokens holds a token of a completion: add text")
            self._usable[length] = numbers
        return self._usable[length]

    def _order(self, epoch: int, count: int) -> np.ndarray:
        cached: tuple[tuple[int, int], np.ndarray] | None = getattr(self, "_cached", None)
        if cached is None or cached[0] != (epoch, count):
            self._cached = cached = ((epoch, count), np.random.default_rng([self.seed, epoch]).permutation(count))
        return cached[1]
