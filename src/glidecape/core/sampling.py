"""What the user asks of the output's law, and the law itself: logits in, processed log-probabilities out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

NOISE, RESIDUAL = "noise", "residual"


@dataclass(frozen=True)
class SamplingParams:
    """How one row is sampled and when it ends. All options act on the target's law, before verify.

    Attributes:
        temperature: 0 means greedy.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of most probable tokens whose mass reaches top_p; 1 keeps all.
        seed: of this row's noise; rows with one seed see the same noise, so give each row its own.
        max_new_tokens: tokens to emit at most.
        stop_token_ids: end the row when one is emitted (the token is kept). The model's own end-of-text tokens are
            added by `generate` unless `ignore_eos`.
        sampling: "noise" (shared Gumbel noise: the same seed gives the same text with every method) or "residual"
            (the papers' rule). At temperature 0 both are greedy.
        min_p: keep tokens whose probability is at least min_p times the largest one; 0 keeps all.
        repetition_penalty: logits of tokens of the prompt or the output are divided by it where positive, else
            multiplied; 1 is off. As in transformers.
        presence_penalty, frequency_penalty: taken off the logit of a token that was emitted: once, and once for each
            occurrence; the prompt does not count; 0 is off. As in the OpenAI and vLLM interfaces.
        logit_bias: {token id: number added to its logit}; stored as sorted pairs.
        stop: one string or several that end the row; stored as a tuple. The text ends before them, and so do the ids where a
            token boundary allows.
        min_new_tokens: before so many tokens nothing may end the row: stop tokens have probability 0, and stop strings
            are not looked for.
        processor: called with the tokens of the row and of a node's path, `(length,)`, and that node's logits, `(vocab,)`
            float, after bias and penalties; returns the logits to use. It must depend on its arguments alone: it is asked
            about the nodes of a tree in any order, and about proposals that are never emitted.
        ends: called with the tokens of the row, `(length,)`, after each emitted one from `min_new_tokens` on; True ends the
            row there.

    Raises:
        InputError: a value out of range.

    >>> SamplingParams(temperature=0.8, top_p=0.95, seed=7).greedy
    False
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    sampling: str = NOISE
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    processor: Callable[[Tensor, Tensor], Tensor] | None = None
    ends: Callable[[Tensor], bool] | None = None

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
        if self.max_new_tokens < 0:
            raise InputError(f"max_new_tokens must not be negative, but is {self.max_new_tokens}")
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
        object.__setattr__(self, "logit_bias", _bias_pairs(self.logit_bias))
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise InputError(f"stop takes strings of at least one character, not {list(self.stop)}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

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
    if len(dict(pairs)) < len(pairs):
        raise InputError(f"logit_bias names a token id twice: {[token for token, _ in pairs]}")
    return tuple(sorted(pairs))


def widen(logits: Tensor) -> Tensor:
    """Logits in at least float32: half precision is too coarse for softmax sums."""
    return logits if logits.dtype == torch.float64 else logits.float()


def log_law(logits: Tensor, params: SamplingParams) -> Tensor:
    """The processed law of one row: log-probabilities in the dtype of `logits`, `(…, vocab)`.

    Greedy gives 0 at the argmax, -inf elsewhere. What depends on a node's own path (`penalties.adjust`) comes before.
    """
    if params.greedy:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter(-1, best, 0.0)
    return Warp([params], logits.device)(logits)


class Warp:
    """Temperature, then top-k, top-p and min-p, as transformers orders them, for a batch of rows with options of their own.

    Rows that are greedy, or have an option off, come out as if they were alone.
    """

    def __init__(self, rows: Sequence[SamplingParams], device: torch.device) -> None:
        options = [(p.temperature or 1.0, float(p.top_k or math.inf), p.top_p, p.min_p) for p in rows]
        # One tensor: it is one copy to the device. Float64 holds top_p, temperature and every vocabulary's size.
        every = torch.tensor(options, dtype=torch.float64).to(device, non_blocking=True)
        self.temperature, self.top_k, self.top_p, self.min_p = every.unbind(1)
        self.has_top_k = any(p.top_k for p in rows)
        self.has_top_p = any(p.top_p < 1 for p in rows)
        self.has_min_p = any(p.min_p for p in rows)
        self.uniform = options[0] if len(set(options)) == 1 else None

    def __call__(self, logits: Tensor) -> Tensor:
        """Log-probabilities in the dtype of `logits (batch, …, vocab)`, at least float32; a batch of one has any shape."""

        def each(values: Tensor, number: int) -> Tensor | float:
            if self.uniform is not None:
                return self.uniform[number]
            return values.to(logits.dtype).view(-1, *[1] * (logits.ndim - 1))

        vocab, out = logits.shape[-1], float("-inf")
        logits = logits / each(self.temperature, 0)
        if self.has_top_k or self.has_top_p:
            ranked, order = logits.sort(dim=-1, descending=True)
        if self.has_top_k:
            last = torch.as_tensor(each(self.top_k, 1), device=logits.device).clamp(max=vocab).long() - 1
            least = ranked.gather(-1, last.expand(*logits.shape[:-1], 1))
            logits = logits.masked_fill(logits < least, out)
            ranked = ranked.masked_fill(ranked < least, out)
        if self.has_top_p:
            top_p = each(self.top_p, 2)
            share = ranked.softmax(-1)
            # A token stays if the mass before it is still short of top_p; the first one always stays. The sum of all may
            # exceed 1 by rounding, so a row without top_p is asked about.
            drop = (share.cumsum(-1) - share >= top_p) & torch.as_tensor(top_p < 1, device=logits.device)
            logits = logits.masked_fill(drop.scatter(-1, order, drop), out)
        if self.has_min_p:
            # The largest probability is compared through logits: a common factor cancels.
            ratio = torch.as_tensor(each(self.min_p, 3), device=logits.device, dtype=logits.dtype).log()
            logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + ratio, out)
        return logits.log_softmax(-1)
