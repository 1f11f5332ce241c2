"""Answers of a server that speaks OpenAI's interface, such as `glidecape serve`."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError

from ..asking import Server, model_in, told
from ..core.params import SamplingParams
from ..errors import InputError, first_line
from .figures import Figures, Piece

# Fields of a request for options that are sent where they are not the usual ones.
FIELDS = {
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "seed": "seed",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "ignore_eos": "ignore_eos",
    "min_new_tokens": "min_tokens",
}


class RemoteModel:
    """Answers of a model behind `url`, such as http://127.0.0.1:8000/v1.

    Args:
        model: its name there; None: the first one that the server has.
        key: sent as bearer token; None: none.

    Attributes:
        origins: none, because a server does not tell a token's.
        figures: of the last answer. A server tells how many tokens were drafted, not by what, and no rounds.

    Raises:
        InputError: there is no such server, it refuses the key, or it has no model.
    """

    origins: tuple[str, ...] = ()

    def __init__(self, url: str, model: str | None, key: str | None, params: SamplingParams) -> None:
        self.server, self.figures = Server(url, key, "--url"), Figures()
        self.url = self.server.url
        self.options = fields_of(params)
        self.model = model or self._first_model()

    def _first_model(self) -> str:
        with self._asked("/models") as reply:
            try:
                listing = json.load(reply)
            except ValueError:
                listing = None
            return model_in(listing, self.url)

    def answer(self, turns: Sequence[dict[str, str]]) -> Iterator[Piece]:
        """The answer to a conversation, in pieces.

        Raises:
            InputError: the server refuses it, fails, or goes away.
        """
        self.figures, began = Figures(), None
        body = {"model": self.model, "messages": list(turns), "stream": True, **self.options}
        with self._asked("/chat/completions", body | {"stream_options": {"include_usage": True}}) as reply:
            for event in _events(reply):
                now = time.monotonic()
                self._count(event.get("usage") or {}, now - (began or now))
                for choice in event.get("choices") or ():
                    if text := choice.get("delta", {}).get("content"):
                        began = began or now
                        yield Piece(text)

    def _count(self, usage: dict[str, Any], seconds: float) -> None:
        tokens = usage.get("completion_tokens")
        if tokens:
            drafted = (usage.get("completion_tokens_details") or {}).get("accepted_prediction_tokens")
            self.figures = Figures(tokens, seconds)
            if drafted:
                self.figures.origins.update(drafted=drafted, bonus=tokens - drafted)

    @contextmanager
    def _asked(self, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        try:
            with self.server.open(path, body) as reply:
                yield reply
        except HTTPError as error:
            with error:
                otherwise = f"{self.url} answers with status {error.code}"
                advice = self.server.advice if error.code == 404 else ""
                raise InputError(told(error.read(), otherwise) + advice) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise InputError(
                f"no answer from {self.url}: {first_line(reason) if isinstance(reason, Exception) else reason}"
            ) from None


def fields_of(params: SamplingParams) -> dict[str, Any]:
    """The fields of a request for options; usual values are left to the server, but for the temperature and the length.

    Raises:
        InputError: an option that no request has.

    >>> fields_of(SamplingParams(temperature=0.7, seed=3, stop="END"))
    {'temperature': 0.7, 'max_tokens': 128, 'seed': 3, 'stop': ['END']}
    """
    usual = SamplingParams()
    if params.sampling != usual.sampling:
        raise InputError("--sampling is the server's own: leave it out with --url")
    found: dict[str, Any] = {"temperature": params.temperature, "max_tokens": params.max_new_tokens}
    found |= {
        theirs: getattr(params, ours)
        for ours, theirs in FIELDS.items()
        if getattr(params, ours) != getattr(usual, ours)
    }
    lists = {
        "stop": list(params.stop),
        "stop_token_ids": list(params.stop_token_ids),
        "logit_bias": {str(token): value for token, value in dict(params.logit_bias).items()},
    }
    return found | {name: value for name, value in lists.items() if value}


def _events(reply: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The events of a stream up to its end.

    Raises:
        InputError: one of them is an error, or the stream is cut off.
    """
    for line in reply:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if not isinstance(event, dict) or "error" in event:
            raise InputError(told(data, "the server failed"))
        yield event
    raise InputError("the server ended the answer half-way")
