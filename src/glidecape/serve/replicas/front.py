"""`Front`: takes requests from Ray's HTTP proxy and sends each to a replica; to another one where the first is lost in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import RayActorError
from ray.serve.exceptions import RayServeException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from ..errors import ApiError
from ..gate import Message, read_body
from ..logs import LOG, log_json
from .exchange import Scope, sendable
from .gathered import gathered
from .key import routing_key

TRIES = 4  # of a request: one that makes replicas end does not end them all
PAUSE = 0.1  # seconds before the second try, and twice as many before each further one
PATIENCE = 10.0  # seconds that replicas have to say their metrics


class Front:
    """A deployment of Ray Serve that holds no model.

    Args:
        replicas: a handle of Ray Serve to the deployment of `Replica`.
        max_body: bytes of a request's body.
    """

    def __init__(self, replicas: Any, max_body: int) -> None:
        log_json()
        self.replicas, self.max_body = replicas.options(stream=True, method_name="respond"), max_body

    async def __call__(self, http: HttpRequest) -> Response:
        scope = sendable(http.scope)
        try:
            if http.method == "GET" and http.url.path == "/metrics":
                return await self._metrics(scope)
            # One that says itself that it is too large is refused by the replica, which counts it.
            large = int(http.headers.get("content-length", 0)) > self.max_body
            body = b"" if large else await read_body(http.receive, self.max_body)
            return await self._answer(scope, body, routing_key(http.headers, body))
        except ApiError as error:
            return JSONResponse(error.reply.model_dump(), error.status, error.headers)

    async def _answer(self, scope: Scope, body: bytes, key: str) -> Response:
        """The answer of the first replica that gives one. Nobody has seen anything of those that were lost before.

        Raises:
            ApiError: replicas were lost again and again.
        """
        chosen = self.replicas.options(session_id=key) if key else self.replicas
        for number in range(TRIES):
            answer = _Answer(chosen.remote(scope, body))
            try:
                return await answer.begin()
            except RayActorError:
                LOG.warning(
                    "a replica was lost, and a request goes to another one", extra={"facts": {"try": number + 1}}
                )
                await asyncio.sleep(PAUSE * 2**number)
        raise ApiError(503, "the replicas that had this request have ended: send it again", code="replica_lost")

    async def _metrics(self, scope: Scope) -> Response:
        """What all replicas say, or the refusal of one of them.

        Raises:
            ApiError: there is none.
        """
        try:
            asked = self.replicas.broadcast("whole", scope)
            said = await asked.results_async(timeout_s=PATIENCE, return_exceptions=True)
        except (RayServeException, TimeoutError):
            said = []
        answers = [one for one in said if not isinstance(one, BaseException)]
        if not answers:
            raise ApiError(503, "no replica runs at the moment: try again in a few seconds", code="no_replica")
        for _, status, body in answers:
            if status != 200:
                return Response(body, status, media_type="application/json")
        return Response(gathered({name: body.decode() for name, _, body in answers}), media_type=CONTENT_TYPE_LATEST)


class _Answer:
    """A replica's answer as it comes.

    Args:
        batches: lists of ASGI messages; `cancel` ends the request.
    """

    def __init__(self, batches: Any) -> None:
        self.batches = batches
        self.start: Message = {}

    async def begin(self) -> Response:
        """The answer, once something of its body is there.

        Raises:
            RayActorError: the replica was lost before.
        """
        first = b""
        try:
            async for messages in self.batches:
                for message in messages:
                    if message["type"] == "http.response.start":
                        self.start = message
                    first += message.get("body", b"")
                if first:
                    break
        except BaseException:  # the client, too, may have gone
            self.batches.cancel()
            raise
        response = StreamingResponse(self._body(first), self.start["status"])
        # Ray's proxy has set the request's id before, and adds it again.
        response.raw_headers = [one for one in self.start["headers"] if one[0] != b"x-request-id"]
        return response

    async def _body(self, first: bytes) -> AsyncIterator[bytes]:
        """An answer whose replica is lost ends with an error event."""
        try:
            yield first
            async for messages in self.batches:
                yield b"".join(message.get("body", b"") for message in messages)
        except RayActorError:
            LOG.warning("a replica was lost in the middle of an answer")
            told = "the replica that made this answer has ended: send the request again"
            yield ApiError(500, told, code="replica_lost").event.encode()
        finally:
            self.batches.cancel()
