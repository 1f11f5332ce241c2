"""The page at `/`, and the one route that only it uses: an answer as the rounds that made it. The route is not stable."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any, Literal

from fastapi import FastAPI, Response
from fastapi.responses import StreamingResponse
from pydantic import Field
from starlette.requests import Request as HttpRequest

from ...batch.row import Emitted, Proposal
from ...batch.text import TextStream
from ...drafting.lookup import LookupDrafter
from ..answers import Stream
from ..choice import usage_of
from ..errors import ApiError
from ..job import Job
from ..prompts import chat_ids, completion_ids
from ..schema import CompletionRequest
from ..service import Service

FILES = {
    "/": ("index.html", "text/html"),
    "/playground/style.css": ("style.css", "text/css"),
    "/playground/script.js": ("script.js", "text/javascript"),
    "/playground/rounds.js": ("rounds.js", "text/javascript"),
}
HEADERS = {
    # Nothing but the page's own files, and requests to this server.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class PlayRequest(CompletionRequest):
    """A completion of one prompt, always streamed."""

    prompt: str = Field(min_length=1)
    n: Literal[1] | None = None
    stream: Literal[True] | None = None
    logprobs: None = None
    chat: bool = Field(False, description="The prompt is a user's turn, to go through the chat template.")
    drafts: bool = Field(True, description="False: plain decoding.")


def add_playground(app: FastAPI, service: Service, streams: dict[int | str, dict[str, Any]]) -> None:
    """Add the page's files and its route; `streams` describes an answer that is a stream."""
    for path, (name, kind) in FILES.items():
        _add_file(app, path, resources.files(__package__).joinpath(name).read_bytes(), kind)

    @app.post("/playground/stream", response_class=StreamingResponse, responses=streams)
    async def playground_stream(http: HttpRequest, body: PlayRequest) -> Response:
        """For the page at `/` alone, and not stable: the answer as the rounds that made it."""
        service.check_model(body.model)
        ids = await service.encode(lambda: _ids(service, body), "prompt", len(body.prompt))
        (job,) = await service.jobs(body, [ids], http)
        job.row.watched, job.row.drafts = True, body.drafts
        return Stream(service, [job], _events(service, job))


def _add_file(app: FastAPI, path: str, content: bytes, kind: str) -> None:
    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)


def _ids(service: Service, body: PlayRequest) -> list[int]:
    if body.chat:
        return chat_ids(service.target, [{"role": "user", "content": body.prompt}])
    return completion_ids(service.target, body.prompt)


async def _events(service: Service, job: Job) -> AsyncIterator[str]:
    """A start, the rounds, and the end or an error."""
    reader, row = _Reader(service, job), job.row
    method = service.method if row.drafts else "plain"
    yield _event("start", model=service.name, method=method, prompt_tokens=row.prompt_length, seed=row.params.seed)
    finish = None
    while finish is None:
        _, item = await job.updates.get()
        if isinstance(item, ApiError):
            yield item.event
            return
        finish = item.finish
        won = None if not service.worker.prices or not row.drafts else round(job.won, 5)
        yield _event("round", at=round(time.monotonic() - job.arrived, 5), won=won, **reader.read(item))
    yield _event("end", finish=finish, usage=usage_of([job]).model_dump())
    yield "data: [DONE]\n\n"


def _event(kind: str, **facts: Any) -> str:
    return f"data: {json.dumps({'type': kind} | facts)}\n\n"


class _Reader:
    """Makes text of a job's rounds, token by token."""

    def __init__(self, service: Service, job: Job) -> None:
        self.tokenizer = service.target.tokenizer
        drafter = service.worker.engine.drafter
        self.copies = isinstance(getattr(drafter, "inner", drafter), LookupDrafter)
        self.text = TextStream(self.tokenizer, job.row.params.stop, job.prompt)

    def read(self, event: Emitted) -> dict[str, Any]:
        """A round's emitted tokens, and its proposal. The text of a token may come with a later one, where it is half a
        character or may begin a stop string."""
        ended, texts = event.finish is not None, [self.text.push([token]) for token in event.tokens[:-1]]
        texts.append(self.text.push(event.tokens[-1:], ended, event.text))
        tokens = [
            {"text": text, "origin": self._named(origin)}
            for text, origin in zip(texts, event.origins or ["bonus"], strict=True)
        ]
        return {"tokens": tokens, "tree": None if event.proposal is None else self._tree(event.proposal)}

    def _tree(self, proposal: Proposal) -> dict[str, Any]:
        origins = ["root"]
        for node, parent in enumerate(proposal.parents[1:], 1):
            origins.append(self._named("chain" if parent not in proposal.parents[1:node] else "sibling"))
        return {
            "texts": [self.tokenizer.decode([token]) for token in proposal.tokens],
            "origins": origins,
            "parents": proposal.parents,
            "probabilities": None if self.copies else [round(one, 4) for one in proposal.probabilities],
            "path": proposal.path,
        }

    def _named(self, origin: str) -> str:
        return "copied" if self.copies and origin == "chain" else origin
