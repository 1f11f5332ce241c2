"""transformers' `generate` as a peer: plain, compiled, with an assistant model, and with prompt lookup, at its default
settings."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from ...compat import compile_anywhere, graphs_compiled
from ...core.params import SamplingParams
from ...errors import InputError
from ...target.loading import load_model
from ...target.target import Target
from .base import PeerSource

LOOKUP_TOKENS = 10  # proposed a round: the number in transformers' documentation
ROOM = 256  # a static cache has a multiple of so many slots: each size is compiled anew
RETRIES = 4


class _FirstRound(StoppingCriteria):
    """Stops nothing. Notes when the first round was done, and how many tokens there were then.

    Some versions of transformers ask the criteria while the assistant drafts, too: that is before the model has run.
    """

    def __init__(self) -> None:
        self.model_ran = False
        self.at: float | None = None
        self.length = 0

    def note_forward(self, *_: Any) -> None:
        """A hook on the model's forward."""
        self.model_ran = True

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.at is None and self.model_ran:
            self.at, self.length = time.perf_counter(), input_ids.shape[1]
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Until(StoppingCriteria):
    """Stops at so many tokens, prompt and all, without making the cache smaller as `max_length` would."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


def _model(name: str, target: Target) -> Any:
    """A model for transformers alone, with the target's dtype on its device.

    Raises:
        CheckpointError: see `load_model`.
    """
    return load_model(name, target.dtype, {})[0].to(target.device).eval()


def _options(ids: Tensor, params: SamplingParams, eos: list[int]) -> dict[str, Any]:
    """What `generate` is told of the prompt `ids (1, length)` and of sampling."""
    # The mask is spelled out: generate would guess it from the pad token, and hide a prompt's own end-of-text tokens.
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "do_sample": params.temperature > 0,
        "pad_token_id": 0,
        "eos_token_id": None if params.ignore_eos or not eos else eos,
    }
    return options | ({"temperature": params.temperature, "top_k": 0, "top_p": 1.0} if params.temperature > 0 else {})


class TransformersPeer:
    """transformers' own `generate`, plain."""

    name, version = "transformers", transformers.__version__

    def __init__(self, source: PeerSource) -> None:
        self.eos = list(source.target.eos_token_ids)
        self.model = _model(source.source, source.target)
        self.options: dict[str, Any] = {}

    @torch.no_grad()
    def run(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
        """See `Peer.run`; prefill is taken off by a second call for one token."""
        ids = torch.tensor([prompt], device=self.model.device)
        options = _options(ids, params, self.eos) | self.options
        times = []
        for new in (1, params.max_new_tokens):
            started = time.perf_counter()
            out = self.model.generate(ids, max_new_tokens=new, **options)
            times.append(time.perf_counter() - started)
        return out[0, len(prompt) :].tolist(), times[1] - times[0]


class CompiledPeer(TransformersPeer):
    """`generate` with a static cache and a compiled forward, its defaults for them. Compilation is not timed.

    Raises:
        InputError: torch.compile cannot compile this model here.
    """

    name = "transformers+compile"

    def __init__(self, source: PeerSource) -> None:
        super().__init__(source)
        self.options = {"cache_implementation": "static", "compile_config": compile_anywhere()}
        self.room = 0
        try:
            self._compile([0], 1)
        except Exception as error:  # whatever a compiler says
            reason = " ".join(str(error).strip().splitlines()[:2]) or type(error).__name__
            raise InputError(
                f"torch.compile fails on this model: {reason}; leave {self.name} out of --peers"
            ) from error

    @torch.no_grad()
    def _compile(self, prompt: list[int], new: int) -> None:
        """Compile for a cache that has room for the prompt and `new` tokens; later caches are no smaller."""
        self.room = max(self.room, -(-(len(prompt) + new) // ROOM) * ROOM)
        ids = torch.tensor([prompt], device=self.model.device)
        options = _options(ids, SamplingParams(ignore_eos=True), self.eos) | self.options
        until = StoppingCriteriaList([_Until(len(prompt) + 3)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the compiler warns of is not ours
            self.model.generate(ids, max_length=self.room, stopping_criteria=until, **options)

    def run(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
        """See `Peer.run`. A run in which something was compiled is made again."""
        if len(prompt) + params.max_new_tokens > self.room:
            self._compile(prompt, params.max_new_tokens)
        for _ in range(RETRIES):
            before = graphs_compiled()
            made = super().run(prompt, params)
            if graphs_compiled() == before:
                break
        return made


class SpeculativePeer:
    """`generate` with an assistant model, or with prompt lookup.

    Args:
        assistant: folder of a draft LM; None: prompt lookup.
    """

    version = transformers.__version__

    def __init__(self, source: PeerSource, assistant: str | None = None) -> None:
        self.name = "transformers+lookup" if assistant is None else "transformers+draft"
        self.eos = list(source.target.eos_token_ids)
        self.model = _model(source.source, source.target)
        self.options: dict[str, Any] = {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
        if assistant is not None:
            self.options = {"assistant_model": _model(assistant, source.target)}

    @torch.no_grad()
    def run(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
        """See `Peer.run`. A first round emits several tokens here and reads the prompt (the assistant's, too); so what is
        timed are the rounds after it, scaled to all tokens but the first."""
        ids = torch.tensor([prompt], device=self.model.device)
        first = _FirstRound()
        options = _options(ids, params, self.eos) | {"max_new_tokens": params.max_new_tokens}
        options["stopping_criteria"] = StoppingCriteriaList([first])
        hook = self.model.register_forward_hook(first.note_forward)
        try:
            out = self.model.generate(ids, **options, **self.options)
        finally:
            hook.remove()
        seconds = 0.0 if first.at is None else time.perf_counter() - first.at
        later, tokens = out.shape[1] - first.length, out[0, len(prompt) :].tolist()
        return tokens, seconds * (len(tokens) - 1) / later if later else 0.0
