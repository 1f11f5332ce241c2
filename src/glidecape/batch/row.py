"""A row: one sequence that is being decoded, all on the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..core.params import SamplingParams
from ..core.penalties import History
from ..core.stats import RoundStats
from ..core.verify import Chance, RandomChance
from ..errors import InputError
from .grammar import Grammar, new_grammar
from .text import Cut, StopStrings

if TYPE_CHECKING:
    from ..target.target import Target


@dataclass
class Row:
    """One sequence: its tokens so far (the last one is the root), and how it ended.

    Attributes:
        index: the row's number in the caller's list of prompts.
        finish: None while running, else "stop" (a stop token or string, or a complete constraint), "length" (max_new_tokens),
            "abort" (the caller wants no more) or "error".
        device: of the target; `SamplingParams.ends` gets its tokens there.
        stops: looks for stop strings; None without any.
        history: counts of its tokens, for penalties; made when first needed.
        cut: where a stop string ended the row.
        grammar: its state under the constraint; None without one.
        drafts: False for a row that is to be decoded plainly, by an engine that looks at it (`SteadyEngine`).
        salt: the row takes prefixes from rows with the same one, and leaves its own to them; None: from and to nobody.
        reused: tokens that it took.
        watched: somebody wants to see what is proposed (`Emitted.proposal`), which costs a transfer a round.
    """

    index: int
    tokens: list[int]
    prompt_length: int
    params: SamplingParams
    stop_ids: frozenset[int]
    chance: Chance
    device: torch.device
    finish: str | None = None
    stops: StopStrings | None = None
    history: History | None = None
    cut: Cut | None = None
    grammar: Grammar | None = None
    drafts: bool = True
    salt: str | None = None
    reused: int = 0
    watched: bool = False

    def rewind(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens, and how the row ended."""
        del self.tokens[tokens:]
        self.finish = self.cut = self.history = None
        if self.grammar is not None:
            self.grammar.restart()

    @property
    def new_tokens(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def emitted(self) -> int:
        """Tokens emitted so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def budget(self) -> int:
        """Tokens it may still emit."""
        return self.params.max_new_tokens - self.emitted

    @property
    def adjusts_logits(self) -> bool:
        """Is there anything to do to the logits before temperature?"""
        options = self.params
        early = self.emitted < options.min_new_tokens
        return early or options.counts_tokens or bool(options.logit_bias) or options.processor is not None

    def clip(self, tokens: list[int]) -> list[int]:
        """Of the tokens that a round offers, those to emit: nothing after a stop token or string, after a text that is
        complete under the constraint, or past max_new_tokens."""
        stop = next((k for k, token in enumerate(tokens) if token in self.stop_ids), None)
        if stop is not None and stop < self.budget:
            tokens, self.finish = tokens[: stop + 1], "stop"
        elif len(tokens) >= self.budget:
            tokens, self.finish = tokens[: self.budget], "length"
        if self.params.ends is not None and (count := self._ended(tokens)):
            tokens, self.finish = tokens[:count], "stop"
        if self.grammar is not None and (count := self.grammar.complete(tokens)):
            tokens, self.finish = tokens[:count], "stop"
        if self.stops is not None:
            known = self.new_tokens
            self.cut = self.stops.find([*known, *tokens], len(known))
            if self.cut is not None:
                tokens, self.finish = tokens[: self.cut.tokens - len(known)], "stop"
        return tokens

    def _ended(self, tokens: list[int]) -> int:
        """How many of the tokens the row emits until its `ends` says so; 0 if it does not."""
        assert self.params.ends is not None
        ids = torch.tensor([*self.tokens, *tokens], device=self.device)
        for count in range(max(1, self.params.min_new_tokens - self.emitted), len(tokens) + 1):
            if self.params.ends(ids[: len(self.tokens) + count]):
                return count
        return 0


@dataclass
class Outcome:
    """What verify made of one row's tree, on the host.

    Attributes:
        path: accepted nodes, the root first; after clipping only those to commit.
        tokens: accepted tokens and the bonus token; after clipping those to emit.
        origins: of each accepted token: "chain" if it is its parent's first child, else "sibling".
        drafted, depth: nodes sent to verify without the root, and their deepest depth.
        rejected: did the last node of the path have children?
        grown: numbers of the path's nodes before the tree was packed or pruned.
        memo: the row of `TokenTree.memo`.
    """

    path: list[int]
    tokens: list[int]
    origins: list[str]
    drafted: int
    depth: int
    rejected: bool
    grown: list[int]
    memo: list[int]


@dataclass
class Proposal:
    """What one row's round proposed and accepted, to be shown.

    Attributes:
        tokens: of the nodes, the root first.
        parents: the place of each node's parent in these lists; -1 for the root's.
        probabilities: the draft's, of each token given its path, at temperature 1.
        path: places of the accepted nodes, the root first, before `Row.clip`.
    """

    tokens: list[int]
    parents: list[int]
    probabilities: list[float]
    path: list[int]


@dataclass(frozen=True)
class TokenLogprobs:
    """Of one emitted token: its log-probability, and the most probable tokens there with theirs."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass
class Emitted:
    """What one row got from one round: tokens with their origins ("chain", "sibling", "bonus"), and the round's counts.

    Where a stop string ended the row, `text` is the row's whole text, cut before it, and `cut` the number of tokens at the
    row's end, emitted in this round or earlier ones, that belong to the stop string and are not to be handed out.
    `logprobs` are there where `SamplingParams.logprobs` asks for them, one a token (`engine.logprobs`), `proposal` where the
    row is watched.
    """

    row: int
    tokens: list[int]
    origins: list[str]
    stats: RoundStats
    finish: str | None
    text: str | None = None
    cut: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    proposal: Proposal | None = None


def new_row(index: int, prompt: list[int], params: SamplingParams, target: Target) -> Row:
    """A row at its beginning.

    Raises:
        InputError: the prompt is empty, holds a token outside the vocabulary or is longer than the target's context; an
            option names a token outside the vocabulary; stop strings without a tokenizer; min_new_tokens where every
            token ends the row; or see `grammar.new_grammar`.
        UnsupportedError: see `grammar.new_grammar`.
    """
    _check_prompt(index, prompt, params, target)
    stops = set(params.stop_token_ids) | (set() if params.ignore_eos else set(target.eos_token_ids))
    vocab = target.vocab_size
    for name, tokens in (("logit_bias", dict(params.logit_bias)), ("stop_token_ids", params.stop_token_ids)):
        if bad := [token for token in tokens if not 0 <= token < vocab]:
            raise InputError(f"{name} names token id {bad[0]}, outside the vocabulary of {vocab}")
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
    chance, device = RandomChance(params.seed), target.device
    row = Row(index, list(prompt), len(prompt), params, frozenset(stops), chance, device)
    row.grammar = new_grammar(params, stops, target)
    if strings:
        row.stops = StopStrings(target.tokenizer, strings, params.min_new_tokens, prompt)
    return row


def _check_prompt(index: int, prompt: list[int], params: SamplingParams, target: Target) -> None:
    if not prompt:
        raise InputError(f"prompt {index} is empty: give at least one token to continue")
    if bad := [t for t in prompt if not 0 <= t < target.vocab_size]:
        raise InputError(f"prompt {index} holds token id {bad[0]}, outside the vocabulary of {target.vocab_size}")
    room = target.context - len(prompt)
    if room <= 0:
        raise InputError(
            f"prompt {index} has {len(prompt)} tokens and fills the target's context of {target.context}: shorten the prompt"
        )
    if params.max_new_tokens > room:
        raise InputError(
            f"prompt {index} has {len(prompt)} tokens; with max_new_tokens {params.max_new_tokens} that is more than the "
            f"target's context of {target.context}: shorten the prompt, or emit {room} tokens at most"
        )
