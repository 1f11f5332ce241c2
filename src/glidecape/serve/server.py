"""`serve`: loads nothing, decides how much memory the cache may take, and runs the application until it is told to stop."""

from __future__ import annotations

import os
import signal
import socket

import torch
import uvicorn

from ..core.cache import KVCache
from ..core.params import SamplingParams
from ..costs import ROWS, prices_of
from ..drafting.drafter import Drafter, ModelDrafter
from ..drafting.lookup import LookupDrafter
from ..drafting.priced import PricedDrafter
from ..engine.decode import generate
from ..engine.steady import SteadyEngine
from ..errors import InputError
from ..progress import note
from ..target.target import Target
from .app import create_app
from .logs import LOG, log_json
from .metrics import Metrics
from .service import Service
from .settings import ServeSettings
from .shadow import Shadow
from .worker import Worker

SHARE = 0.8  # of free memory, for keys and values


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where nobody can say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def make_engine(target: Target, drafter: Drafter, settings: ServeSettings) -> SteadyEngine:
    """The engine with its caches.

    Raises:
        InputError: they would take more memory than there is or is allowed.
    """
    limit, free = settings.cache_mib * 2**20, free_bytes(target.device)
    if not limit and free is not None:
        limit = int(SHARE * free)
    tokens = min(settings.max_context or target.context, target.context)
    try:
        engine = SteadyEngine(target, drafter, settings.max_batch, tokens, tokens, limit_bytes=limit or None)
    except InputError as error:
        raise InputError(f"{error}, with --max-batch, --max-context or --cache-mib") from None
    if settings.prefix_reuse and engine.slots > 1:
        for cache in _caches(engine):
            cache.reserve()
    needed = cache_bytes_of(engine)
    if limit and needed > limit:
        raise InputError(
            f"the caches of target and draft need {needed / 2**20:,.0f} MiB, more than the {limit / 2**20:,.0f} MiB allowed: "
            "lower --max-batch or --max-context, or raise --cache-mib"
        )
    return engine


def _caches(engine: SteadyEngine) -> list[KVCache]:
    """Those of target and draft."""
    own: KVCache | None = getattr(engine.batch.draft, "own", None)
    return [engine.batch.cache, *([] if own is None else [own])]


def cache_bytes_of(engine: SteadyEngine) -> int:
    """Bytes of the caches of target and draft."""
    return sum(cache.nbytes for cache in _caches(engine))


def make_service(target: Target, drafter: Drafter, settings: ServeSettings, name: str, method: str) -> Service:
    """The service of a loaded model.

    Raises:
        InputError: the target has no tokenizer, or see `make_engine`.
    """
    if target.tokenizer is None:
        raise InputError("this target has no tokenizer, and a server takes text: put one into its folder")
    engine, metrics = make_engine(target, drafter, settings), Metrics(name)
    shadow = Shadow(target, settings.shadow, metrics)
    worker = Worker(engine, settings.max_batch + settings.max_queue, metrics, shadow)
    return Service(target, worker, metrics, settings, name, method)


def priced(target: Target, drafter: Drafter, settings: ServeSettings) -> Drafter:
    """A drafter that drafts as long as it pays on this machine. Its prices are kept, or measured now; auto has its own."""
    if not isinstance(drafter, ModelDrafter | LookupDrafter):
        return drafter
    made, tokens = PricedDrafter(drafter), min(settings.max_context or target.context, target.context)
    rows = sorted({settings.max_batch, *(count for count in ROWS if count < settings.max_batch)})
    made.set_prices(prices_of(target, made, note, rows=rows, tokens=tokens))
    return made


def ready_service(target: Target, drafter: Drafter, settings: ServeSettings, name: str, method: str) -> Service:
    """The service of a loaded model, which knows its prices and has decoded once; raises as `make_service` does."""
    drafter = priced(target, drafter, settings)
    service = make_service(target, drafter, settings, name, method)
    generate(target, [[0, 0]], drafter, SamplingParams(max_new_tokens=8, ignore_eos=True))  # the first call is slow
    if not getattr(target.tokenizer, "chat_template", None):
        LOG.warning("the tokenizer has no chat template: conversations become lines of 'User:' and 'Assistant:'")
    return service


def bind(settings: ServeSettings) -> socket.socket:
    """A socket that has the address. It does not listen yet, so that clients see when the server is ready.

    Raises:
        InputError: the address cannot be had.
    """
    bound = socket.socket(socket.AF_INET6 if ":" in settings.host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else it is held for a minute after a server's end
        bound.bind((settings.host, settings.port))
    except OSError as error:
        bound.close()
        reason = error.strerror or error
        raise InputError(
            f"cannot listen on {settings.host} port {settings.port} ({reason}): choose another --host or --port"
        ) from None
    return bound


def serve(
    target: Target, drafter: Drafter, settings: ServeSettings, name: str, method: str, listening: socket.socket
) -> None:
    """Serve a model until SIGTERM or SIGINT; then no new request is taken, and those that there are may end.

    Args:
        listening: of `bind`.

    Raises:
        InputError: see `make_service`.
    """
    log_json()
    service = ready_service(target, drafter, settings, name, method)
    port = listening.getsockname()[1]
    facts = {
        "url": f"http://{settings.host}:{port}/v1",
        "model": name,
        "method": method,
        "context": service.context,
        "rows": settings.max_batch,
        "cache_mib": round(cache_bytes_of(service.worker.engine) / 2**20),
        "pid": os.getpid(),
    }
    listening.listen(2048)
    LOG.info("serving", extra={"facts": facts})
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=int(settings.drain) or 1,
        server_header=False,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn raises it again when it has drained; the end is no failure
    uvicorn.Server(config).run(sockets=[listening])
    LOG.info("stopped")
