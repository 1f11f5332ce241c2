"""What a benchmark run is: everything that its records depend on."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from ..core.sampling import NOISE, SamplingParams
from ..drafting.expansions.cape import Cape
from ..errors import InputError


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
        draft_length, bins, threshold, cap, over, beams, ngram, top, total: of the methods, see `make_drafter`.
        watch: of each category, prompts on which every draft's law is written down, untimed.
        watch_depth: depths that the draft then runs from each token.
    """

    temperature: float = 0.0
    sampling: str = NOISE
    seed: int = 11
    max_new_tokens: int = 128
    stop_at_eos: bool | None = None
    batch: int = 1
    prompt_tokens: int = 0
    context: int = 0
    chat: bool = True
    limit: int = 32
    looping: int = 16
    repeats: int = 3
    draft_length: int = 5
    bins: tuple[int, ...] = Cape.PAPER
    threshold: float = 0.3
    cap: int = 40
    over: str = "best"
    beams: int = 4
    ngram: int = 3
    top: int = 10
    total: int = 60
    watch: int = 4
    watch_depth: int = 8

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
