"""transformers' own `generate` as a peer: plain, with an assistant model, with prompt lookup. One copy of the weights."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

LOOKUP_TOKENS = 10  # proposed a round by prompt lookup: the number in transformers' documentation


class _FirstRound(StoppingCriteria):
    """Stops nothing. Notes when the first round was done, and how many tokens there were then."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.length = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.at is None:
            self.at, self.length = time.perf_counter(), input_ids.shape[1]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@dataclass
class Generate:
    """`model.generate(**options)` with one prompt.

    `run` returns the tokens and the seconds without prefill: those after the first round, which reads the prompt (the
    assistant's too), scaled to all tokens but the first.
    """

    name: str
    model: Any
    options: dict[str, Any]

    @torch.no_grad()
    def run(self, prompt: list[int], settings: Any) -> tuple[list[int], float]:
        ids = torch.tensor([prompt], device=self.model.device)
        first = _FirstRound()
        # The mask is spelled out: generate would guess it from the pad token, and hide a prompt's own end-of-text tokens.
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": settings.temperature > 0,
            "pad_token_id": 0,
            "eos_token_id": None,
            "max_new_tokens": settings.max_new_tokens,
            "stopping_criteria": StoppingCriteriaList([first]),
        }
        if settings.temperature > 0:
            options |= {"temperature": settings.temperature, "top_k": 0}
        out = self.model.generate(ids, **options, **self.options)
        seconds = 0.0 if first.at is None else time.perf_counter() - first.at
        later = out.shape[1] - first.length
        tokens = out[0, len(prompt) :].tolist()
        return tokens, seconds * (len(tokens) - 1) / later if later else 0.0


def transformers_peers(
    source: str, dtype: torch.dtype, device: str, assistant: str | None = None, lookup: bool = True
) -> list[Generate]:
    """Plain `generate`, with prompt lookup, and with the assistant model if there is one; transformers' default settings.

    Args:
        source, assistant: model folders; the weights of `source` are loaded once for all.
    """
    model = load(source, dtype, device)
    peers = [Generate("transformers generate", model, {})]
    if lookup:
        peers.append(Generate("transformers prompt lookup", model, {"prompt_lookup_num_tokens": LOOKUP_TOKENS}))
    if assistant is not None:
        peers.append(Generate("transformers assisted", model, {"assistant_model": load(assistant, dtype, device)}))
    return peers


def load(source: str, dtype: torch.dtype, device: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype).to(device).eval()
