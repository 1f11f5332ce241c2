"""Shared noise: Gumbel noise that depends on a row's seed and an absolute position only.

Target and draft, any tree and any batch see the same vector at the same position, so `argmax(log p + g)` draws the same
token whoever asks. Counter-based: there is no generator state to keep, copy or get wrong.

Source: Daliri, Musco, Suresh 2024 (drafter-invariant coupling by the Gumbel-max trick).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from .transfer import to_device

_SIGN = -(2**31)


def _mix(x: Tensor) -> Tensor:
    """A bijective 32-bit mixer on int32 tensors, in place: products wrap around, shifts fill with zeros.

    Source: C. Wellons, "lowbias32" (constants found by search, bias measured there).
    """
    for shift, factor in ((16, 0x7FEB_352D), (15, 0x846C_A68B - 2**32)):
        x ^= (x >> shift) & (2 ** (32 - shift) - 1)
        x *= factor
    x ^= (x >> 16) & 0xFFFF
    return x


def _low(x: Tensor) -> Tensor:
    """The low 32 bits of int64, as int32 of the same bits."""
    return (((x & 0xFFFF_FFFF) ^ 0x8000_0000) + _SIGN).to(torch.int32)


@lru_cache(maxsize=8)
def _columns(vocab: int, device: torch.device) -> Tensor:
    return _mix(_low(torch.arange(vocab, device=device) * 0x9E37_79B1))


class Noise(Protocol):
    def __call__(self, seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
        """Noise `(batch, nodes, vocab)`, float, for `seeds (batch,)` and `positions (batch, nodes)`."""


def gumbel(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise, float32, `(batch, nodes, vocab)`; `seeds (batch,)` and `positions (batch, nodes)` int64.

    Each 32-bit hash h becomes u = (h + 0.5) / 2**32, computed in float64, then -log(-log u).
    """
    key = _mix(_mix(_low(seeds)) ^ _low(seeds >> 32))
    key = _mix(key[:, None] ^ _mix(_low(positions)))  # (batch, nodes)
    h = _mix(key[..., None] ^ _columns(vocab, seeds.device))
    h ^= _SIGN  # unsigned h is this plus 2**31
    u = h.double().add_(2.0**31 + 0.5).mul_(2.0**-32)
    return u.log_().neg_().log_().neg_().float()


class NoiseAhead:
    """Shared noise of a batch, made for several positions at once: the rounds to come want them too, and a call costs more
    than a vector.

    It holds the vectors of `span` positions after a first one a row, and makes all anew when one is asked for that it does
    not hold. So nothing of a row that left stays here, and a reused row number cannot meet another row's noise.

    Args:
        seeds: of each row, on the host.
        make: the noise itself.
    """

    AHEAD = 16  # positions beyond the ones that are asked for

    def __init__(self, seeds: list[int], device: torch.device, make: Noise = gumbel) -> None:
        self.seeds = to_device(seeds, device)
        self.rows = torch.arange(len(seeds), device=device)[:, None]
        self.make = make
        self.first: list[int] = []  # the first position of each row that is held
        self.held: Tensor | None = None

    def at(self, roots: list[int], root_positions: Tensor, depth: Tensor, deepest: int, vocab: int) -> Tensor:
        """Noise `(batch, nodes, vocab)` for the tokens that follow nodes of `depth (batch, nodes)` below the roots.

        Args:
            roots: absolute positions of the roots, on the host; `root_positions (batch,)` are the same on the device.
            deepest: no node is deeper.
        """
        held = self.held
        fits = (
            held is not None
            and held.shape[2] == vocab
            and max(root - first for first, root in zip(self.first, roots, strict=True)) + deepest < held.shape[1]
        )
        if not fits:
            span = torch.arange(1, deepest + 2 + self.AHEAD, device=self.seeds.device)
            held = self.held = self.make(self.seeds, root_positions[:, None] + span, vocab)
            self.first, self.start = list(roots), root_positions.clone()
        assert held is not None
        return held[self.rows, (root_positions - self.start)[:, None] + depth]
