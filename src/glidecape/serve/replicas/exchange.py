"""One HTTP request through an ASGI application that runs in another process: what goes there, and what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from ..gate import App, Message

# What can be sent to another process, and what the application reads.
PARTS = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
Scope = dict[str, Any]


def sendable(scope: Any) -> Scope:
    """The parts of an ASGI scope that another process needs."""
    return {name: scope[name] for name in PARTS if name in scope}


async def exchange(app: App, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
    """The application's messages, all that there are at a time; when nobody reads on, the application is cancelled.

    Args:
        scope: of `sendable`.
        body: the whole body of the request.

    Raises:
        Exception: what the application raises before its answer has ended.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    ended = False
    request: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if request:
            return request.pop()
        await asyncio.Event().wait()  # a client that goes away is told by cancellation
        raise AssertionError

    async def run() -> None:
        try:
            await app(scope | {"asgi": {"version": "3.0", "spec_version": "2.4"}, "state": {}}, receive, messages.put)
        finally:
            messages.put_nowait(None)

    running = asyncio.ensure_future(run())
    try:
        while True:
            batch = [await messages.get()]
            while not messages.empty():
                batch.append(messages.get_nowait())
            if said := [message for message in batch if message is not None]:
                ended = said[-1]["type"] == "http.response.body" and not said[-1].get("more_body")
                yield said
            if batch[-1] is None:
                break
        if not ended:  # an error after the end of the answer was logged where it happened
            await running
    finally:
        running.cancel()
