"""What the user asks of the output's law, and the law itself: logits in, processed log-probabilities out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InputError

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

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def widen(logits: Tensor) -> Tensor:
    """Logits in at least float32: half precision is too coarse for softmax sums."""
    return logits if logits.dtype == torch.float64 else logits.float()


def log_law(logits: Tensor, params: SamplingParams) -> Tensor:
    """The processed law of one row: log-probabilities in the dtype of `logits`, `(…, vocab)`.

    Temperature, then top-k, then top-p, as transformers orders them. Greedy gives 0 at the argmax, -inf elsewhere.
    """
    if params.greedy:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, float("-inf")).scatter(-1, best, 0.0)
    logits = logits / params.temperature
    if 0 < params.top_k < logits.shape[-1]:
        least = logits.topk(params.top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if params.top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True)
        mass = ranked.softmax(-1).cumsum(-1)
        # A token stays if the mass before it is still short of top_p; the first one always stays.
        drop = (mass - ranked.softmax(-1)) >= params.top_p
        logits = logits.masked_fill(drop.scatter(-1, order, drop), float("-inf"))
    return logits.log_softmax(-1)
