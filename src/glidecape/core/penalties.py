"""What is done to a node's logits before temperature: bias, penalties, and no end before min_new_tokens.

Each node of a tree has its own history: the row's tokens so far and the node's path. The target's law and the draft's
are made by the same function, so that a draft guesses what verify will want.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .params import SamplingParams


class History:
    """How often each token occurred in a row, kept up from round to round.

    Attributes:
        prompt: `(vocab,)` bool, in the prompt.
        emitted: `(vocab,)` float, occurrences among the emitted tokens.
        known: tokens of the row that were counted.
    """

    def __init__(self, vocab: int, device: torch.device) -> None:
        self.prompt = torch.zeros(vocab, dtype=torch.bool, device=device)
        self.emitted = torch.zeros(vocab, device=device)
        self.known = 0

    def update(self, tokens: list[int], prompt_length: int) -> None:
        """Count the tokens of a row that were not counted yet."""
        device = self.emitted.device
        if self.known == 0:
            self.prompt[torch.tensor(tokens[:prompt_length], device=device)] = True
            self.known = prompt_length
        if new := tokens[self.known :]:
            more = torch.tensor(new, device=device)
            self.emitted.index_add_(0, more, torch.ones(len(new), device=device))
            self.known = len(tokens)


def adjust(
    logits: Tensor,
    params: SamplingParams,
    history: History | None,
    tokens: Tensor,
    above: Tensor,
    emitted: Tensor,
    ends: Iterable[int],
) -> Tensor:
    """The logits of some nodes of one row, `(count, vocab)`, after bias, penalties and min_new_tokens, in that order.

    Args:
        logits: `(count, vocab)`, at least float32.
        history: of the row's tokens, the root included; needed where `params.counts_tokens`.
        tokens: `(nodes,)` tokens of the tree.
        above: `(count, nodes)` bool: which nodes are on the path from the root (left out) to each node, itself included.
        emitted: `(count,)` tokens that the row will have emitted at each node.
        ends: token ids that end the row.

    Source: the order and the repetition penalty are transformers'; presence and frequency as vLLM has them.
    """
    if params.logit_bias:
        ids, values = zip(*dict(params.logit_bias).items(), strict=True)
        logits = logits.index_add(
            1,
            torch.tensor(ids, device=logits.device),
            torch.tensor(values, dtype=logits.dtype, device=logits.device).expand(logits.shape[0], -1),
        )
    if params.counts_tokens:
        assert history is not None
        path = torch.zeros_like(logits).scatter_add_(1, tokens.expand(above.shape), above.to(logits.dtype))
        count = path + history.emitted.to(logits.dtype)
        seen = (count > 0) | history.prompt
        if params.repetition_penalty != 1:
            strength = params.repetition_penalty
            logits = torch.where(seen, torch.where(logits < 0, logits * strength, logits / strength), logits)
        logits = logits - params.frequency_penalty * count - params.presence_penalty * (count > 0).to(logits.dtype)
    if params.min_new_tokens > 0:
        ended = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        ended[[token for token in ends if token < logits.shape[1]]] = True
        logits = logits.masked_fill((emitted < params.min_new_tokens)[:, None] & ended, float("-inf"))
    return logits
