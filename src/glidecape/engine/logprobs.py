"""Log-probabilities of emitted tokens under the target's own law: before temperature, bias and all other options."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..batch.row import TokenLogprobs
from ..core.sampling import widen
from ..core.transfer import to_host


def token_logprobs(logits: Tensor, path: Sequence[int], tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Of the tokens that one row emits in a round; one transfer to the host.

    Args:
        logits: `(nodes, vocab)` of the row's tree.
        path: node k is the one that token k follows.
        top: how many of the most probable tokens are told.
    """
    if not tokens:
        return []
    law = widen(logits[list(path[: len(tokens)])]).log_softmax(-1)
    own = law.gather(1, torch.tensor(tokens, device=law.device)[:, None])
    best = law.topk(top)
    rows = to_host(torch.cat([own.double(), best.values.double(), best.indices.double()], 1))
    return [TokenLogprobs(row[0], tuple((int(row[1 + top + k]), row[1 + k]) for k in range(top))) for row in rows]
