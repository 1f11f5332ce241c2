"""The output's law under `SamplingParams`: logits in, processed log-probabilities out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .params import SamplingParams


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
            # A token stays if the mass before it is still short of top_p. The sum of all may exceed 1 by rounding, so a row
            # without top_p is asked about.
            drop = (share.cumsum(-1) - share >= top_p) & torch.as_tensor(top_p < 1, device=logits.device)
            drop[..., 0] = False  # the first one always stays, even where top_p is 0 in this dtype
            logits = logits.masked_fill(drop.scatter(-1, order, drop), out)
        if self.has_min_p:
            # The largest probability is compared through logits: a common factor cancels.
            ratio = torch.as_tensor(each(self.min_p, 3), device=logits.device, dtype=logits.dtype).log()
            logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + ratio, out)
        return logits.log_softmax(-1)
