"""What a benchmark run is: everything that its records depend on."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from ..core.params import NOISE, SamplingParams
from ..drafting.options import MethodOptions
from ..errors import InputError
from ..options import option


@dataclass(frozen=True)
class Settings:
    """Options of a run; two runs with other settings never share a folder.

    Attributes:
        temperature, sampling, seed: how tokens are chosen; each prompt has noise of its own, from the seed and its id.
        max_new_tokens: tokens emitted for each prompt at most.
        stop_at_eos: end-of-text ends a row; None: in conversations (where a chat template is applied) only. Without it
            every output has `max_new_tokens` tokens.
        batch: prompts decoded side by side.
        prompt_tokens: prompts are cut to so many tokens; 0: whole.
        context: prompts are padded in front with earlier text of their suite up to so many tokens; 0: as they are.
        chat: apply the tokenizer's chat template to prompts that are turns of a conversation.
        limit, looping: of each category, prompts that count, and prompts with looping greedy continuations.
        repeats: timed repeats.
        options: of the methods.
        watch: of each category, prompts on which every draft's law is written down, untimed.
        watch_depth: depths that the draft then runs from each token.
    """

    temperature: float = option(0.0, "Sampling temperature; 0: greedy.")
    sampling: str = option(NOISE, "noise: every method emits the same tokens. residual: the papers' rule.")
    seed: int = option(11, "Random seed of the run; each prompt gets noise of its own.")
    max_new_tokens: int = option(128, "Most tokens of each output.")
    stop_at_eos: bool | None = option(None, "End a row at end-of-text; default: in conversations only.")
    batch: int = option(1, "Prompts decoded side by side.")
    prompt_tokens: int = option(0, "Cut prompts to this many tokens; 0: do not cut.")
    context: int = option(
        0, "Put earlier text of the suite before each prompt until it has this many tokens; 0: no padding."
    )
    chat: bool = option(True, "Apply the tokenizer's chat template to conversations.")
    limit: int = option(
        32, "Prompts measured in each category; with greedy decoding, only those whose output does not loop."
    )
    looping: int = option(16, "Prompts in each category whose greedy output loops; they are reported separately.")
    repeats: int = option(3, "Timed repeats; medians are reported.")
    options: MethodOptions = field(default_factory=MethodOptions)
    watch: int = option(4, "Prompts in each category for which the drafts' probabilities are recorded, untimed.")
    watch_depth: int = option(8, "Tokens drafted from each position of those prompts.")

    def __post_init__(self) -> None:
        """Refuse what cannot be run.

        Raises:
            InputError: a count that is too small.
        """
        least_of = {"batch": 1, "repeats": 1, "max_new_tokens": 2, "limit": 1, "watch_depth": 1}
        for name, least in (least_of | dict.fromkeys(("watch", "looping", "prompt_tokens", "context"), 0)).items():
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, not {getattr(self, name)}")

    def params(self, prompt: str, chat: bool = False) -> SamplingParams:
        """How the prompt of this id is decoded; `chat`: a chat template was applied to it."""
        stop = chat if self.stop_at_eos is None else self.stop_at_eos
        return SamplingParams(
            self.temperature,
            seed=self.seed + zlib.crc32(prompt.encode()),
            max_new_tokens=self.max_new_tokens,
            ignore_eos=not stop,
            sampling=self.sampling,
        )

    @classmethod
    def of_record(cls, recorded: Mapping[str, Any]) -> Settings:
        """The settings that a run folder holds."""
        return TypeAdapter(cls).validate_python(recorded)
