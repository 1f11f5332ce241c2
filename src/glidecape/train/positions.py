"""Positions of a training window's tokens: from zero, or all but the first few moved to a random place of the context."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..drafts.network import rotates_by_length
from ..errors import InputError, UnsupportedError
from ..target.target import UNLIMITED, Target

ANCHORS = 4  # first tokens that keep their positions: targets attend to them from everywhere
PROBED = 8  # tokens of the window on which a target is tried


def anchored(offsets: Tensor, length: int) -> Tensor:
    """Positions `(rows, length)`: 0 to 3 for the first four tokens of a row, and `offsets (rows,)` more than their place for
    all others.

    >>> anchored(torch.tensor([0, 90]), 6).tolist()
    [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 94, 95]]
    """
    places = torch.arange(length, device=offsets.device).expand(len(offsets), -1)
    return torch.where(places < ANCHORS, places, places + offsets[:, None])


def window_positions(seed: int, number: int, rows: int, length: int, context: int) -> Tensor:
    """Anchor-offset positions `(rows, length)` of batch `number`: each row has an offset of its own, drawn from 0 to
    `context - length`, so that short windows train every position of the context and none beyond it.

    A function of its arguments alone, so a resumed run draws what the killed one would have drawn.

    Source: LongSpec, "anchor-offset indices". Differs: LongSpec draws one offset for a whole forward, and up to 15,000 or
    30,000 whatever the target's context.
    """
    random = np.random.default_rng([seed, number, ANCHORS])  # other numbers than those of the batch's lags
    return anchored(torch.from_numpy(random.integers(0, context - length + 1, rows)), length)


def check_offsets(target: Target, length: int) -> None:
    """Can windows of `length` tokens be moved within this target's context?

    Raises:
        InputError: the target declares no context, or a window fills it.
        UnsupportedError: its logits do not follow from the positions that it is given, or those of one row depend on
            another row's.
    """
    if target.context == UNLIMITED:
        raise InputError("this target does not say how long its context is: train with --positions zero")
    if length >= target.context:
        raise InputError(
            f"windows of {length} tokens fill the target's context of {target.context}: shorten --length, or train with "
            "--positions zero"
        )
    if rotates_by_length(target):
        raise UnsupportedError(
            "this target's rotary embedding depends on the longest position of a batch, so rows at different positions would "
            "change each other: train with --positions zero"
        )
    if not _follows_positions(target):
        raise UnsupportedError(
            f"{target.text_config.model_type} gives the same logits wherever its tokens stand, so it takes no positions or "
            "counts its cache: train with --positions zero"
        )


@torch.no_grad()
def _follows_positions(target: Target) -> bool:
    """Do the logits of a few tokens change when they are moved to the end of the context?"""
    length = min(PROBED, target.context - 1)
    tokens = torch.arange(length, device=target.device)[None] % target.vocab_size
    furthest = torch.tensor([target.context - length], device=target.device)
    here, there = (
        target.forward(tokens, anchored(offset, length), target.new_cache(1, length)).logits
        for offset in (torch.zeros_like(furthest), furthest)
    )
    return not torch.equal(here, there)
