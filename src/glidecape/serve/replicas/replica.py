"""`Replica`: the whole server in a process that Ray Serve started, without a socket of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import torch

from ...interface.language_model import LanguageModel
from ..app import create_app
from ..gate import Message
from ..logs import log_json
from ..server import ready_service
from ..settings import ServeSettings
from .exchange import Scope, exchange


@dataclass(frozen=True)
class Recipe:
    """What a replica is made of.

    Attributes:
        load: gives the model with its draft; it is called in the replica's process.
        name: of the model, as clients ask for it.
        method: how it decodes.
        threads: CPU threads, and what Ray keeps free; 0: one.
        device: of PyTorch.
    """

    load: Callable[[], LanguageModel]
    settings: ServeSettings
    name: str
    method: str
    threads: int
    device: str


class Replica:
    """A deployment of Ray Serve: the application of the single server (`create_app`), asked by method calls."""

    async def __init__(self, recipe: Recipe) -> None:  # type: ignore[misc]  # Ray awaits it
        log_json()
        torch.set_num_threads(max(1, recipe.threads))  # as many as Ray keeps free for it
        lm = recipe.load()
        self.service = ready_service(lm.target, lm.drafter, recipe.settings, recipe.name, recipe.method)
        self.app = create_app(self.service)
        self._life = self.app.router.lifespan_context(self.app)
        await self._life.__aenter__()

    async def respond(self, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """See `exchange`."""
        async for messages in exchange(self.app, scope, body):
            yield messages

    async def whole(self, scope: Scope) -> tuple[str, int, bytes]:
        """This replica's name, and the status and the body of its answer to a request without a body."""
        from ray.serve import get_replica_context

        said = [message async for batch in exchange(self.app, scope, b"") for message in batch]
        body = b"".join(message.get("body", b"") for message in said)
        return get_replica_context().replica_id.unique_id, said[0]["status"], body

    def check_health(self) -> None:
        """Ray asks this now and then, and starts another replica in the place of one that fails.

        Raises:
            RuntimeError: the engine has ended.
        """
        if not self.service.worker.is_alive():
            raise RuntimeError("the engine thread has ended")
