"""The peers by name."""

from __future__ import annotations

from collections.abc import Callable

from ...errors import InputError
from .base import Peer, PeerSource, draft_lm


def _transformers(source: PeerSource) -> Peer:
    from .transformers import TransformersPeer

    return TransformersPeer(source)


def _lookup(source: PeerSource) -> Peer:
    from .transformers import SpeculativePeer

    return SpeculativePeer(source)


def _assisted(source: PeerSource) -> Peer:
    from .transformers import SpeculativePeer

    return SpeculativePeer(source, draft_lm(source))


def _llama_cpp(source: PeerSource) -> Peer:
    from .llama_cpp import LlamaCppPeer

    return LlamaCppPeer(source)


def _llama_cpp_draft(source: PeerSource) -> Peer:
    from .llama_cpp import LlamaCppPeer

    return LlamaCppPeer(source, draft_lm(source))


PEERS: dict[str, Callable[[PeerSource], Peer]] = {
    "transformers": _transformers,
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
