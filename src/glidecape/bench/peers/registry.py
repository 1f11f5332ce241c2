"""The peers by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ...errors import InputError, did_you_mean
from .base import Peer, PeerSource, draft_lm
from .llama_cpp import NGRAMS, LlamaCppPeer
from .openvino import OpenVinoPeer
from .transformers import CompiledPeer, SpeculativePeer, TransformersPeer

PEERS: dict[str, Callable[[PeerSource], Peer]] = {
    "transformers": TransformersPeer,
    "transformers+compile": CompiledPeer,
    "transformers+lookup": SpeculativePeer,
    "transformers+draft": lambda source: SpeculativePeer(source, draft_lm(source)),
    "llama.cpp": LlamaCppPeer,
    "llama.cpp+draft": lambda source: LlamaCppPeer(source, draft_lm(source)),
    **{f"llama.cpp+{kind}": partial(LlamaCppPeer, ngrams=kind) for kind in NGRAMS},
    "openvino": OpenVinoPeer,
    "openvino+lookup": partial(OpenVinoPeer, lookup=True),
    "openvino+draft": lambda source: OpenVinoPeer(source, draft_lm(source)),
}


def check_peers(names: list[str]) -> None:
    """
    Raises:
        InputError: one is unknown.
    """
    for name in names:
        if name not in PEERS:
            advice = did_you_mean(name, PEERS, f"choose from {', '.join(PEERS)}")
            raise InputError(f"unknown peer '{name}': {advice}")


def make_peers(names: list[str], source: PeerSource) -> list[Peer]:
    """The peers of these names.

    Raises:
        InputError: see `check_peers`; or whatever a peer raises when its library is not installed.
    """
    check_peers(names)
    return [PEERS[name](source) for name in names]
