"""Continuations by a server that speaks OpenAI's interface: several requests at a time, answers in the order of the prompts."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from queue import Empty, SimpleQueue
from time import time
from typing import Any, TypeVar
from urllib.error import HTTPError

from ..asking import Server, model_in, told
from ..core.params import SamplingParams
from ..errors import CheckpointError, InputError, first_line
from ..target.loading import local_folder
from ..target.target import UNLIMITED

Given = TypeVar("Given")
Made = TypeVar("Made")
Answer = tuple[list[int], str]  # token ids, and how it ended: "stop" or "length"
TRIES = 5  # of a request that fails
FIRST_WAIT_S = 1.0  # after a failure; then twice as long each time
BUSY_S = 600.0  # that a request waits in all for a server that says that it is full
AHEAD = 4  # requests begun for each thread while the oldest one is waited for
RETRIED = (408, 425, 500, 502, 503, 504)


@dataclass(frozen=True)
class DescribedTarget:
    """What is known of a target whose weights are elsewhere."""

    tokenizer: Any
    vocab_size: int
    context: int

    @classmethod
    def of(cls, name: str, **options: Any) -> DescribedTarget:
        """The tokenizer and the configuration of a model folder or a Hub model; `options` as transformers takes them.

        Raises:
            CheckpointError: they are not there, or cannot be read.
        """
        from transformers import AutoConfig, AutoTokenizer

        place = str(local_folder(name, options.get("revision")) or name)
        try:
            config = AutoConfig.from_pretrained(place, **options).get_text_config()
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
        except Exception as error:  # whatever a torn folder makes of it
            raise CheckpointError(
                f"{name} has no tokenizer or configuration to be read ({first_line(error)})"
            ) from None
        return cls(tokenizer, config.vocab_size, getattr(config, "max_position_embeddings", None) or UNLIMITED)


class Endpoint:
    """A model of a server, asked for completions of token ids.

    Args:
        model: its name there; None: the first one that the server has.
        tokenizer: encodes what a server says that does not tell token ids.

    Raises:
        InputError: there is no such server, or it has no model.
    """

    def __init__(self, server: Server, model: str | None, tokenizer: Any, first_wait_s: float = FIRST_WAIT_S) -> None:
        self.server, self.tokenizer, self.first_wait_s = server, tokenizer, first_wait_s
        self.tells_ids = True  # until it refuses to
        self.ended = threading.Event()
        self.model = model or model_in(self._asked("/models"), server.url)

    def answers(self, prompts: Iterable[tuple[list[int], SamplingParams]], side_by_side: int) -> Iterator[Answer]:
        """The answer to each prompt, in their order, `side_by_side` requests at a time.

        Raises:
            InputError: the server refuses a request, keeps failing, is full for too long, or answers what cannot be read.
        """
        try:
            yield from in_order(self.answer, prompts, side_by_side)
        finally:
            self.ended.set()

    def answer(self, asked: tuple[list[int], SamplingParams]) -> Answer:
        prompt, params = asked
        body = {"model": self.model, "prompt": prompt, "max_tokens": params.max_new_tokens}
        body |= {"temperature": params.temperature, "top_p": params.top_p, "seed": params.seed}
        reply = None
        if self.tells_ids:
            try:
                reply = self._asked("/completions", body | {"return_token_ids": True})  # vLLM's
            except _RefusedError as refusal:
                if refusal.status not in (400, 422):
                    raise
        if reply is None:  # said once more without that field, whose refusal it may have been
            reply = self._asked("/completions", body)
            self.tells_ids = False
        return self._read(reply)

    def _read(self, reply: Any) -> Answer:
        try:
            choice = reply["choices"][0]
            text, finish, ids = choice["text"], choice["finish_reason"], choice.get("token_ids")
            if finish not in ("stop", "length") or not isinstance(text, str):
                raise ValueError(f"finish_reason {finish}")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise InputError(f"{self.server.url} gives no completion that can be read ({reason})") from None
        if ids:
            return list(ids), finish
        new, end = self.tokenizer.encode(text, add_special_tokens=False), self.tokenizer.eos_token_id
        return new + ([end] if finish == "stop" and end is not None else []), finish

    def _asked(self, path: str, body: Any = None) -> Any:
        """What the server answers, asked again where it fails or is full."""
        failures, wait, waited = 0, self.first_wait_s, 0.0
        while True:
            try:
                with self.server.open(path, body) as reply:
                    return json.load(reply)
            except HTTPError as error:
                with error:
                    reason = told(error.read(), f"status {error.code}")
                if error.code == 429:
                    pause = _retry_after(error.headers.get("Retry-After"), wait)
                    waited += pause
                    if waited > BUSY_S:
                        raise InputError(
                            f"{self.server.url} had no room for a request in {BUSY_S:.0f} seconds ({reason}): lower "
                            "--concurrency"
                        ) from None
                    self._pause(pause)
                    continue
                if error.code not in RETRIED:
                    advice = self.server.advice if error.code == 404 else ""
                    raise _RefusedError(error.code, f"{self.server.url} refuses a request ({reason}){advice}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                cause = getattr(error, "reason", error)
                reason = first_line(cause) if isinstance(cause, Exception) else str(cause)
            failures += 1
            if failures == TRIES:
                raise InputError(
                    f"{self.server.url} failed {TRIES} times ({reason}); give the same command again to go on"
                )
            self._pause(wait)
            wait *= 2

    def _pause(self, seconds: float) -> None:
        if self.ended.wait(seconds):
            raise InputError("nobody waits for this answer any more")


class _RefusedError(InputError):
    """A request is refused, and will be again."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def _retry_after(text: str | None, otherwise: float) -> float:
    """Seconds to wait by a `Retry-After` header, a number of them or a date.

    >>> _retry_after("3", 1.0), _retry_after("Thu, 01 Jan 1970 00:00:00 GMT", 1.0), _retry_after("soon", 1.0)
    (3.0, 0.0, 1.0)
    """
    try:
        return max(0.0, float(text or ""))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(text or "").timestamp() - time())
    except (ValueError, TypeError):
        return otherwise


def in_order(work: Callable[[Given], Made], items: Iterable[Given], side_by_side: int) -> Iterator[Made]:
    """`work` of each item by so many threads, in the order of the items; an error comes in its item's place.

    Few items are begun before the oldest unfinished one is done, so what is kept is bounded. Threads end with the process.
    """
    todo: SimpleQueue[tuple[int, Given] | None] = SimpleQueue()
    done: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()

    def run() -> None:
        while (one := todo.get()) is not None:
            number, item = one
            try:
                done.put((number, work(item), None))
            except BaseException as error:
                done.put((number, None, error))

    for _ in range(side_by_side):
        threading.Thread(target=run, daemon=True).start()
    kept: dict[int, tuple[Any, BaseException | None]] = {}
    left, begun, wanted = iter(items), 0, 0
    try:
        while True:
            while begun < wanted + AHEAD * side_by_side:
                for item in left:
                    todo.put((begun, item))
                    begun += 1
                    break
                else:
                    break
            if wanted == begun:
                return
            while wanted not in kept:
                number, made, error = done.get()
                kept[number] = made, error
            made, error = kept.pop(wanted)
            if error is not None:
                raise error
            yield made
            wanted += 1
    finally:
        _empty(todo)
        for _ in range(side_by_side):
            todo.put(None)


def _empty(queue: SimpleQueue[Any]) -> None:
    try:
        while True:
            queue.get_nowait()
    except Empty:
        pass
