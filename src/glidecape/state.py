"""What a decode carries from round to round, row by row, so that rows can be removed, reordered and added to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cache import KVCache
from .noise import Noise, gumbel
from .sampling import NOISE, SamplingParams, log_law, widen
from .stats import RoundStats
from .tree import TokenTree
from .verify import Chance, DenseLaw, Law, PointLaw, RandomChance

NOISE_AHEAD = 16  # positions past the root that noise is made for at once


@dataclass
class Row:
    """One sequence: its tokens so far (the last one is the root), and how it ended.

    Attributes:
        index: the row's number in the caller's list of prompts.
        finish: None while running, else "stop" (a stop token) or "length" (max_new_tokens).
    """

    index: int
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    stop_ids: frozenset[int]
    chance: Chance
    finish: str | None = None
    rounds: list[RoundStats] = field(default_factory=list)

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def budget(self) -> int:
        """Tokens it may still emit."""
        return self.params.max_new_tokens - len(self.new_tokens)


@dataclass
class Emitted:
    """What one row got from one round: tokens with their origins ("chain", "sibling", "bonus"), and the round's counts."""

    row: int
    tokens: list[int]
    origins: list[str]
    stats: RoundStats
    finish: str | None


@dataclass
class DecodeState:
    """Rows in flight, the target's cache, and the drafter's own state.

    Invariant: `cache.lengths[i] == len(rows[i].tokens) - 1`; the root is the token not in the cache.
    """

    rows: list[Row]
    cache: KVCache
    draft: Any = None
    noise: Noise = gumbel
    _noise_vocab: int = 0
    _noise_at: dict[int, dict[int, Tensor]] = field(default_factory=dict)  # row index -> position -> (vocab,)

    @property
    def roots(self) -> Tensor:
        """Root tokens, `(batch,)`."""
        return torch.tensor([row.tokens[-1] for row in self.rows], device=self.cache.keys[0].device)

    @property
    def root_positions(self) -> Tensor:
        """Absolute positions of the roots, `(batch,)`: the committed lengths."""
        return torch.tensor(self.cache.lengths, device=self.cache.keys[0].device)

    @property
    def budget(self) -> int:
        """Tokens that the row with the most left may still emit."""
        return max(row.budget for row in self.rows)

    def gumbel(self, positions: Tensor, vocab: int) -> Tensor:
        """Shared noise for the tokens *at* `positions (batch, nodes)`, past the roots; `(batch, nodes, vocab)`.

        One vector a row and position serves every node there, the draft's and the target's, in this round and the next.
        """
        if self._noise_vocab != vocab:
            self._noise_vocab, self._noise_at = vocab, {}
        vectors = []
        for row, root, wanted in zip(self.rows, self.cache.lengths, positions.tolist(), strict=True):
            made = self._noise_at.setdefault(row.index, {})
            if any(at not in made for at in wanted):
                # Ahead of need: the rounds to come want them too, and a call costs more than a vector.
                first = next((at for at in range(root + 1, max(wanted) + 1) if at not in made), min(wanted))
                span = torch.arange(first, max(*wanted, root + NOISE_AHEAD) + 1, device=positions.device)
                seed = torch.tensor([row.params.seed], device=positions.device)
                fresh = self.noise(seed, span[None], vocab)[0]
                made = {at: v for at, v in made.items() if at > root} | dict(zip(span.tolist(), fresh, strict=True))
                self._noise_at[row.index] = made
            vectors.append(torch.stack([made[at] for at in wanted]))
        return torch.stack(vectors) if len(vectors) > 1 else vectors[0][None]

    def laws(self, tree: TokenTree, logits: Tensor) -> list[Any]:
        """For each row a function from node to its `Law`, all sampling options applied."""
        greedy = noisy = None
        if any(row.params.greedy for row in self.rows):
            greedy = logits.argmax(-1).tolist()
        made: list[Any] = []
        for i, row in enumerate(self.rows):
            if row.params.greedy:
                assert greedy is not None
                made.append(_points(greedy[i]))
            elif row.params.sampling == NOISE:
                if noisy is None:
                    noisy = self.gumbel(tree.positions(self.root_positions) + 1, logits.shape[-1])
                scores = log_law(widen(logits[i]), row.params) + noisy[i]
                made.append(_points(scores.argmax(-1).tolist()))
            else:
                made.append(_dense(logits[i], row.params))
        return made

    def clip(self, row: Row, tree: TokenTree, path: list[int], bonus: int, i: int) -> tuple[list[int], list[int]]:
        """The path and tokens that row `i` may keep: nothing after a stop token or past max_new_tokens.

        Returns:
            The nodes to commit (the root and accepted nodes, but never the last emitted token, which becomes the root),
            and the tokens to emit.
        """
        tokens = [*tree.path_tokens(i, path[1:]), bonus]
        stop = next((k for k, token in enumerate(tokens) if token in row.stop_ids), None)
        if stop is not None and stop < row.budget:
            tokens, row.finish = tokens[: stop + 1], "stop"
        elif len(tokens) >= row.budget:
            tokens, row.finish = tokens[: row.budget], "length"
        return path[: len(tokens)], tokens

    def select(self, keep: list[int]) -> None:
        """Keep these rows, in this order."""
        self.rows = [self.rows[i] for i in keep]
        self.cache.select(keep)
        if self.draft is not None:
            self.draft.select(keep)


def _points(chosen: list[int]) -> Any:
    return lambda node: PointLaw(chosen[node])


def _dense(logits: Tensor, params: SamplingParams) -> Any:
    def at(node: int) -> Law:
        return DenseLaw(log_law(logits[node].double(), params).exp())

    return at


def new_row(index: int, prompt: list[int], params: SamplingParams, eos: tuple[int, ...]) -> Row:
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos))
    return Row(index, list(prompt), len(prompt), params, frozenset(stops), RandomChance(params.seed))
