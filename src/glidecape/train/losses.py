"""What a draft is trained to lower, summed over positions in bounded memory.

With p the target's law and q the draft's at a position, in nats:

    kl    KL(p || q): q must cover all of p. The default.
    rkl   KL(q || p): q may leave out what it cannot hold, and is punished for what p would not say.
    tv    total variation, 1 - sum of min(p, q): the chance of a rejection itself; its gradient fades where p and q hardly
          overlap, so it follows or joins another loss.
    nla   -log alpha, with alpha = sum of min(p, q): what tv lowers, with a gradient that does not fade.
    lk_hybrid   s KL(p || q) + (1 - s) tv with s = exp(-3 alpha) at each position: kl where they hardly overlap, tv where
          they do. No gradient passes through s. Source of nla and lk_hybrid: LK losses (arXiv 2602.23881).
    ce    cross-entropy of the text's next token: no target needed. Source: GliDe paper, section 5.1.

Joined by "+", losses are averaged: "kl+tv".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .ranks import mean_count

CHUNK = 2**23  # logits that are widened at once: 32 MiB in float32


def distillation_loss(draft: Tensor, target: Tensor, tokens: Tensor, counted: Tensor, loss: str) -> Tensor:
    """Mean loss in nats over counted positions; 0 if there are none. Of several processes' losses the mean is that over all
    of their positions.

    Positions go through in pieces, each with its gradient, so no float32 copy of more than `CHUNK` logits, or of one
    position's, lives at any time.

    Args:
        draft, target: logits `(batch, length, vocab)` at positions 0 .. length-1. No gradient reaches the target's.
        tokens: `(batch, length)`; position j predicts token j + 1.
        counted: `(batch, length)` bool; the last position never counts for "ce".
    """
    rows = counted.flatten().nonzero()[:, 0]
    following = F.pad(tokens[:, 1:], (0, 1), value=-100).flatten()[rows]  # -100: unknown, ignored
    parts = loss.split("+")
    weights = dict.fromkeys(parts, 1 / (len(parts) * mean_count(len(rows))))
    if "ce" in parts:
        weights["ce"] = 1 / (len(parts) * mean_count(int((following != -100).sum())))
    learns = draft.requires_grad and torch.is_grad_enabled()
    return _InPieces.apply(draft.flatten(0, 1), target.detach().flatten(0, 1), rows, following, weights, learns)


def _total(draft: Tensor, target: Tensor, following: Tensor, weights: dict[str, float]) -> Tensor:
    """Weighted sum over positions: logits `(positions, vocab)` of any dtype, the next tokens `(positions,)`."""
    q = draft.float().log_softmax(-1)
    total = q.new_zeros(())
    if weights.keys() - {"ce"}:
        p = target.float().log_softmax(-1)
    for part, weight in weights.items():
        if part == "kl":
            value = F.kl_div(q, p, reduction="sum", log_target=True)
        elif part == "rkl":
            value = F.kl_div(p, q, reduction="sum", log_target=True)
        elif part == "tv":
            value = (p.exp() - q.exp()).abs().sum() / 2
        elif part == "nla":
            # Not by way of 1 - tv, which is rounded to 0 where they hardly overlap.
            value = -torch.minimum(p, q).logsumexp(-1).sum()
        elif part == "lk_hybrid":
            distance = (p.exp() - q.exp()).abs().sum(-1) / 2
            share = (-3 * (1 - distance)).exp().detach()
            divergence = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
            value = (share * divergence + (1 - share) * distance).sum()
        else:
            value = F.nll_loss(q, following, reduction="sum", ignore_index=-100)
        total = total + weight * value
    return total


class _InPieces(torch.autograd.Function):
    """`_total` over pieces of `rows`. Each piece's gradient is made along with its value, while it is at hand, and kept in the
    logits' own dtype: the backward pass has nothing to compute again."""

    @staticmethod
    def forward(
        ctx: Any,
        draft: Tensor,
        target: Tensor,
        rows: Tensor,
        following: Tensor,
        weights: dict[str, float],
        learns: bool,
    ) -> Tensor:
        size = max(1, CHUNK // draft.shape[-1])
        total = torch.zeros((), dtype=torch.float32, device=draft.device)
        gradient = torch.zeros_like(draft) if learns else None
        for at, then in zip(rows.split(size), following.split(size), strict=True):
            with torch.set_grad_enabled(learns):
                piece = draft[at].detach().requires_grad_(learns)
                value = _total(piece, target[at], then, weights)
            total += value.detach()
            if gradient is not None:
                gradient[at] = torch.autograd.grad(value, piece)[0]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return ctx.saved_tensors[0] * upstream[0], None, None, None, None, None
