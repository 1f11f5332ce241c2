"""`Job`: one answer that is being made; a request with `n` above 1 has several."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TypeAlias

from ..batch.row import Emitted, Row
from .errors import ApiError

# What the engine thread tells a request about one of its jobs. Tokens carry their origin (chain, sibling, bonus), and a
# round's counts.
Update: TypeAlias = tuple["Job", Emitted | ApiError]


@dataclass(eq=False)
class Job:
    """One row for one request.

    Attributes:
        request: the request's id, for logs.
        number: of this answer within its request.
        updates: the request's queue, of the event loop `loop`.
        deadline: when it is given up, on the clock of `time.monotonic`.
        first, last: when tokens came.
        drafted, accepted: of its tokens.
        won: its share of the seconds that drafts won, or lost.
    """

    request: str
    number: int
    row: Row
    loop: asyncio.AbstractEventLoop
    updates: asyncio.Queue[Update]
    deadline: float
    arrived: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float = 0.0
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    won: float = 0.0

    @property
    def prompt(self) -> list[int]:
        return self.row.tokens[: self.row.prompt_length]

    def facts(self) -> dict[str, object]:
        """What is logged when it has ended."""
        now = time.monotonic()
        return {
            "request": self.request,
            "answer": self.number,
            "finish": self.row.finish,
            "prompt_tokens": self.row.prompt_length,
            "cached_tokens": self.row.reused,
            "tokens": self.row.emitted,
            "rounds": self.rounds,
            "drafted": self.drafted,
            "accepted": self.accepted,
            "won_s": round(self.won, 4),
            "first_token_s": None if self.first is None else round(self.first - self.arrived, 4),
            "total_s": round(now - self.arrived, 4),
        }
