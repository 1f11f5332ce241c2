"""`glidecape serve`: an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
from typing import Annotated

import typer

from ..drafting.options import MethodOptions
from ..errors import InputError
from ..serve.replicas.settings import ReplicaSettings
from ..serve.settings import ServeSettings
from .effects import names_options, refuse_unused
from .replicas import chosen, loaded, recipe_of, served_name
from .shared import Draft, ServingMachine, TargetOrShipped

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    ctx: typer.Context,
    target: TargetOrShipped = None,
    draft: Draft = None,
    method: Annotated[
        str, typer.Option(help="As for generate; usual: measured costs decide what is drafted; plain without a draft.")
    ] = "usual",
    settings: ServeSettings = ServeSettings(),
    options: MethodOptions = MethodOptions(),
    machine: ServingMachine = ServingMachine(),
    replicas: ReplicaSettings = ReplicaSettings(),
) -> None:
    """Serve a model: OpenAI's chat and completions interface, batched, with metrics (docs/serving.md)."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise InputError(f"the server needs {', '.join(missing)}: pip install 'glidecape[serve]'")
    if replicas.ray and importlib.util.find_spec("ray") is None:
        raise InputError("--ray needs Ray Serve: pip install 'glidecape[ray]'")
    target, draft, method = chosen(target, draft, method, names_options(ctx))
    refuse_unused(ctx, [method])
    if replicas.ray:
        from ..drafts.checkpoint import resolve
        from ..serve.replicas.deploy import run as run_replicas
        from ..target.loading import local_folder

        local_folder(target, machine.revision)  # a mistyped path is an error before Ray starts
        if draft is not None:
            resolve(draft)
        return run_replicas(recipe_of(target, draft, method, settings, options, machine), replicas)
    from ..serve.server import bind
    from ..serve.server import serve as run

    listening = bind(settings)  # a port that is in use is an error before the model is loaded
    lm = loaded(target, draft, method, options, machine)
    run(lm.target, lm.drafter, settings, served_name(target, settings), method, listening)
