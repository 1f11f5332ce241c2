"""What a decode carries from round to round, row by row, so that rows can be removed, reordered and added to."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cache import KVCache
from .errors import InputError, UnsupportedError
from .noise import Noise, gumbel
from .penalties import History, adjust
from .sampling import NOISE, SamplingParams, log_law, widen
from .stats import RoundStats
from .text import Cut, StopStrings
from .tree import TokenTree
from .verify import Chance, DenseLaw, Law, PointLaw, RandomChance

NOISE_AHEAD = 16  # positions past the root that noise is made for at once


@dataclass
class Row:
    """One sequence: its tokens so far (the last one is the root), and how it ended.

    Attributes:
        index: the row's number in the caller's list of prompts.
        finish: None while running, else "stop" (a stop token or string) or "length" (max_new_tokens).
        stops: looks for stop strings; None without any.
        history: counts of its tokens, for penalties; made when first needed.
        cut: where a stop string ended the row.
    """

    index: int
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    stop_ids: frozenset[int]
    chance: Chance
    finish: str | None = None
    stops: StopStrings | None = None
    history: History | None = None
    cut: Cut | None = None

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def budget(self) -> int:
        """Tokens it may still emit."""
        return self.params.max_new_tokens - len(self.new_tokens)

    @property
    def adjusts_logits(self) -> bool:
        """Is there anything to do to the logits before temperature?"""
        early = len(self.tokens) - self.prompt_length < self.params.min_new_tokens
        options = self.params
        return early or options.counts_tokens or bool(options.logit_bias) or options.processor is not None


@dataclass
class Emitted:
    """What one row got from one round: tokens with their origins ("chain", "sibling", "bonus"), and the round's counts.

    Where a stop string ended the row, `text` is the row's whole text, cut before it, and `cut` the number of tokens at the
    row's end, emitted in this round or earlier ones, that belong to the stop string and are not to be handed out.
    """

    row: int
    tokens: list[int]
    origins: list[str]
    stats: RoundStats
    finish: str | None
    text: str | None = None
    cut: int = 0


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

    def adjusted(self, tree: TokenTree, logits: Tensor, nodes: Tensor | None = None) -> Tensor:
        """Logits after bias, penalties, min_new_tokens and processor, each node with its own path; `(batch, count, vocab)`.

        `nodes (batch, count)` are the tree nodes that the logits are of, padding (-1) anything; None: all of the tree,
        without the processors, which `laws` asks about the nodes that it reaches.
        """
        changed = [i for i, row in enumerate(self.rows) if row.adjusts_logits]
        if not changed:
            return logits
        logits = widen(logits).clone()
        for i in changed:
            row = self.rows[i]
            if row.params.counts_tokens:
                row.history = row.history or History(logits.shape[-1], logits.device)
                row.history.update(row.tokens, row.prompt_length)
            at = slice(None) if nodes is None else nodes[i].clamp(min=0)
            above = tree.ancestors[i, at].clone()
            above[:, 0] = False  # the root is one of the row's tokens
            emitted = len(row.new_tokens) + tree.depth[i, at]
            logits[i] = adjust(logits[i], row.params, row.history, tree.tokens[i], above, emitted, row.stop_ids)
            if nodes is not None and row.params.processor is not None:
                for k, node in enumerate(nodes[i].tolist()):
                    if node >= 0:
                        logits[i, k] = self._processed(i, tree, node, logits[i, k])
        return logits

    def _processed(self, i: int, tree: TokenTree, node: int, logits: Tensor) -> Tensor:
        """What the processor of row `i` makes of a node's logits, `(vocab,)`."""
        row = self.rows[i]
        assert row.params.processor is not None
        above = tree.ancestors[i, node].clone()
        above[0] = False
        known = torch.tensor(row.tokens, device=logits.device)
        # Nodes are numbered from the root down.
        return row.params.processor(torch.cat([known, tree.tokens[i, above]]), logits)

    def laws(self, tree: TokenTree, logits: Tensor) -> list[Any]:
        """For each row a function from node to its `Law`, all sampling options applied.

        Raises:
            UnsupportedError: a law holds values that are not numbers (when it is asked for).
        """
        logits = self.adjusted(tree, logits)
        best = noisy = None
        if any(row.params.greedy for row in self.rows):
            best = logits.max(-1)
        if any(not row.params.greedy and row.params.sampling == NOISE for row in self.rows):
            noisy = self.gumbel(tree.positions(self.root_positions) + 1, logits.shape[-1])
        made: list[Any] = []
        for i, row in enumerate(self.rows):
            noise = None if noisy is None else noisy[i]
            if row.params.processor is not None:
                made.append(self._one_by_one(i, tree, logits[i], noise))
            elif row.params.greedy:
                assert best is not None
                made.append(_points(best.indices[i], best.values[i]))
            elif row.params.sampling == NOISE:
                assert noise is not None
                top = (log_law(widen(logits[i]), row.params) + noise).max(-1)
                made.append(_points(top.indices, top.values))
            else:
                made.append(_dense(logits[i], row.params))
        return made

    def _one_by_one(self, i: int, tree: TokenTree, logits: Tensor, noise: Tensor | None) -> Any:
        """The laws of a row with a processor, made for a node when it is asked for."""
        params = self.rows[i].params

        def at(node: int) -> Law:
            own = self._processed(i, tree, node, widen(logits[node]))[None]
            if not params.greedy and params.sampling != NOISE:
                return _dense(own, params)(0)
            scores = own
            if not params.greedy:
                assert noise is not None
                scores = log_law(own, params) + noise[node]
            top = scores.max(-1)
            return _points(top.indices, top.values)(0)

        return at

    def clip(self, row: Row, tree: TokenTree, path: list[int], bonus: int, i: int) -> tuple[list[int], list[int]]:
        """The path and tokens that row `i` may keep: nothing after a stop token or string, or past max_new_tokens.

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
        if row.params.ends is not None and (count := self._ended(row, tokens)):
            tokens, row.finish = tokens[:count], "stop"
        if row.stops is not None:
            known = row.new_tokens
            row.cut = row.stops.find([*known, *tokens], len(known))
            if row.cut is not None:
                tokens, row.finish = tokens[: row.cut.tokens - len(known)], "stop"
        return path[: len(tokens)], tokens

    def _ended(self, row: Row, tokens: list[int]) -> int:
        """How many of the tokens a row emits until its `ends` says so; 0 if it does not."""
        assert row.params.ends is not None
        ids = torch.tensor([*row.tokens, *tokens], device=self.cache.keys[0].device)
        emitted = len(row.new_tokens)
        for count in range(max(1, row.params.min_new_tokens - emitted), len(tokens) + 1):
            if row.params.ends(ids[: len(row.tokens) + count]):
                return count
        return 0

    def select(self, keep: list[int]) -> None:
        """Keep these rows, in this order."""
        self.rows = [self.rows[i] for i in keep]
        self.cache.select(keep)
        if self.draft is not None:
            self.draft.select(keep)


def _points(chosen: Tensor, scores: Tensor) -> Any:
    """Laws with all mass on `chosen (nodes,)`, whose scores `(nodes,)` are the largest there."""
    tokens, numbers = chosen.tolist(), (~scores.isnan()).tolist()  # the largest score is NaN if any is

    def at(node: int) -> Law:
        return PointLaw(tokens[node]) if numbers[node] else _no_law()

    return at


def _dense(logits: Tensor, params: SamplingParams) -> Any:
    def at(node: int) -> Law:
        p = log_law(logits[node].double(), params).exp()
        return DenseLaw(p) if math.isfinite(float(p.sum())) else _no_law()

    return at


def _no_law() -> Law:
    raise UnsupportedError(
        "the target gave logits that are not numbers: its weights are damaged, or the dtype is too narrow for them "
        "(try float32)"
    )


def new_row(index: int, prompt: list[int], params: SamplingParams, target: Any) -> Row:
    """A row at its beginning.

    Raises:
        InputError: an option names a token outside the vocabulary, stop strings without a tokenizer, or
            min_new_tokens where every token ends the row.
    """
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(target.eos_token_ids))
    vocab = target.vocab_size
    if bad := [token for token in dict(params.logit_bias) if token >= vocab]:
        raise InputError(f"logit_bias names token id {bad[0]}, outside the vocabulary of {vocab}")
    if bad := [token for token in params.stop_token_ids if not 0 <= token < vocab]:
        raise InputError(f"stop_token_ids names token id {bad[0]}, outside the vocabulary of {vocab}")
    strings = params.stop
    if strings and target.tokenizer is None:
        raise InputError("stop strings need a tokenizer, and this target has none: stop at token ids instead")
    if strings:
        # A special token is left out of the text, so it is found by its id.
        names: list[str] = target.tokenizer.all_special_tokens
        special = dict(zip(names, target.tokenizer.all_special_ids, strict=True))
        stops |= {special[text] for text in strings if text in special}
        strings = tuple(text for text in strings if text not in special)
    if params.min_new_tokens and stops >= set(range(vocab)):
        raise InputError("min_new_tokens cannot be kept: every token of the vocabulary ends the row")
    row = Row(index, list(prompt), len(prompt), params, frozenset(stops), RandomChance(params.seed))
    if strings:
        row.stops = StopStrings(target.tokenizer, strings, params.min_new_tokens, prompt)
    return row
