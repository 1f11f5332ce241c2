"""`ServeSettings`: what `glidecape serve` can be told about the server itself."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import InputError
from ..options import option, tokens_from


@dataclass(frozen=True)
class ServeSettings:
    """How requests are taken and bounded.

    Raises:
        InputError: a value out of range.
    """

    host: str = option("127.0.0.1", "Address to listen on; 0.0.0.0 accepts other machines, too.")
    port: int = option(8000, "Port to listen on; 0: any free one.", least=0)
    model_name: str | None = option(None, "Name that clients ask for; default: the target folder's.")
    max_batch: int = option(16, "Requests decoded together.", least=1)
    max_queue: int = option(64, "Requests that may wait; further ones get status 429.", least=0)
    max_context: int = option(
        4096, "Most tokens of a prompt and its answer together; 0: the target's own context.", least=0
    )
    cache_mib: int = option(0, "MiB that keys and values may take; 0: 80 % of what is free.", least=0)
    timeout: float = option(600.0, "Seconds until a request that has not ended gets an error.", least=0)
    drain: float = option(30.0, "Seconds that requests may still take after SIGTERM.", least=0)
    api_key: tuple[str, ...] = option(
        (),
        "Key that clients must send; repeat for several. Other users of this machine can see it here: set the variable.",
        type=list[str] | None,
        read=tokens_from,
        write=list,
        environment="GLIDECAPE_API_KEY",
    )
    max_body: int = option(4 * 2**20, "Most bytes of a request.", least=1)
    prefix_reuse: bool = option(True, "Let a request take the prefix that an earlier one left in the cache.")
    shadow: float = option(0.0, "Share of the requests that are decoded again without drafts, when idle, and compared.")

    def __post_init__(self) -> None:
        if not 0 <= self.shadow <= 1:
            raise InputError(f"--shadow is a share, from 0 to 1, not {self.shadow}")
        if self.port > 65535:
            raise InputError(f"--port is at most 65535, not {self.port}")
        if self.timeout <= 0:
            raise InputError(f"--timeout must be above 0 seconds, not {self.timeout}")
        if not all(self.api_key):
            raise InputError(
                "an API key (--api-key, GLIDECAPE_API_KEY) must not be empty: give one, or leave the option out"
            )
