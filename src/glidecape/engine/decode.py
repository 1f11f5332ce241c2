"""Decoding a list of prompts: `decode` yields what each round emitted, `Completions` collects it, `generate` does both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch

from ..batch.batch import Batch
from ..batch.row import Emitted, Row, new_row
from ..batch.text import text_of
from ..core.noise import Noise, gumbel
from ..core.params import SamplingParams
from ..core.stats import RoundStats, Stats
from ..drafting.drafter import Drafter, NoDraft
from ..errors import InputError
from ..target.target import Target
from .engine import Engine

BATCH = 16  # rows decoded together, at most, where the caller does not say


def new_rows(
    target: Target, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[Row]:
    """The rows of all prompts at their beginning. One `params` for all gives row i the seed + i: noise of its own.

    Raises:
        InputError: no prompt, another number of sampling parameters, or see `row.new_row`.
    """
    if not prompts:
        raise InputError("no prompt: give at least one")
    if isinstance(params, SamplingParams):
        params = [_with_seed(params, i) for i in range(len(prompts))]
    if len(params) != len(prompts):
        raise InputError(f"{len(prompts)} prompts but {len(params)} sampling parameters: give one, or one a prompt")
    return [new_row(i, list(p), own, target) for i, (p, own) in enumerate(zip(prompts, params, strict=True))]


def _with_seed(params: SamplingParams, i: int) -> SamplingParams:
    if params.greedy or i == 0:
        return params
    return replace(params, seed=(params.seed + i + 2**63) % 2**64 - 2**63)  # 64 bits, signed


def engine_of(
    target: Target,
    drafter: Drafter,
    rows: list[Row],
    slots: int,
    noise: Noise = gumbel,
    limit: int | None = None,
) -> Engine:
    """An engine with so many row slots, for which all these rows wait.

    Raises:
        InputError: there is not enough room for the cache.
    """
    tokens = max(len(row.tokens) + row.params.max_new_tokens for row in rows)
    new_tokens = max(row.params.max_new_tokens for row in rows)
    engine = Engine(target, drafter, slots, tokens, new_tokens, noise, limit)
    for row in rows:
        engine.submit(row)
    return engine


def start(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    noise: Noise = gumbel,
    limit_bytes: int | None = None,
) -> Batch:
    """Check the prompts, allocate the caches and read all prompts: the batch is ready for `run_round`.

    Raises:
        InputError: see `new_rows`; or there is not enough room for the cache.
    """
    rows = new_rows(target, prompts, params)
    engine = engine_of(target, drafter, rows, len(rows), noise, limit_bytes)
    for row in rows:
        engine.batch.admit(row)
    with torch.no_grad():
        while engine.read_prompts():
            pass
    return engine.batch


def decode(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    stats: Stats | None = None,
    noise: Noise = gumbel,
    limit_bytes: int | None = None,
    batch: int | None = None,
) -> Iterator[Emitted]:
    """Decode prompts together; yields what each row emitted, round by round, until all rows have ended.

    Args:
        batch: rows decoded together, at most; the next prompt takes the slot of a row that ended. None: all.
    """
    rows = new_rows(target, prompts, params or SamplingParams())
    engine = engine_of(target, drafter, rows, min(batch or len(rows), len(rows)), noise, limit_bytes)
    while not engine.idle:
        yield from engine.step(stats)


@dataclass(repr=False)
class Completion:
    """What one prompt became.

    Attributes:
        tokens: emitted ids, a stop token included. A stop string is left out; the token in which it begins stays if
            text before the stop string begins in it, too.
        text: their text, special tokens and a stop string left out; "" without a tokenizer.
        origins: of each token: "chain", "sibling" or "bonus".
        finish: "stop" or "length".
        rounds: counts of each round.

    >>> import glidecape
    >>> lm = glidecape.load("path/to/model", draft="path/to/draft")
    >>> completion = lm("def load_table(", max_tokens=6)
    >>> len(completion.tokens), completion.finish
    (6, 'length')
    """

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    origins: list[str] = field(default_factory=list)
    finish: str = "length"
    rounds: list[RoundStats] = field(default_factory=list)

    def __repr__(self) -> str:
        shown = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        return (
            f"Completion(text={shown!r}, tokens={len(self.tokens)}, rounds={len(self.rounds)}, finish={self.finish!r})"
        )


class Completions:
    """Collects the events of `decode` into a completion for each prompt.

    Args:
        tokenizer: of the target; None: completions have no text.
        prompts: token ids of each, by the rows' numbers.
    """

    def __init__(self, tokenizer: Any, prompts: Sequence[Sequence[int]]) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        self._done = [Completion() for _ in prompts]
        self._texts: dict[int, str] = {}

    def add(self, event: Emitted) -> None:
        """Take what a row emitted."""
        one = self._done[event.row]
        one.tokens += event.tokens
        one.origins += event.origins
        if event.stats.emitted:
            one.rounds.append(event.stats)
        one.finish = event.finish or one.finish
        if event.text is not None:
            kept = len(one.tokens) - event.cut
            one.tokens, one.origins = one.tokens[:kept], one.origins[:kept]
            self._texts[event.row] = event.text

    def finished(self) -> list[Completion]:
        """All completions, with their texts."""
        for i, one in enumerate(self._done):
            if self.tokenizer is not None:
                own = self._texts.get(i)
                one.text = text_of(self.tokenizer, one.tokens, self.prompts[i]) if own is None else own
        return self._done


def generate(
    target: Target,
    prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
    drafter: Drafter | None = None,
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    stats: Stats | None = None,
    batch: int = BATCH,
) -> list[Completion]:
    """Complete prompts, text or token ids; without a drafter by plain decoding.

    Args:
        prompts: one, or a list.
        params: for all prompts, of which prompt i then gets the seed + i; or one a prompt.
        batch: prompts decoded together, at most. Drafts help less the more rows share a forward (docs/choose.md).

    Raises:
        InputError: see `new_rows`; or the drafter is none.

    >>> from glidecape import SamplingParams, Target, generate
    >>> target = Target.from_pretrained("path/to/model")
    >>> [one.finish for one in generate(target, ["def load(", "def save("], params=SamplingParams(max_new_tokens=4))]
    ['length', 'length']
    """
    if drafter is not None and not hasattr(drafter, "propose"):
        raise InputError(f"a drafter is made by make_drafter(method, draft), and this is {drafter!r}")
    if batch < 1:
        raise InputError(f"at least 1 prompt is decoded at a time, not {batch}")
    one_prompt = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
    every = cast("Sequence[str | Sequence[int]]", [prompts] if one_prompt else prompts)
    ids = [target.encode(p) if isinstance(p, str) else list(p) for p in every]
    found = Completions(target.tokenizer, ids)
    for event in decode(target, drafter or NoDraft(), ids, params, stats, batch=batch):
        found.add(event)
    return found.finished()
