"""transformers' `generate` as a peer: plain, with an assistant model, and with prompt lookup, at its default settings."""

from __future__ import annotations

import time
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from ...core.params import SamplingParams
from .base import PeerSource

LOOKUP_TOKENS = 10  # proposed a round: the number in transformers' documentation


class _FirstRound(StoppingCriteria):
    """Stops nothing. Notes when the first round was done, and how many tokens there were then."""

    def __init__(self) -> None:
        self.at: float | None = None
        self.length = 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.at is None:
            self.at, self.length = time.perf_counter(), input_ids.shape[1]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class TransformersPeer:
    """transformers' own `generate`, plain."""

    name, version = "transformers", transformers.__version__

    def __init__(self, source: PeerSource) -> None:
        target = source.target
        self.eos = list(target.eos_token_ids)
        model = AutoModelForCausalLM.from_pretrained(source.source, dtype=target.dtype)
        self.model = model.to(target.device).eval()

    @torch.no_grad()
    def run(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
        """See `Peer.run`; prefill is taken off by a second call for one token."""
        ids = torch.tensor([prompt], device=self.model.device)
        # The mask is spelled out: generate would guess it from the pad token, and hide a prompt's own end-of-text tokens.
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": params.temperature > 0,
            "pad_token_id": 0,
            "eos_token_id": None if params.ignore_eos or not self.eos else self.eos,
        }
        if params.temperature > 0:
            options |= {"temperature": params.temperature, "top_k": 0, "top_p": 1.0}
        times = []
        for new in (1, params.max_new_tokens):
            started = time.perf_counter()
            out = self.model.generate(ids, max_new_tokens=new, **options)
            times.append(time.perf_counter() - started)
        return out[0, len(prompt) :].tolist(), times[1] - times[0]


class SpeculativePeer:
    """`generate` with an assistant model, or with prompt lookup.

    Args:
        assistant: folder of a draft LM; None: prompt lookup.
    """

    version = transformers.__version__

    def __init__(self, source: PeerSource, assistant: str | None = None) -> None:
        def load(name: str) -> Any:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=source.target.dtype)
            return model.to(source.target.device).eval()

        self.name = "transformers+lookup" if assistant is None else "transformers+draft"
        self.eos = list(source.target.eos_token_ids)
        self.model = load(source.source)
        self.options: dict[str, Any] = {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
        if assistant is not None:
            self.options = {"assistant_model": load(assistant)}

    @torch.no_grad()
    def run(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
        """See `Peer.run`. A first round emits several tokens here and reads the prompt (the assistant's, too); so what is
        timed are the rounds after it, scaled to all tokens but the first."""
        ids = torch.tensor([prompt], device=self.model.device)
        first = _FirstRound()
        # The mask is spelled out: generate would guess it from the pad token, and hide a prompt's own end-of-text tokens.
        options: dict[str, Any] = {
            "attention_mask": torch.ones_like(ids),
            "do_sample": params.temperature > 0,
            "pad_token_id": 0,
            "eos_token_id": None if params.ignore_eos or not self.eos else self.eos,
            "max_new_tokens": params.max_new_tokens,
            "stopping_criteria": StoppingCriteriaList([first]),
        }
        if params.temperature > 0:
            options |= {"temperature": params.temperature, "top_k": 0, "top_p": 1.0}
        out = self.model.generate(ids, **options, **self.options)
        seconds = 0.0 if first.at is None else time.perf_counter() - first.at
        later, tokens = out.shape[1] - first.length, out[0, len(prompt) :].tolist()
        return tokens, seconds * (len(tokens) - 1) / later if later else 0.0
