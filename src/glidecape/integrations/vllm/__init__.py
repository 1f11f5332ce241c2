"""GliDe inside vLLM: a proposer for its method `custom_class`. Importing this imports no vLLM."""

from .proposer import GlideProposer

__all__ = ["GlideProposer"]
