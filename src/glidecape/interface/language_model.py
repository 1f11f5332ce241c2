"""`LanguageModel`: a target with its draft and method, and what can be asked of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Unpack, cast

from ..batch.row import Emitted
from ..batch.text import Prompt, TextStream
from ..compat import free_threads
from ..core.params import SamplingParams
from ..core.stats import Stats
from ..drafting.drafter import Drafter
from ..engine.decode import BATCH, Completion, Completions, engine_of, new_rows
from ..engine.engine import Engine
from ..errors import InputError
from ..target.target import Target
from .options import SamplingOptions, params_of

if TYPE_CHECKING:
    from ..drafts.causal_lm import StandaloneDraft
    from ..drafts.checkpoint import NetworkDraft

Text = str | Sequence[int] | Sequence[Mapping[str, str]]  # text, token ids, or messages with `role` and `content`
# What is awaited is decoded on one thread: each thread that has ever decoded has OpenMP threads of its own (`free_threads`).
DECODING = ThreadPoolExecutor(1, "decoding")


class LanguageModel:
    """A model that is ready to write. `glidecape.load` makes it.

    Calls take the options of `SamplingParams` by name, `max_tokens` for `max_new_tokens`, and transformers'
    `logits_processor` and `stopping_criteria`. What is not given is taken from `params`, and from `SamplingParams` without.

    Several threads, streams and coroutines may use one model: they take turns, round by round. The output of each is the same
    as alone.

    Attributes:
        target: the model.
        draft: its draft; None: there is none.
        method: such as "glide+cape".
        drafter: of that method.

    >>> import glidecape
    >>> lm = glidecape.load("path/to/model", draft="path/to/draft")
    >>> text = lm("def load_table(", temperature=0.8, seed=7, max_tokens=8).text
    >>> "".join(lm.stream("def load_table(", temperature=0.8, seed=7, max_tokens=8)) == text
    True
    >>> len(lm.batch(["def load(", "def save("], n=2, max_tokens=4))
    4
    """

    def __init__(
        self, target: Target, drafter: Drafter, method: str, draft: NetworkDraft | StandaloneDraft | None = None
    ) -> None:
        self.target, self.drafter, self.method, self.draft = target, drafter, method, draft
        self._turn = threading.Lock()

    def __repr__(self) -> str:
        how = "eager" if self.target.compiled is None else "compiled"
        return f"LanguageModel({self.target.summary}, {how}, {self.method}, draft={self.draft!r})"

    def __call__(
        self,
        prompt: Text,
        params: SamplingParams | None = None,
        stats: Stats | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion:
        """Complete one prompt.

        Args:
            prompt: text, token ids, or messages with `role` and `content`, which go through the chat template.
            stats: counts and times are added to it.

        Raises:
            InputError: an unknown option, or a prompt that is empty, too long or no prompt.
            UnsupportedError: a logits processor that keeps a state.
        """
        ids, engine = self._begin([prompt], 1, 1, params, options)
        return self._collected(ids, engine, stats)[0]

    def stream(
        self,
        prompt: Text,
        params: SamplingParams | None = None,
        stats: Stats | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """The text of `lm(prompt)` in pieces, as soon as they are known. Stop iterating, and decoding ends.

        Args, Raises: as in a call.
        """
        (ids,), engine = self._begin([prompt], 1, 1, params, options)
        shown = self._text_stream(ids, engine)
        return self._pieces(engine, shown, stats)

    def batch(
        self,
        prompts: Text | Sequence[Text],
        n: int = 1,
        rows: int = BATCH,
        params: SamplingParams | None = None,
        stats: Stats | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Completion]:
        """Complete any number of prompts, each `n` times: all of the first prompt, then all of the second, and so on.

        Completion i has the seed + i, so at temperature 0 all `n` are equal.

        Args:
            prompts: a list; a single prompt, such as a string, is a list of one.
            rows: most rows that are decoded side by side. Drafts help less the more there are.

        Raises: as in a call.
        """
        if n < 1 or rows < 1:
            raise InputError(f"n and rows must be at least 1, not {n} and {rows}")
        return self._collected(*self._begin(_several(prompts), n, rows, params, options), stats)

    async def agenerate(
        self,
        prompt: Text,
        params: SamplingParams | None = None,
        stats: Stats | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Completion:
        """`lm(prompt)` for coroutines: decoding runs in a thread. Cancelled, it ends after the round that runs."""
        ids, engine = self._begin([prompt], 1, 1, params, options)
        found = Completions(self.target.tokenizer, ids)
        while not engine.idle:
            for event in await self._step_in_thread(engine, stats):
                found.add(event)
        return found.finished()[0]

    async def astream(
        self,
        prompt: Text,
        params: SamplingParams | None = None,
        stats: Stats | None = None,
        **options: Unpack[SamplingOptions],
    ) -> AsyncIterator[str]:
        """`lm.stream(prompt)` for coroutines: decoding runs in a thread. Cancelled, it ends after the round that runs."""
        (ids,), engine = self._begin([prompt], 1, 1, params, options)
        shown = self._text_stream(ids, engine)
        while not engine.idle:
            for event in await self._step_in_thread(engine, stats):
                if piece := shown.push(event.tokens, event.finish is not None, event.text):
                    yield piece

    def ids(self, prompt: Text) -> list[int]:
        """The token ids of a prompt: text, ids, or messages through the tokenizer's chat template.

        Raises:
            InputError: it is no prompt, is empty, or the tokenizer is missing or has no chat template.
        """
        if isinstance(prompt, Sequence) and not isinstance(prompt, str) and all(isinstance(one, int) for one in prompt):
            return list(cast(Sequence[int], prompt))
        if self.target.tokenizer is None:
            raise InputError("this model has no tokenizer: give token ids as the prompt")
        if isinstance(prompt, str):
            return self.target.encode(prompt)
        messages = _checked_messages(prompt)
        if not getattr(self.target.tokenizer, "chat_template", None):
            raise InputError("this model's tokenizer has no chat template: give the prompt as text")
        return Prompt("", messages).ids(self.target, chat=True)

    def _begin(
        self, prompts: Sequence[Text], n: int, rows: int, params: SamplingParams | None, options: SamplingOptions
    ) -> tuple[list[list[int]], Engine]:
        """The token ids of all rows, and an engine for which they wait."""
        chosen = params_of(options, params)
        ids = [each for prompt in prompts for each in [self.ids(prompt)] * n]
        waiting = new_rows(self.target, ids, chosen)
        return ids, engine_of(self.target, self.drafter, waiting, min(rows, len(waiting)))

    def _collected(self, ids: list[list[int]], engine: Engine, stats: Stats | None) -> list[Completion]:
        found = Completions(self.target.tokenizer, ids)
        while not engine.idle:
            for event in self._step(engine, stats):
                found.add(event)
        return found.finished()

    def _text_stream(self, ids: list[int], engine: Engine) -> TextStream:
        if self.target.tokenizer is None:
            raise InputError("this model has no tokenizer, so there is no text to stream: call it, and read .tokens")
        return TextStream(self.target.tokenizer, engine.waiting[0].params.stop, ids)

    def _pieces(self, engine: Engine, shown: TextStream, stats: Stats | None) -> Iterator[str]:
        while not engine.idle:
            for event in self._step(engine, stats):
                if piece := shown.push(event.tokens, event.finish is not None, event.text):
                    yield piece

    def _step(self, engine: Engine, stats: Stats | None) -> list[Emitted]:
        with self._turn:
            return engine.step(stats)

    async def _step_in_thread(self, engine: Engine, stats: Stats | None) -> list[Emitted]:
        free_threads()
        step = asyncio.get_running_loop().run_in_executor(DECODING, self._step, engine, stats)
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            await asyncio.wait([step])  # a round cannot be stopped half-way
            raise


def _several(prompts: Any) -> Sequence[Text]:
    """A list of prompts, of what may be one."""
    if isinstance(prompts, str):
        return [prompts]
    every = list(prompts)
    return [every] if every and isinstance(every[0], (int, Mapping)) else every


def _checked_messages(prompt: Any) -> tuple[dict[str, Any], ...]:
    """Raises InputError where they are no conversation that can be answered."""
    if not isinstance(prompt, Sequence) or not all(isinstance(one, Mapping) for one in prompt):
        raise InputError(
            f"a prompt is text, a list of token ids, or a list of messages with role and content (several prompts: lm.batch), "
            f"not {prompt!r:.80}"
        )
    for one in prompt:
        if not all(isinstance(one.get(name), str) for name in ("role", "content")):
            raise InputError(f"a message needs a role and a content, both text, and this is {dict(one)!r:.80}")
    if prompt[-1]["role"] == "assistant":
        raise InputError("the last message is the assistant's: end with the one to be answered")
    return tuple(dict(one) for one in prompt)
