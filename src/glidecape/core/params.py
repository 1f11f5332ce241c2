"""`SamplingParams`: what the user asks of the output's law, and when a row ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import InputError
from ..options import option, tokens_from
from .constraint import Constraint

if TYPE_CHECKING:
    from torch import Tensor

NOISE, RESIDUAL = "noise", "residual"
MOST_BIAS = 100  # as in OpenAI's API: enough to force or to forbid a token, and no float overflows


class Processor(Protocol):
    """What the user makes of a node's logits. It must depend on its arguments alone: it is asked about the nodes of a tree in
    any order, and about proposals that are never emitted."""

    def __call__(self, tokens: Tensor, logits: Tensor, /) -> Tensor:
        """The logits to use, `(vocab,)`.

        Args:
            tokens: of the row and of the node's path, `(length,)`.
            logits: of the node, `(vocab,)` float, after bias and penalties.
        """


class Ends(Protocol):
    """Where the user ends a row."""

    def __call__(self, tokens: Tensor, /) -> bool:
        """Does the row end here? Asked after each emitted token from `min_new_tokens` on, with its tokens `(length,)`."""


def _bias_from(typed: list[str] | None) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(token), float(value)) for token, _, value in (item.partition("=") for item in typed or []))
    except ValueError:
        raise InputError(f"--logit-bias takes ID=NUMBER, such as 42=-5, not '{' '.join(typed or [])}'") from None


@dataclass(frozen=True)
class SamplingParams:
    """How one row is sampled and when it ends. All options act on the target's law, before verify.

    Attributes:
        temperature: 0 means greedy.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose mass reaches top_p; 1 keeps all.
        seed: of this row's noise; rows with one seed see the same noise, so give each row its own.
        max_new_tokens: tokens to emit at most, 1 or more.
        stop_token_ids: end the row when one is emitted (the token is kept). The model's own end-of-text tokens are
            added by `generate` unless `ignore_eos`.
        sampling: "noise" (shared Gumbel noise: the same seed gives the same text with every method) or "residual"
            (the papers' rule). At temperature 0 both are greedy.
        min_p: keep tokens whose probability is at least min_p times the largest one; 0 keeps all.
        repetition_penalty: logits of tokens of the prompt or the output are divided by it where positive, else
            multiplied; 1 is off. As in transformers.
        presence_penalty, frequency_penalty: taken off the logit of a token that was emitted: once, and once for each
            occurrence; the prompt does not count; 0 is off. As in the OpenAI and vLLM interfaces.
        logit_bias: {token id: number from -100 to 100, added to its logit}; stored as sorted pairs.
        stop: one string or several that end the row; stored as a tuple. The text ends before them, and so do the ids where a
            token boundary allows.
        min_new_tokens: before so many tokens nothing may end the row: stop tokens have probability 0, and stop strings
            are not looked for.
        logprobs: tell each emitted token's log-probability under the target's own law, before all these options, and those of
            so many most probable tokens; None: don't.
        processor: changes a node's logits, see `Processor`.
        ends: ends the row after a token, see `Ends`.
        constraint: what the text must be. The tokens that it forbids have probability 0 before anything else is done, top-k
            and top-p included, for the target and for the draft. The row ends when nothing may follow ("stop"), and an
            end-of-text token may come where the text may end. max_new_tokens, a stop string, a stop token that is text, or
            `ends` may end it before: the text is then the beginning of an allowed one.

    Raises:
        InputError: a value out of range, or a constraint beside min_new_tokens or a processor.

    >>> SamplingParams(temperature=0.8, top_p=0.95, seed=7).greedy
    False
    """

    temperature: float = option(0.0, "Sampling temperature; 0: greedy.")
    top_k: int = option(0, "Sample from this many of the most probable tokens; 0: all.")
    top_p: float = option(1.0, "Sample from the fewest tokens that together have this probability; 1: all.")
    seed: int = option(0, "Random seed; prompt i uses seed + i.")
    max_new_tokens: int = option(128, "Most tokens to emit.")
    stop_token_ids: tuple[int, ...] = option(
        (),
        "Token id that ends a row; repeat for several.",
        flag="stop-token",
        type=list[int] | None,
        read=tokens_from,
        write=list,
    )
    ignore_eos: bool = option(False, "Continue after end-of-text.")
    sampling: str = option(NOISE, "noise: same seed, same text with any method. residual: the papers' rule.")
    min_p: float = option(0.0, "Keep tokens that have at least this share of the largest probability; 0: all.")
    repetition_penalty: float = option(1.0, "Penalty on tokens that the prompt or the output contains; 1: off.")
    presence_penalty: float = option(0.0, "Penalty on tokens that the output contains; 0: off.")
    frequency_penalty: float = option(0.0, "Penalty on a token for each time the output contains it; 0: off.")
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = option(
        (),
        "ID=NUMBER, from -100 to 100, added to a token's logit; repeat for several.",
        type=list[str] | None,
        read=_bias_from,
        write=list,
    )
    stop: tuple[str, ...] = option(
        (),
        "Text that ends a row and is left out of it; repeat for several.",
        type=list[str] | None,
        read=tokens_from,
        write=list,
    )
    min_new_tokens: int = option(0, "No row ends before it has this many tokens.")
    logprobs: int | None = None
    processor: Processor | None = None
    ends: Ends | None = None
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        # Logits divided by less would overflow float32.
        if self.temperature != 0 and not 1e-5 <= self.temperature < float("inf"):
            raise InputError(f"temperature must be 0 (greedy) or at least 0.00001, not {self.temperature}")
        if self.top_k < 0:
            raise InputError(f"top_k must be 0 (off) or positive, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p must be in (0, 1], not {self.top_p}")
        if not -(2**63) <= self.seed < 2**63:
            raise InputError(f"seed must fit in 64 bits (signed), but is {self.seed}")
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if self.sampling not in (NOISE, RESIDUAL):
            raise InputError(f"sampling must be '{NOISE}' or '{RESIDUAL}', not '{self.sampling}'")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p must be in [0, 1], not {self.min_p}")
        if not 0 < self.repetition_penalty < float("inf"):
            raise InputError(f"repetition_penalty must be positive (1 is off), not {self.repetition_penalty}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise InputError(f"{name} must be a number (0 is off), not {getattr(self, name)}")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise InputError(
                f"min_new_tokens must be from 0 to max_new_tokens {self.max_new_tokens}, not {self.min_new_tokens}"
            )
        if self.constraint is not None and (self.min_new_tokens or self.processor is not None):
            other = "min_new_tokens" if self.min_new_tokens else "processor"
            raise InputError(
                f"a constraint decides which tokens may come, and {other} might leave none: use one of the two"
            )
        if self.logprobs is not None and self.logprobs < 0:
            raise InputError(f"logprobs must not be negative, but is {self.logprobs}")
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop takes strings of at least one character, not {list(self.stop)}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """Does it leave out improbable tokens?"""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def counts_tokens(self) -> bool:
        """Does the law depend on which tokens came before?"""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _bias_pairs(bias: Mapping[int, float] | tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
    pairs = tuple(bias.items() if isinstance(bias, Mapping) else bias)
    for token, value in pairs:
        numbers = isinstance(token, int) and isinstance(value, (int, float))
        if not numbers or token < 0 or not math.isfinite(value):
            raise InputError(f"logit_bias takes token ids and finite numbers, not {token!r}: {value!r}")
        if abs(value) > MOST_BIAS:
            raise InputError(f"logit_bias takes numbers from -{MOST_BIAS} to {MOST_BIAS}, not {token}: {value:g}")
    if len(dict(pairs)) < len(pairs):
        raise InputError(f"logit_bias names a token id twice: {[token for token, _ in pairs]}")
    return tuple(sorted(pairs))
