"""GlideCape: lossless speculative decoding with GliDe, CaPE and SVIP.

>>> import glidecape
>>> glidecape.SamplingParams(temperature=0.8).greedy
False
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decode import Completion, generate
    from .drafting.methods import METHODS, make_drafter
    from .errors import GlideCapeError
    from .huggingface import glidecape_generate
    from .models.checkpoint import load_draft
    from .models.glide_draft import GlideDraft
    from .models.standalone import StandaloneDraft
    from .models.target import Target
    from .sampling import SamplingParams
    from .stats import Stats
    from .text import TextStream

# Loaded when first used: `import glidecape` itself imports neither torch nor transformers.
_HOME = {
    "Completion": "decode",
    "generate": "decode",
    "METHODS": "drafting.methods",
    "make_drafter": "drafting.methods",
    "GlideCapeError": "errors",
    "glidecape_generate": "huggingface",
    "load_draft": "models.checkpoint",
    "GlideDraft": "models.glide_draft",
    "StandaloneDraft": "models.standalone",
    "Target": "models.target",
    "SamplingParams": "sampling",
    "Stats": "stats",
    "TextStream": "text",
}
__all__ = [
    "METHODS",
    "Completion",
    "GlideCapeError",
    "GlideDraft",
    "SamplingParams",
    "StandaloneDraft",
    "Stats",
    "Target",
    "TextStream",
    "generate",
    "glidecape_generate",
    "load_draft",
    "make_drafter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'glidecape' has no attribute '{name}'")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
