"""Lag schemes: which target keys each training position may read, as numbers for `visible`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..core.masks import block_visible


def lag_visible(scheme: str, seed: int, number: int, rows: int, length: int, max_lag: int) -> Tensor:
    """Target keys `(rows, length)` that each position of batch `number` may read; 0: none, and not in the loss.

    A function of its arguments alone, so a resumed run draws what the killed one would have drawn. In decoding, the
    node of depth i in a round reads what was committed at its root: lag i + 1. The schemes stand for that in four ways:

    "block": a round begins at every multiple of `max_lag`; position j of a round that begins at b reads keys 0 .. b-1.
        A position of the window always has the same lag. Source: GliDe paper, section 4.1. Differs: the first block
        reads nothing and is left out, where the official code lets it read itself.
    "block-random": the same blocks, begun at a random place in each row, so that lag and place in the window are
        independent. Ours; the default.
    "balanced": the same blocks; the rows take the `max_lag` phases in turn, and positions before `max_lag`, where
        the deepest lag cannot be, are left out. Each lag is then exactly equally frequent, in every batch if its rows are a
        multiple of `max_lag`, else over `max_lag` batches. Ours.
    "shift": each position draws its own lag from 1 .. `max_lag`; neighbours no longer share a root, which is no loss
        for one layer: its own keys depend on token and position only. Source: LongSpec, "flash noisy training".
        Differs: LongSpec draws one lag of 1 .. 4 for a whole forward, because its kernel knows only shifted causal masks.
    """
    random = np.random.default_rng([seed, number])
    if scheme == "shift":
        lags = torch.from_numpy(random.integers(1, max_lag + 1, (rows, length)))
        return (torch.arange(length) + 1 - lags).clamp(min=0)
    if scheme == "balanced":
        phases = torch.arange(number * rows, (number + 1) * rows) % max_lag
        visible = block_visible(phases, length, max_lag)
        visible[:, :max_lag] = 0
        return visible
    if scheme == "block":
        return block_visible(torch.zeros(rows, dtype=torch.long), length, max_lag)
    return block_visible(torch.from_numpy(random.integers(0, max_lag, rows)), length, max_lag)
