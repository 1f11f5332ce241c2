"""`Service`: all that the routes share: the model, the engine thread, and how a request becomes jobs."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from starlette.requests import Request as HttpRequest

from ..batch.grammar import new_grammar
from ..batch.row import Row, new_row
from ..core.params import SamplingParams
from ..errors import GlideCapeError
from ..target.target import Target
from .constraints import Constraints
from .errors import ApiError, refused
from .job import Job, Update
from .metrics import Metrics
from .replies import ModelCard, Reply
from .schema import Request
from .settings import ServeSettings
from .worker import Worker


@dataclass
class Service:
    """One model that is served.

    Attributes:
        name: of the model, as clients ask for it.
        method: how it decodes, for logs.
    """

    target: Target
    worker: Worker
    metrics: Metrics
    settings: ServeSettings
    name: str
    method: str
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        # One thread: fast tokenizers may not be called by two at once.
        self.encoder = ThreadPoolExecutor(1, "encoder")
        # Another one for constraints, which take long to read: other requests do not wait for it.
        self.reader = ThreadPoolExecutor(1, "constraints")
        self.constraints = Constraints(self.target.tokenizer, self.target.vocab_size)
        self.longest = max(map(len, self.target.tokenizer.get_vocab()))  # characters of a token
        self.numbers = itertools.count()
        self.fingerprint = f"fp_{self.target.weights_digest[:12]}"

    def close(self) -> None:
        """End the threads and the process that it has started."""
        for thread in (self.encoder, self.reader):
            thread.shutdown(wait=False, cancel_futures=True)
        self.constraints.close()

    @property
    def context(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.worker.engine.tokens

    @property
    def card(self) -> ModelCard:
        return ModelCard(id=self.name, created=self.created, max_model_len=self.context)

    def reply(self, kind: str, request_id: str) -> Reply:
        """How the answer to a request begins."""
        return Reply(
            id=f"{kind}-{request_id}", created=int(time.time()), model=self.name, system_fingerprint=self.fingerprint
        )

    async def encode(self, make: Callable[[], list[int]], field: str, size: int = 0) -> list[int]:
        """Token ids, made on the encoder's thread; an error names the field.

        Args:
            size: characters of the text, so that one that cannot fit is not read.

        Raises:
            ApiError: there are none, or too many.
        """
        if size > self.context * self.longest:
            raise self._too_long(f"at least {size // self.longest}", field)
        try:
            ids = await asyncio.get_running_loop().run_in_executor(self.encoder, make)
        except GlideCapeError as error:
            raise refused(error, field) from None
        if len(ids) >= self.context:
            raise self._too_long(str(len(ids)), field)
        return ids

    def _too_long(self, count: str, field: str) -> ApiError:
        return ApiError(
            400,
            f"the prompt has {count} tokens, and this server takes {self.context} tokens, prompt and answer together: shorten "
            "the prompt",
            field,
            "context_length_exceeded",
        )

    def check_model(self, asked: str | None) -> None:
        """Refuse another model's name.

        Raises:
            ApiError: it is not this one.
        """
        if asked not in (None, self.name):
            raise ApiError(
                404, f"the model '{asked}' is not served here: ask for '{self.name}'", "model", "model_not_found"
            )

    async def jobs(self, body: Request, prompts: list[list[int]], http: HttpRequest) -> list[Job]:
        """The jobs of a request, `n` for each prompt, their rows checked.

        Raises:
            ApiError: options that cannot be used, or more tokens than the context holds.
        """
        updates: asyncio.Queue[Update] = asyncio.Queue()
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + self.settings.timeout
        thread = self.encoder if body.constraint_field is None else self.reader
        rows = await loop.run_in_executor(thread, self._rows, body, prompts)
        for row in rows if self.settings.prefix_reuse else ():
            # Prefixes are shared by those who have the same key, and the same salt where they give one.
            row.salt = f"{http.state.client} {body.cache_salt or ''}"
        jobs = enumerate(rows)
        return [Job(http.state.request_id, number, row, loop, updates, deadline) for number, row in jobs]

    def _rows(self, body: Request, prompts: list[list[int]]) -> list[Row]:
        rows: list[Row] = []
        self._check_constraint(body, len(prompts) * (body.n or 1))
        for ids in prompts:
            room = self.context - len(ids)
            asked = body.tokens_asked
            if asked is not None and asked > room:
                raise ApiError(
                    400,
                    f"the prompt has {len(ids)} tokens and {asked} are asked for, and this server takes {self.context} tokens "
                    f"together: ask for {room} at most, or shorten the prompt",
                    "max_tokens",
                    "context_length_exceeded",
                )
            try:
                for params in body.sampling(room if asked is None else asked):
                    rows.append(new_row(next(self.numbers), ids, params, self.target))
            except GlideCapeError as error:
                raise refused(error) from None
        return rows

    def _check_constraint(self, body: Request, answers: int) -> None:
        """Refuse a constraint that cannot be used, by the name of its field."""
        try:
            constraint = body.constraint
            if constraint is not None and importlib.util.find_spec("llguidance") is not None:
                self.constraints.check(constraint, answers)
            new_grammar(SamplingParams(constraint=constraint), (), self.target)
        except GlideCapeError as error:
            raise refused(error, body.constraint_field) from None
