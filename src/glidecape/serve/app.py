"""The HTTP application: routes, errors, and its OpenAPI document."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from .answers import FORMS, Stream, stream_events, whole_answer
from .errors import ApiError, ErrorReply, invalid
from .gate import Gate
from .playground import add_playground
from .prompts import chat_ids, completion_ids
from .replies import ChatCompletion, Completion, ModelCard, ModelList, Version
from .schema import ChatRequest, CompletionRequest, Request
from .service import Service

LOG = logging.getLogger("glidecape.serve")
CLIENT_CLOSED = 499  # nginx's number; nobody reads it
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": text}
    for status, text in (
        (400, "The request is not of the schema, or asks for what is not supported."),
        (401, "No valid API key."),
        (404, "No such model or route."),
        (408, "The request took longer than the server allows."),
        (413, "The body is too large."),
        (429, "There is no room; Retry-After says when to come again."),
        (500, "Decoding failed."),
        (503, "Not enough memory for this request, or the server is shutting down."),
    )
}
STREAMS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


def create_app(service: Service) -> FastAPI:
    """The application of a service; its worker is started and stopped with it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.stop()
        await asyncio.to_thread(service.worker.join, 10)
        service.close()

    app = FastAPI(
        title="GlideCape",
        version=version("glidecape"),
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
    )
    settings = service.settings
    app.add_middleware(
        Gate,
        keys=settings.api_key,
        max_body=settings.max_body,
        rejected=lambda status: service.metrics.rejected(status).inc(),
    )
    _add_errors(app, service)
    _add_answers(app, service)
    _add_state(app, service)
    add_playground(app, service, STREAMS)
    document = app.openapi

    def without_422() -> dict[str, Any]:
        """FastAPI's own document, but for the status that it would answer with and this server does not."""
        made = document()
        for operations in made["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return made

    app.openapi = without_422  # type: ignore[method-assign]
    return app


def _add_errors(app: FastAPI, service: Service) -> None:
    def answer(error: ApiError) -> Response:
        service.metrics.rejected(error.status).inc()
        return JSONResponse(error.reply.model_dump(), error.status, error.headers)

    @app.exception_handler(ApiError)
    async def _known(_: HttpRequest, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def _not_of_the_schema(http: HttpRequest, error: RequestValidationError) -> Response:
        form = ChatRequest if http.url.path.endswith("/chat/completions") else CompletionRequest
        return answer(invalid(error.errors(), form.model_fields))

    @app.exception_handler(HTTPException)
    async def _of_the_router(_: HttpRequest, error: HTTPException) -> Response:
        return answer(ApiError(error.status_code, str(error.detail), headers=error.headers))

    @app.exception_handler(Exception)
    async def _unexpected(http: HttpRequest, error: Exception) -> Response:
        LOG.error("a request failed", exc_info=error, extra={"facts": {"request": http.state.request_id}})
        return answer(ApiError(500, f"the server failed ({type(error).__name__})", code="internal_error"))


def _add_answers(app: FastAPI, service: Service) -> None:
    async def answer(http: HttpRequest, body: Request, kind: str, prompts: list[list[int]]) -> Response:
        form, reply = FORMS[kind](), service.reply(kind, http.state.request_id)
        jobs = await service.jobs(body, prompts, http)
        with_ids = bool(body.return_token_ids)
        if body.stream:
            events = stream_events(
                service.target.tokenizer, form, reply, jobs, len(prompts), body.wants_usage, with_ids
            )
            return Stream(service, jobs, events)
        whole = await whole_answer(http, service, form, reply, jobs, len(prompts), with_ids)
        return Response(status_code=CLIENT_CLOSED) if whole is None else Response(whole, media_type="application/json")

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAMS)
    async def chat_completions(http: HttpRequest, body: ChatRequest) -> Response:
        service.check_model(body.model)
        turns = [message.turn() for message in body.messages]
        size = sum(len(turn["content"]) for turn in turns)
        ids = await service.encode(lambda: chat_ids(service.target, turns), "messages", size)
        return await answer(http, body, "chatcmpl", [ids])

    @app.post("/v1/completions", response_model=Completion, responses=STREAMS)
    async def completions(http: HttpRequest, body: CompletionRequest) -> Response:
        service.check_model(body.model)
        service.worker.check_count(len(body.prompts) * (body.n or 1))  # before any of them is read
        prompts = []
        for one in body.prompts:
            size = len(one) if isinstance(one, str) else 0
            prompts.append(await service.encode(lambda one=one: completion_ids(service.target, one), "prompt", size))  # type: ignore[misc]
        return await answer(http, body, "cmpl", prompts)


def _add_state(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[service.card])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        service.check_model(name)
        return service.card

    @app.get("/health", response_class=Response, responses={200: {"content": None, "description": "The engine runs."}})
    async def health() -> Response:
        return Response(status_code=200 if service.worker.is_alive() else 503)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/version")
    async def version_of_the_server() -> Version:
        return Version(version=version("glidecape"))
