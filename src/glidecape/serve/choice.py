"""`Choice`: what a client sees of one answer, made of the engine's updates: text, log-probabilities, how it ended."""

from __future__ import annotations

from itertools import accumulate
from typing import Any
from weakref import WeakKeyDictionary

from ..batch.row import Emitted, TokenLogprobs
from ..batch.text import HALF, TextStream
from .job import Job
from .replies import (
    ChatLogprobs,
    CompletionDetails,
    CompletionLogprobs,
    FinishReason,
    PromptDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)

Entry = tuple[int, TokenLogprobs]
NEVER = -9999.0  # OpenAI's number for a token that cannot come: JSON has no infinity
_NAMES: WeakKeyDictionary[Any, dict[int, str]] = WeakKeyDictionary()  # texts of tokens, by tokenizer


class Choice:
    """One answer as it grows. Log-probabilities are held back with the text that their tokens belong to.

    Attributes:
        text: shown so far.
        finish: how it ended; None while it has not.
    """

    def __init__(self, job: Job, tokenizer: Any, wants_ids: bool = False) -> None:
        params = job.row.params
        self.wants_ids, self.untold, self.prompt_told = wants_ids, list[int](), False
        self.job, self.tokenizer, self.text = job, tokenizer, ""
        self.finish: FinishReason | None = None
        self.stream = TextStream(tokenizer, params.stop, job.prompt)
        self.pending: list[Entry] = []
        self.wants_logprobs = params.logprobs is not None

    def push(self, event: Emitted) -> tuple[str, list[Entry]]:
        """The text and the entries that may be shown after an update."""
        ended = event.finish is not None
        if ended:
            self.finish = "length" if event.finish == "length" else "stop"
        new = self.stream.push(event.tokens, ended, event.text)
        self.text += new
        self.untold += event.tokens if self.wants_ids else ()
        self.pending += zip(event.tokens, event.logprobs, strict=False)
        if not (ended or self.stream.settled):
            return new, []
        entries, self.pending = self.pending[: len(self.pending) - event.cut], []
        return new, entries

    def told_ids(self) -> list[int] | None:
        """The tokens that came since this was last asked; None where nobody wants them."""
        if not self.wants_ids:
            return None
        told, self.untold = self.untold, []
        return told

    def told_prompt(self) -> list[int] | None:
        """The prompt's tokens, at the first time; None after it, or where nobody wants them."""
        if not self.wants_ids or self.prompt_told:
            return None
        self.prompt_told = True
        return self.job.prompt

    def named(self, token: int) -> str:
        """The text of a token alone."""
        known = _NAMES.setdefault(self.tokenizer, {})
        if token not in known:
            known[token] = self.tokenizer.decode([token])
        return known[token]

    def chat_logprobs(self, entries: list[Entry]) -> ChatLogprobs | None:
        """As chat answers have them; None where nobody asked."""

        def one(token: int, logprob: float) -> dict[str, Any]:
            text = self.named(token)
            return {
                "token": text,
                "logprob": max(logprob, NEVER),
                "bytes": None if HALF in text else list(text.encode()),
            }

        if not self.wants_logprobs:
            return None
        return ChatLogprobs(
            content=[
                TokenLogprob(**one(token, of.logprob), top_logprobs=[TopLogprob(**one(*top)) for top in of.top])
                for token, of in entries
            ]
        )

    def completion_logprobs(self, entries: list[Entry], offset: int) -> CompletionLogprobs | None:
        """As the older interface has them; `offset`: characters of the answer before the first entry."""
        if not self.wants_logprobs:
            return None
        tokens = [self.named(token) for token, _ in entries]
        return CompletionLogprobs(
            tokens=tokens,
            token_logprobs=[max(of.logprob, NEVER) for _, of in entries],
            top_logprobs=[{self.named(token): max(value, NEVER) for token, value in of.top} for _, of in entries],
            text_offset=list(accumulate(map(len, tokens), initial=offset))[: len(tokens)],
        )


def usage_of(jobs: list[Job], prompts: int = 1) -> Usage:
    """Counts of a request's answers; its prompts, the first of each group of `n` answers, are counted once."""
    each = len(jobs) // prompts
    prompt = sum(job.row.prompt_length for job in jobs[::each])
    cached = sum(job.row.reused for job in jobs[::each])
    answer, accepted = sum(job.row.emitted for job in jobs), sum(job.accepted for job in jobs)
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=answer,
        total_tokens=prompt + answer,
        prompt_tokens_details=PromptDetails(cached_tokens=cached),
        completion_tokens_details=CompletionDetails(
            accepted_prediction_tokens=accepted,
            rejected_prediction_tokens=sum(job.drafted for job in jobs) - accepted,
        ),
    )
