"""GliDe drafts for the speculators library: after `register()`, its `SpeculatorModel.from_pretrained` reads what `glidecape
export` wrote."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, Literal, NoReturn

from pydantic import Field

from ..drafts.card import checked
from ..drafts.glide.config import GlideConfig
from ..drafts.glide.network import GlideModel
from ..errors import InputError, UnsupportedError


@cache
def register() -> type:
    """Make GliDe drafts known to speculators, in this process; the class of a model, whose `network` is the `GlideModel`.

    Raises:
        InputError: speculators is not installed.
    """
    try:
        from speculators import SpeculatorModel, SpeculatorModelConfig, reload_schemas
    except ImportError as error:
        raise InputError(
            f"speculators does not load ({error}): pip install speculators, in an environment of its own"
        ) from None

    @SpeculatorModelConfig.register("glide")
    class GlideSpeculatorConfig(SpeculatorModelConfig):
        """`draft` holds the fields of `GlideConfig`; `glidecape` fingerprint, command and figures of the card."""

        _auto_class: ClassVar[str | None] = None  # else this file's source would be saved beside the weights
        speculators_model_type: Literal["glide"] = "glide"
        architectures: list[str] = Field(default_factory=lambda: ["GlideSpeculator"])
        draft: dict[str, Any] = Field(default_factory=dict)
        glidecape: dict[str, Any] = Field(default_factory=dict)

    @SpeculatorModel.register("glide")
    class GlideSpeculator(SpeculatorModel):
        """A GliDe network with its weights; `network.bind(target)` joins it to its target."""

        config_class: ClassVar[type] = GlideSpeculatorConfig

        def __init__(self, config: Any, **kwargs: Any) -> None:
            super().__init__(config=config, **kwargs)
            self.network = GlideModel(checked(GlideConfig, config.draft))
            self.post_init()

        @property
        def layers(self) -> Any:
            return self.network.layers

        @classmethod
        def from_training_args(cls, verifier_config: Any, **kwargs: Any) -> NoReturn:
            _refuse_training()

        @staticmethod
        def get_trainer_kwargs(**kwargs: Any) -> NoReturn:
            _refuse_training()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            """See `GlideModel.forward`."""
            return self.network(*args, **kwargs)

    reload_schemas()  # else the configuration's tag is unknown
    return GlideSpeculator


def _refuse_training() -> NoReturn:
    raise UnsupportedError("speculators does not train a GliDe draft: use `glidecape train`, and export the result")
