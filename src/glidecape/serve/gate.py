"""`Gate`: what every request passes first: an id, the key, the size of its body."""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from .errors import ApiError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Any, Receive, Send], Awaitable[None]]

# These need no key: a browser sends none when it opens a page.
OPEN = ("/health", "/", "/playground/style.css", "/playground/script.js", "/playground/rounds.js")
UPLOAD = 60.0  # seconds that a body may take to come
SANE_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,64}")


class Gate:
    """An ASGI application around another one.

    Args:
        keys: one of them must come as bearer token; none: everybody may come in.
        max_body: bytes of a request's body.
        rejected: is told the status of each request that is refused here.
    """

    def __init__(self, app: App, keys: Sequence[str], max_body: int, rejected: Callable[[int], None]) -> None:
        self.app, self.keys, self.max_body, self.rejected = app, [key.encode() for key in keys], max_body, rejected

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given if SANE_ID.fullmatch(given) else secrets.token_hex(12).encode()
        scope.setdefault("state", {})["request_id"] = name.decode()
        body = _Body(receive, self.max_body)
        state = "open"

        async def refuse(error: ApiError) -> None:
            nonlocal state
            state = "closed"
            self.rejected(error.status)
            answer = _start(error)
            answer["headers"].append((b"x-request-id", name))
            await send(answer)
            await send({"type": "http.response.body", "body": error.reply.model_dump_json().encode()})

        async def sent(message: Message) -> None:
            nonlocal state
            if state == "open" and body.error is not None:  # whatever the application made of it
                await refuse(body.error)
            elif message["type"] == "http.response.start" and state == "open":
                state = "started"
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name)]
            if state != "closed":
                await send(message)

        try:
            scope["state"]["client"] = self._let_in(scope["path"], headers)
        except ApiError as error:
            return await refuse(error)
        await self.app(scope, body.receive, sent)

    def _let_in(self, path: str, headers: dict[bytes, bytes]) -> int:
        """The number of the key that came; 0 where none is asked for."""
        client = 0
        if self.keys and path not in OPEN:
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            # All are compared, each in constant time: how long it takes says nothing.
            right = [hmac.compare_digest(key.strip(), one) for one in self.keys]
            if kind.lower() != b"bearer" or not any(right):
                raise ApiError(401, "no valid API key: send it as 'Authorization: Bearer KEY'", code="invalid_api_key")
            client = right.index(True)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.max_body:
            raise _too_large(int(length), self.max_body)
        return client


def _too_large(size: int, most: int) -> ApiError:
    return ApiError(413, f"the body has {size} bytes, and at most {most} are taken", code="body_too_large")


class _Body:
    """A request's body, of which hardly more than `most` bytes are read, for as long as `UPLOAD` seconds."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive, self.most, self.size = receive, most, 0
        # None: all has come, and the next message is that the client left.
        self._until: float | None = time.monotonic() + UPLOAD
        self.error: ApiError | None = None

    async def receive(self) -> Message:
        try:
            async with asyncio.timeout(None if self._until is None else max(0.0, self._until - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            self.error = ApiError(408, f"the body did not come within {UPLOAD:g} seconds", code="timeout")
            raise self.error from None
        if not message.get("more_body"):
            self._until = None
        self.size += len(message.get("body", b""))
        if self.size > self.most:
            self.error = _too_large(self.size, self.most)
            raise self.error
        return message


async def read_body(receive: Receive, most: int) -> bytes:
    """A request's whole body.

    Raises:
        ApiError: it is larger than `most` bytes, or does not come.
    """
    body, whole, more = _Body(receive, most), bytearray(), True
    while more:
        message = await body.receive()
        if message["type"] == "http.disconnect":
            break
        whole += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(whole)


def _start(error: ApiError) -> Message:
    headers = {"Content-Type": "application/json", **error.headers}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return {
        "type": "http.response.start",
        "status": error.status,
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }
