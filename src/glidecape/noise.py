"""Shared noise: Gumbel noise that depends on a row's seed and an absolute position only.

Target and draft, any tree and any batch see the same vector at the same position, so `argmax(log p + g)` draws the same
token whoever asks. Counter-based: there is no generator state to keep, copy or get wrong.

Source: Daliri, Musco, Suresh 2024 (drafter-invariant coupling by the Gumbel-max trick).
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

_MASK = 0xFFFF_FFFF


def _mix(x: Tensor) -> Tensor:
    """A bijective 32-bit mixer on int64 tensors; products may wrap around, their low 32 bits are right all the same.

    Source: C. Wellons, "lowbias32" (constants found by search, bias measured there).
    """
    x = ((x ^ (x >> 16)) * 0x7FEB_352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846C_A68B) & _MASK
    return x ^ (x >> 16)


class Noise(Protocol):
    def __call__(self, seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
        """Noise `(batch, nodes, vocab)`, float, for `seeds (batch,)` and `positions (batch, nodes)`."""


def gumbel(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise, float32, `(batch, nodes, vocab)`; `seeds (batch,)` and `positions (batch, nodes)` int64.

    Each 32-bit hash h becomes u = (h + 0.5) / 2**32, computed in float64, then -log(-log u).
    """
    key = _mix(_mix(seeds & _MASK) ^ ((seeds >> 32) & _MASK))
    key = _mix(key[:, None] ^ _mix(positions & _MASK))  # (batch, nodes)
    column = _mix(torch.arange(vocab, device=seeds.device) * 0x9E37_79B1 & _MASK)
    u = (_mix(key[..., None] ^ column).double() + 0.5) * 2.0**-32
    return -(-u.log()).log().float()
