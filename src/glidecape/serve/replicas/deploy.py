"""The deployments of Ray Serve, and a run of them from the start of Ray to SIGTERM. This module needs Ray."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import time
from dataclasses import replace
from typing import Any, NoReturn

import ray
from ray import serve
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from ...errors import InputError
from ..logs import LOG, log_json
from ..server import bind
from ..settings import ServeSettings
from .front import Front
from .replica import Recipe, Replica
from .router import PrefixRouter
from .settings import ReplicaSettings, check_gpus, threads_each

NAME = "glidecape"  # of the application
SPARE = 64  # requests that a replica takes beyond its room, to say itself that it is full
PROXY = 20.0  # seconds until Ray's HTTP proxy listens
STORE = 2**28  # bytes for what goes from process to process; Ray's own choice is a third of the memory
COMMON: dict[str, Any] = {
    "graceful_shutdown_wait_loop_s": 0.2,
    "health_check_period_s": 2.0,
    "max_constructor_retry_count": 1,  # a model that cannot be loaded now cannot be loaded again
    "logging_config": LoggingConfig(enable_access_log=False),
}


def application(recipe: Recipe, replicas: int) -> serve.Application:
    """What Ray Serve runs: a `Front`, and `replicas` of `Replica`, with a GPU each where the recipe's device is one.

    Raises:
        InputError: the device names a certain GPU.
    """
    if recipe.device not in ("cpu", "cuda"):
        raise InputError(
            f"--device is cpu or cuda with --ray, not {recipe.device}: each replica gets a device of its own"
        )
    settings = recipe.settings
    common = COMMON | {"graceful_shutdown_timeout_s": settings.drain}
    model = serve.deployment(
        Replica,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": max(1, recipe.threads), "num_gpus": int(recipe.device == "cuda")},
        max_ongoing_requests=settings.max_batch + settings.max_queue + SPARE,
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter,
            request_router_kwargs={"rows": settings.max_batch, "num_fallback_replicas": max(1, replicas - 1)},
        ),
        **common,
    )
    front = serve.deployment(
        Front, num_replicas=1, ray_actor_options={"num_cpus": 0}, max_ongoing_requests=10_000, **common
    )
    return front.bind(model.bind(recipe), settings.max_body)


def run(recipe: Recipe, where: ReplicaSettings) -> None:
    """Serve until SIGTERM or SIGINT. Then answers that are being made may end; what was started here, is ended.

    Raises:
        InputError: the address cannot be had, the replicas do not fit, or see `Replica`.
    """
    log_json()
    settings = recipe.settings
    if where.ray_address is None or not settings.port:
        listening = bind(settings)  # Ray would say it late and long
        settings = replace(settings, port=listening.getsockname()[1])
        listening.close()
    try:
        _start_ray(where, recipe.threads)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _stop)  # Ray has just put its own there
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        threads = threads_each([one.get("CPU", 0) for one in machines], where.replicas, recipe.threads)
        if recipe.device == "cuda":
            check_gpus(sum(one.get("GPU", 0) for one in machines), where.replicas)
        _start_serve(settings)
        made = application(replace(recipe, settings=settings, threads=threads), where.replicas)
        facts: dict[str, Any] = {"url": f"http://{settings.host}:{settings.port}/v1", "model": recipe.name}
        facts |= {"method": recipe.method, "replicas": where.replicas, "threads": threads, "pid": os.getpid()}
        _serve(made, facts, where.ray_address is not None)
    except _Stopped:
        pass
    finally:
        ray.shutdown()  # ends Ray if it was started here, and leaves a cluster that was joined
    LOG.info("stopped")


def _serve(made: serve.Application, facts: dict[str, Any], joined: bool) -> None:
    """Deploy, and serve until `_Stopped`."""
    try:
        _deploy(made)
        LOG.info("serving", extra={"facts": facts})
        while True:
            signal.pause()
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        serve.delete(NAME)  # answers that are being made may end
        if joined and not serve.status().applications:
            serve.shutdown()  # else its proxies would keep the port


class _Stopped(BaseException):
    """The process was told to end."""


def _stop(*_: object) -> NoReturn:
    raise _Stopped


def _start_ray(where: ReplicaSettings, threads: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers about this machine
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    if where.ray_address is not None:
        try:
            ray.init(where.ray_address, **quiet)
        except (ConnectionError, ValueError) as error:
            told = str(error).splitlines()[0]
            raise InputError(
                f"no Ray cluster lets us in at '{where.ray_address}' ({told}): start one with `ray start --head`, and set "
                "RAY_AUTH_MODE=token if it has a token"
            ) from None
        return
    # A replica needs a core by Ray's count, however few there are.
    cores = max(len(os.sched_getaffinity(0)), where.replicas * max(1, threads))
    ray.init("local", num_cpus=cores, include_dashboard=False, object_store_memory=STORE, **quiet)


def _start_serve(settings: ServeSettings) -> None:
    """Start Ray Serve, unless the cluster runs it already.

    Raises:
        InputError: it runs already, and listens elsewhere or has this application.
    """
    serve.start(http_options=HTTPOptions(host=settings.host, port=settings.port))
    if NAME in serve.status().applications:
        raise InputError(f"this Ray cluster serves an application named {NAME} already: end that one first")
    until = time.monotonic() + PROXY
    while True:
        try:
            return socket.create_connection((settings.host, settings.port), timeout=1).close()
        except OSError:
            if time.monotonic() > until:
                raise InputError(
                    f"Ray Serve runs on this cluster already, and not on {settings.host} port {settings.port}: "
                    "give its --host and --port, or end it with `serve shutdown`"
                ) from None
            time.sleep(0.1)


def _deploy(made: serve.Application) -> None:
    """Run the application, and wait until all replicas are ready.

    Raises:
        InputError: with the reason of the replica that could not start.
    """
    try:
        serve.run(made, name=NAME, route_prefix="/")
    except RuntimeError as error:
        told = serve.status().applications[NAME].message
        for deployment in serve.status().applications[NAME].deployments.values():
            told += deployment.message
        own = re.findall(r"glidecape\.errors\.\w+: (.*)", told)
        raise InputError(own[-1] if own else f"the replicas could not start: {error}") from None
