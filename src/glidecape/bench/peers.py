"""Peers: other libraries that decode the same weights, through their own public interface, in the same run.

A peer is any object with a name and `run`. `PEERS` makes them by name; a new one is a class like `TransformersPeer` and a
line there, and nothing else changes: the runner times it beside our methods and the report has a row for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ..errors import InputError
from ..models.target import Target
from ..sampling import SamplingParams


class Peer(Protocol):
    """A library that decodes one prompt at a time.

    Attributes:
        name: of its row in the tables, such as "transformers".
        version: of the library, for provenance.
    """

    name: str
    version: str

    def run(self, prompt: list[int], params: SamplingParams) -> tuple[list[int], float]:
        """Decode `prompt` (token ids).

        Args:
            params: temperature, `max_new_tokens` and `ignore_eos` are to be followed; at temperature above 0 the peer
                draws by its own means, so its tokens are not compared.

        Returns:
            The new tokens, and the seconds from the first of them to the last: prefill and first token are not in it, so
            they are the time of `len(tokens) - 1` tokens.
        """


@dataclass(frozen=True)
class PeerSource:
    """What peers are made of.

    Attributes:
        source: folder or Hub name of the target.
        target: the loaded target, for its dtype and device. Its module is ours; load the weights a second time.
        drafts: folders of the drafts by the names of `--draft`.
        draft_length: tokens drafted a round.
    """

    source: str
    target: Target
    drafts: Mapping[str, str] = field(default_factory=dict)
    draft_length: int = 5


class TransformersPeer:
    """transformers' own `generate`, plain."""

    name = "transformers"

    def __init__(self, source: PeerSource) -> None:
        import transformers
        from transformers import AutoModelForCausalLM

        self.version = transformers.__version__
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


def _lookup(source: PeerSource) -> Peer:
    from .transformers_peers import SpeculativePeer

    return SpeculativePeer(source)


def _assisted(source: PeerSource) -> Peer:
    from .transformers_peers import SpeculativePeer

    return SpeculativePeer(source, draft_lm(source))


def _llama_cpp(source: PeerSource) -> Peer:
    from .llama_cpp import LlamaCppPeer

    return LlamaCppPeer(source)


def _llama_cpp_draft(source: PeerSource) -> Peer:
    from .llama_cpp import LlamaCppPeer

    return LlamaCppPeer(source, draft_lm(source))


def draft_lm(source: PeerSource) -> str:
    """The folder of the independent draft LM among the drafts; "vanilla", if several are.

    Raises:
        InputError: there is none.
    """
    from ..models.checkpoint import WEIGHTS

    found = {name: folder for name, folder in source.drafts.items() if not (Path(folder) / WEIGHTS).is_file()}
    if not found:
        raise InputError("this peer drafts with an independent LM: name one with --draft vanilla=FOLDER")
    return found.get("vanilla", next(iter(found.values())))


PEERS: dict[str, Callable[[PeerSource], Peer]] = {
    "transformers": TransformersPeer,
    "transformers+lookup": _lookup,
    "transformers+draft": _assisted,
    "llama.cpp": _llama_cpp,
    "llama.cpp+draft": _llama_cpp_draft,
}


def make_peers(names: list[str], source: PeerSource) -> list[Peer]:
    """The peers of these names.

    Raises:
        InputError: an unknown name; or whatever a peer raises when its library is not installed.
    """
    for name in names:
        if name not in PEERS:
            raise InputError(f"unknown peer '{name}': choose from {', '.join(PEERS)}")
    return [PEERS[name](source) for name in names]
