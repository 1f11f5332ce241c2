"""Answers of a local pair."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from ..batch.row import Emitted, Row, new_row
from ..batch.text import TextStream
from ..core.params import SamplingParams
from ..core.stats import Stats
from ..drafting.methods import parse_method
from ..engine.engine import Engine
from ..errors import InputError
from ..interface.language_model import LanguageModel
from ..serve.prompts import chat_ids
from .figures import Figures, Piece

ROOM = 1024  # tokens of a conversation that room is made for at first


class LocalModel:
    """Answers of a model in this process, each token with its origin. What was read or written before is not read again.

    Attributes:
        origins: that tokens may have.
        figures: of the last answer.
    """

    def __init__(self, lm: LanguageModel, params: SamplingParams) -> None:
        self.lm, self.params, self.figures = lm, params, Figures()
        self._engine: Engine | None = None
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
        shown, row = TextStream(target.tokenizer, params.stop, ids), new_row(0, ids, params, target)
        try:
            with closing(self._rounds(row, stats)) as rounds:
                for event in rounds:
                    for count, (token, origin) in enumerate(zip(event.tokens, event.origins, strict=True), 1):
                        ended = event.finish is not None and count == len(event.tokens)
                        name = self._names.get(origin, origin)
                        self.figures.origins[name] += 1
                        yield Piece(shown.push([token], ended, event.text if ended else None), name)
        finally:
            self.figures.tokens, self.figures.seconds = stats.emitted, stats.total_s
            self.figures.rounds = stats.rounds

    def _rounds(self, row: Row, stats: Stats) -> Generator[Emitted]:
        """What a row emits, round by round; it takes from the engine what is there of the conversation."""
        needed, known = len(row.tokens) + row.params.max_new_tokens, 0 if self._engine is None else self._engine.tokens
        if self._engine is None or known < needed:
            room = min(self.lm.target.context, max(needed, ROOM, 2 * known))
            self._engine = Engine(self.lm.target, self.lm.drafter, 1, room, room)
        engine, row.salt = self._engine, ""
        engine.submit(row)
        try:
            while row.finish is None:
                yield from engine.step(stats)
        except GeneratorExit:  # between two rounds
            engine.abort(row)
            raise
        except BaseException:  # somewhere in a round: nobody knows what is in the cache
            self._engine = None
            raise
