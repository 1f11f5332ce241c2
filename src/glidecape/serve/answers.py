"""From a request's jobs to the body of its answer: whole, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from pydantic import BaseModel
from starlette.requests import Request as HttpRequest
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .choice import Choice, Entry, usage_of
from .errors import ApiError
from .job import Job, Update
from .replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChunkChoice,
    Completion,
    CompletionChoice,
    Delta,
    Reply,
    Usage,
)
from .service import Service

TOLD = ("token_ids", "prompt_token_ids")
# What is left out of an answer whose client asked for no token ids.
IDS: Any = {"prompt_token_ids": True, "choices": {"__all__": set(TOLD)}}


class Form(Protocol):
    """How one of the two interfaces writes answers."""

    def whole(self, reply: Reply, choices: list[tuple[Choice, list[Entry]]], usage: Usage) -> BaseModel:
        """The whole answer."""

    def opening(self, choice: Choice) -> BaseModel | None:
        """The first chunk of a choice, before any text."""

    def piece(self, choice: Choice, new: str, entries: list[Entry], last: bool) -> list[BaseModel]:
        """The chunks of an update."""

    def chunk(self, reply: Reply, choices: list[Any], usage: Usage | None, prompt: list[int] | None) -> BaseModel:
        """An event of the stream; `prompt`: token ids that it tells."""


class ChatForm:
    def whole(self, reply: Reply, choices: list[tuple[Choice, list[Entry]]], usage: Usage) -> BaseModel:
        made = [
            ChatChoice(
                index=one.job.number,
                message=AssistantMessage(content=one.text),
                logprobs=one.chat_logprobs(entries),
                finish_reason=one.finish or "length",
                token_ids=one.told_ids(),
            )
            for one, entries in choices
        ]
        prompt = choices[0][0].told_prompt()
        return ChatCompletion(**reply.model_dump(), choices=made, usage=usage, prompt_token_ids=prompt)

    def opening(self, choice: Choice) -> BaseModel | None:
        return ChunkChoice(index=choice.job.number, delta=Delta(role="assistant", content=""))

    def piece(self, choice: Choice, new: str, entries: list[Entry], last: bool) -> list[BaseModel]:
        number, made = choice.job.number, []
        if new or entries or choice.untold:
            logprobs, ids = choice.chat_logprobs(entries), choice.told_ids()
            made.append(ChunkChoice(index=number, delta=Delta(content=new), logprobs=logprobs, token_ids=ids))
        if last:
            made.append(ChunkChoice(index=number, delta=Delta(), finish_reason=choice.finish))
        return list(made)

    def chunk(self, reply: Reply, choices: list[Any], usage: Usage | None, prompt: list[int] | None) -> BaseModel:
        return ChatChunk(**reply.model_dump(), choices=choices, usage=usage, prompt_token_ids=prompt)


class CompletionForm:
    def whole(self, reply: Reply, choices: list[tuple[Choice, list[Entry]]], usage: Usage) -> BaseModel:
        made = [
            CompletionChoice(
                index=one.job.number,
                text=one.text,
                logprobs=one.completion_logprobs(entries, 0),
                finish_reason=one.finish,
                token_ids=one.told_ids(),
                prompt_token_ids=one.told_prompt(),
            )
            for one, entries in choices
        ]
        return Completion(**reply.model_dump(), choices=made, usage=usage)

    def opening(self, choice: Choice) -> BaseModel | None:
        return None

    def piece(self, choice: Choice, new: str, entries: list[Entry], last: bool) -> list[BaseModel]:
        if not (new or entries or choice.untold or last):
            return []
        logprobs = choice.completion_logprobs(entries, len(choice.text) - len(new)) if entries else None
        return [
            CompletionChoice(
                index=choice.job.number,
                text=new,
                logprobs=logprobs,
                finish_reason=choice.finish if last else None,
                token_ids=choice.told_ids(),
                prompt_token_ids=choice.told_prompt(),
            )
        ]

    def chunk(self, reply: Reply, choices: list[Any], usage: Usage | None, prompt: list[int] | None) -> BaseModel:
        return Completion(**reply.model_dump(), choices=choices, usage=usage)


async def whole_answer(
    http: HttpRequest, service: Service, form: Form, reply: Reply, jobs: list[Job], prompts: int, with_ids: bool
) -> str | None:
    """The answer as JSON when all jobs have ended; None where the client went away before.

    Raises:
        ApiError: one of the jobs failed, or there is no room.
    """
    choices = [Choice(job, service.target.tokenizer, with_ids) for job in jobs]
    entries: list[list[Entry]] = [[] for _ in jobs]

    async def collect(updates: asyncio.Queue[Update]) -> None:
        open_jobs = len(jobs)
        while open_jobs:
            job, item = await updates.get()
            if isinstance(item, ApiError):
                raise item
            entries[job.number] += choices[job.number].push(item)[1]
            open_jobs -= item.finish is not None

    service.worker.submit(jobs)
    work = asyncio.ensure_future(collect(jobs[0].updates))
    gone = asyncio.ensure_future(_disconnect(http))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return None
        work.result()
    finally:
        work.cancel()
        gone.cancel()
        service.worker.abort(jobs)  # of jobs that have ended this does nothing
    made = list(zip(choices, entries, strict=True))
    # On another thread: with log-probabilities it is long, and other requests do not wait for it.
    return await asyncio.to_thread(
        lambda: form.whole(reply, made, usage_of(jobs, prompts)).model_dump_json(exclude=None if with_ids else IDS)
    )


async def _disconnect(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """The answer as a stream of server-sent events; jobs that have not ended when it ends, for whatever reason, are aborted.

    Raises:
        ApiError: there is no room for the jobs.
    """

    def __init__(self, service: Service, jobs: list[Job], events: AsyncIterator[str]) -> None:
        service.worker.submit(jobs)
        self.service, self.jobs = service, jobs
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.service.worker.abort(self.jobs)


async def stream_events(
    tokenizer: Any, form: Form, reply: Reply, jobs: list[Job], prompts: int, with_usage: bool, with_ids: bool
) -> AsyncIterator[str]:
    """The events of the stream; an error is the last one."""
    choices, open_jobs, updates = [Choice(job, tokenizer, with_ids) for job in jobs], len(jobs), jobs[0].updates

    def event(made: list[Any], usage: Usage | None = None, prompt: list[int] | None = None) -> str:
        body = form.chunk(reply, made, usage, prompt).model_dump(exclude_unset=False)
        if not with_usage:
            del body["usage"]
        return f"data: {json.dumps(_without_nothing(body))}\n\n"

    # The openings come with the first tokens: as long as nothing was sent, another replica can answer (replicas/front.py).
    openings = [(first, one) for one in choices if (first := form.opening(one)) is not None]
    while open_jobs:
        job, item = await updates.get()
        if isinstance(item, ApiError):
            yield item.event
            return
        while openings:
            first, one = openings.pop(0)
            yield event([first], prompt=one.told_prompt())
        ended = item.finish is not None
        open_jobs -= ended
        choice = choices[job.number]
        for made in form.piece(choice, *choice.push(item), ended):
            yield event([made])
    if with_usage:
        yield event([], usage_of(jobs, prompts))
    yield "data: [DONE]\n\n"


def _without_nothing(body: dict[str, Any]) -> dict[str, Any]:
    """A chunk whose deltas name only what changes, with the token ids that it has."""
    for part in (body, *body["choices"]):
        for name in TOLD:
            if part.get(name, 0) is None:
                del part[name]
    for choice in body["choices"]:
        if "delta" in choice:
            choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
    return body


FORMS: dict[str, Callable[[], Form]] = {"chatcmpl": ChatForm, "cmpl": CompletionForm}
