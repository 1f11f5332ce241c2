"""Answers of a local pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..batch.text import TextStream
from ..core.params import SamplingParams
from ..core.stats import Stats
from ..drafting.methods import parse_method
from ..engine.decode import decode
from ..errors import InputError
from ..interface.language_model import LanguageModel
from ..serve.prompts import chat_ids
from .figures import Figures, Piece


class LocalModel:
    """Answers of a model in this process, each token with its origin.

    Attributes:
        origins: that tokens may have.
        figures: of the last answer.
    """

    def __init__(self, lm: LanguageModel, params: SamplingParams) -> None:
        self.lm, self.params, self.figures = lm, params, Figures()
        # What prompt lookup calls its chain are tokens of the text itself.
        self._names = {"chain": "copied"} if parse_method(lm.method)[0] == "lookup" else {}
        self.origins = (*self._names.values(), "bonus") if self._names else ("chain", "sibling", "bonus")

    def answer(self, turns: Sequence[dict[str, str]]) -> Iterator[Piece]:
        """The answer to a conversation, in pieces.

        Raises:
            InputError: the conversation is too long, or the chat template refuses it.
        """
        self.figures, stats = Figures(), Stats()
        target = self.lm.target
        ids = chat_ids(target, turns)
        room = target.context - len(ids)
        if room <= 0:
            raise InputError(
                f"the conversation has {len(ids)} tokens, and the model's context is {target.context}: type /reset to start "
                "a new one"
            )
        params = replace(self.params, max_new_tokens=min(self.params.max_new_tokens, room))
        shown = TextStream(target.tokenizer, params.stop, ids)
        try:
            for event in decode(target, self.lm.drafter, [ids], params, stats):
                for count, (token, origin) in enumerate(zip(event.tokens, event.origins, strict=True), 1):
                    ended = event.finish is not None and count == len(event.tokens)
                    name = self._names.get(origin, origin)
                    self.figures.origins[name] += 1
                    yield Piece(shown.push([token], ended, event.text if ended else None), name)
        finally:
            self.figures.tokens, self.figures.seconds = stats.emitted, stats.total_s
            self.figures.rounds = stats.rounds
