"""`glidecape serve`: an OpenAI-compatible server."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from ..drafting.options import MethodOptions
from ..errors import InputError
from ..serve.settings import ServeSettings
from .effects import refuse_unused
from .flatten import flattened
from .shared import Draft, ServingMachine, base_of, load_fitting_draft

NEEDED = ("fastapi", "uvicorn", "prometheus_client")


@flattened
def serve(
    ctx: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Model folder or Hub name; default: the pair shipped in the checkout.")
    ] = None,
    draft: Draft = None,
    method: Annotated[
        str | None, typer.Option(help="As for generate; default: what the draft is for, plain without a draft.")
    ] = None,
    settings: ServeSettings = ServeSettings(),
    options: MethodOptions = MethodOptions(),
    machine: ServingMachine = ServingMachine(),
) -> None:
    """Serve a model: OpenAI's chat and completions interface, batched, with metrics (docs/serving.md)."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise InputError(f"the server needs {', '.join(missing)}: pip install 'glidecape[serve]'")
    from ..demo import shipped_pair
    from ..drafting.methods import make_drafter, parse_method
    from ..serve.server import serve as run

    if model is None:
        target, own = map(str, shipped_pair())
        draft = draft or own
    else:
        target = model
    method = method or ("plain" if draft is None else base_of(draft))
    base, _ = parse_method(method)
    refuse_unused(ctx, [method])
    loaded_target = machine.load(target)
    loaded = load_fitting_draft(draft, base, loaded_target)
    drafter = make_drafter(method, loaded, options)
    machine.compile_models(loaded_target, [drafter], tokens=0, noisy=True)  # auto: a start is to take seconds
    name = settings.model_name or (Path(target).resolve().name if Path(target).exists() else target)
    run(loaded_target, drafter, settings, name, method)
