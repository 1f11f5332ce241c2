"""`glidecape chat`: talk to a local pair or to a server in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..core.params import SamplingParams
from ..drafting.options import MethodOptions
from ..errors import InputError
from ..progress import note
from .effects import names_options, note_unused, refuse_local, refuse_unused, typed
from .shared import ApiKey, Draft, ServingMachine, TargetOrShipped, choose

if TYPE_CHECKING:
    from ..chat.session import Model

TOKENS = 512  # of an answer


def chat(
    ctx: typer.Context,
    target: TargetOrShipped = None,
    draft: Draft = None,
    method: Annotated[str, typer.Option(help="As for generate.")] = "usual",
    url: Annotated[
        str | None,
        typer.Option(help="Talk to a server, such as http://127.0.0.1:8000/v1; MODEL is then its name there."),
    ] = None,
    api_key: ApiKey = None,
    system: Annotated[str, typer.Option(help="A first turn that tells the model how to answer.")] = "",
    params: SamplingParams = SamplingParams(max_new_tokens=TOKENS),
    options: MethodOptions = MethodOptions(),
    machine: ServingMachine = ServingMachine(),
) -> None:
    """Talk to a model: a local pair, or a server. /help lists what can be typed."""
    from ..chat.session import Session

    model: Model
    if url is not None:
        from ..chat.remote import RemoteModel

        refuse_local(ctx, "--url")
        model = RemoteModel(url, target, api_key, params)
        note(f"{model.model} at {model.url}")
    else:
        if typed(ctx, "api_key"):
            raise InputError("--api-key is for a server: name it with --url, or leave the key out")
        model = _local_model(ctx, target, draft, method, params, options, machine)
    Session(model, system).run()


def _local_model(
    ctx: typer.Context,
    target: str | None,
    draft: str | None,
    method: str,
    params: SamplingParams,
    options: MethodOptions,
    machine: ServingMachine,
) -> Model:
    from ..chat.local import LocalModel

    named, (target, draft, method) = method, choose(target, draft, method)
    refuse_unused(ctx, [method])
    note_unused(ctx, [method], params.temperature)
    lm = machine.load_pair(target, draft, method, options)
    lm = machine.prepared(lm, tokens=0, may_choose=named == "usual" and not names_options(ctx))
    if not getattr(lm.target.tokenizer, "chat_template", None):
        note(
            "this model has no chat template: it continues lines of User: and Assistant:, and --stop User: ends an answer"
        )
    return LocalModel(lm, params)
