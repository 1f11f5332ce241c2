"""`glidecape serve`: an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from ..drafting.options import MethodOptions
from ..errors import InputError
from ..progress import note
from ..serve.settings import ServeSettings
from .effects import refuse_unused
from .shared import Draft, ServingMachine, TargetOrShipped, choose

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    ctx: typer.Context,
    target: TargetOrShipped = None,
    draft: Draft = None,
    method: Annotated[
        str, typer.Option(help="As for generate; usual: what suits the draft, or plain without one.")
    ] = "usual",
    settings: ServeSettings = ServeSettings(),
    options: MethodOptions = MethodOptions(),
    machine: ServingMachine = ServingMachine(),
) -> None:
    """Serve a model: OpenAI's chat and completions interface, batched, with metrics (docs/serving.md)."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise InputError(f"the server needs {', '.join(missing)}: pip install 'glidecape[serve]'")
    from ..serve.server import bind
    from ..serve.server import serve as run

    named, (target, draft, method) = method, choose(target, draft, method)
    if named == "usual" and draft is None:
        method = "plain"  # copying is for those who know that their prompts repeat
        note("no draft is named: decoding is plain; --draft makes it faster, and --method lookup needs none")
    refuse_unused(ctx, [method])
    listening = bind(settings)  # a port that is in use is an error before the model is loaded
    lm = machine.load_pair(target, draft, method, options)
    machine.compile_models(lm.target, [lm.drafter], tokens=0)  # auto: a start is to take seconds
    name = settings.model_name or (Path(target).resolve().name if Path(target).exists() else target)
    run(lm.target, lm.drafter, settings, name, method, listening)
