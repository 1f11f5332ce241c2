"""GlideCape: lossless speculative decoding with GliDe, CaPE and SVIP.

>>> import glidecape
>>> lm = glidecape.load("path/to/model", draft="path/to/draft")
>>> lm("def load_table(", temperature=0.8, seed=7, max_tokens=8).finish
'length'
>>> "glide+cape" in glidecape.METHODS
True
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from .batch.text import TextStream
    from .core.constraint import Constraint
    from .core.params import SamplingParams
    from .core.stats import Stats
    from .drafting.methods import METHODS, make_drafter
    from .drafting.options import MethodOptions
    from .drafts.causal_lm import StandaloneDraft
    from .drafts.checkpoint import load_draft
    from .drafts.glide.adapter import GlideDraft
    from .drafts.hub import AutoDraft
    from .engine.decode import Completion, generate
    from .errors import GlideCapeError
    from .integrations.huggingface import glidecape_generate
    from .interface.language_model import LanguageModel
    from .interface.load import load
    from .target.target import Target

# transformers imports torchao where it is installed, which warns of its kernels for other hardware and of its own enums.
for _library in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_library).setLevel(logging.ERROR)

# Loaded when first used: `import glidecape` itself imports neither torch nor transformers.
_HOME = {
    "Completion": "engine.decode",
    "generate": "engine.decode",
    "METHODS": "drafting.methods",
    "MethodOptions": "drafting.options",
    "make_drafter": "drafting.methods",
    "GlideCapeError": "errors",
    "glidecape_generate": "integrations.huggingface",
    "load_draft": "drafts.checkpoint",
    "AutoDraft": "drafts.hub",
    "LanguageModel": "interface.language_model",
    "load": "interface.load",
    "GlideDraft": "drafts.glide.adapter",
    "StandaloneDraft": "drafts.causal_lm",
    "Target": "target.target",
    "Constraint": "core.constraint",
    "SamplingParams": "core.params",
    "Stats": "core.stats",
    "TextStream": "batch.text",
}
__all__ = [
    "METHODS",
    "AutoDraft",
    "Completion",
    "Constraint",
    "GlideCapeError",
    "GlideDraft",
    "LanguageModel",
    "MethodOptions",
    "SamplingParams",
    "StandaloneDraft",
    "Stats",
    "Target",
    "TextStream",
    "__version__",
    "generate",
    "glidecape_generate",
    "load",
    "load_draft",
    "make_drafter",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version(__name__)
    elif name in _HOME:
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    else:
        raise AttributeError(f"module 'glidecape' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
