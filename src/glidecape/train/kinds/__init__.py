"""How each kind of draft is trained and judged: one file a kind, and the choice between them."""

from __future__ import annotations

from torch import nn

from ...drafts.eagle.network import EagleModel
from ...drafts.glide.network import GlideModel
from ...drafts.medusa.network import MedusaModel
from ...target.target import Target
from .base import DraftTraining
from .eagle import EagleTraining
from .glide import GlideTraining
from .lm import LmTraining, LoadedLm
from .medusa import MedusaTraining

__all__ = ["BY_RECIPE", "DraftTraining", "training_of"]

# By `DraftRecipe.kind`.
BY_RECIPE: dict[str, type[DraftTraining]] = {
    "glide": GlideTraining,
    "glide-no-cross": GlideTraining,
    "eagle": EagleTraining,
    "medusa": MedusaTraining,
    "lm": LmTraining,
}
BY_NETWORK: dict[type, type[DraftTraining]] = {
    GlideModel: GlideTraining,
    EagleModel: EagleTraining,
    MedusaModel: MedusaTraining,
    Target: LoadedLm,
}


def training_of(network: nn.Module | Target) -> DraftTraining:
    """How this network is trained and judged; one of no other kind is a draft LM."""
    return BY_NETWORK.get(type(network), LmTraining)(network)
