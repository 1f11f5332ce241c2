"""`glidecape regenerate`: training data in the target's own words."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..drafting.options import MethodOptions
from ..errors import InputError
from ..files import only_writer
from ..progress import note
from .effects import refuse_local, refuse_unused, typed
from .shared import ApiKey, Draft, ServingMachine, TargetName, command_line, kind_of, resumable

if TYPE_CHECKING:
    from ..train.endpoint import DescribedTarget, Endpoint

EndpointUrl = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        help="Let a server continue them, such as http://127.0.0.1:8000/v1; MODEL gives the tokenizer alone.",
    ),
]
ModelName = Annotated[str | None, typer.Option(help="With --endpoint: the model's name there; default: its first one.")]


def regenerate(
    ctx: typer.Context,
    target: TargetName,
    data: Annotated[Path, typer.Option(help="As for train: documents are cut, prompts and messages are continued.")],
    out: Annotated[
        Path,
        typer.Option("--output", "-o", help="The .jsonl file to write, for train --data; an interrupted run resumes."),
    ],
    draft: Draft = None,
    method: Annotated[str, typer.Option(help="As in generate; default: a chain if there is a draft, else plain.")] = "",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a document that serve as its prompt.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to emit for each row.")] = 192,
    temperature: Annotated[
        float, typer.Option(help="Sampling temperature; 0: greedy, where small targets often loop.")
    ] = 1.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the fewest tokens that together have this probability; 1: all.")
    ] = 1.0,
    limit: Annotated[int, typer.Option(min=0, help="Most rows to make; 0: one for each row of the data.")] = 0,
    seed: Annotated[int, typer.Option(help="Row i uses seed + i.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Rows decoded side by side.")] = 16,
    endpoint: EndpointUrl = None,
    model_name: ModelName = None,
    api_key: ApiKey = None,
    concurrency: Annotated[int, typer.Option(min=1, help="With --endpoint: requests at a time.")] = 16,
    options: MethodOptions = MethodOptions(),
    machine: ServingMachine = ServingMachine(dtype="float32"),
) -> None:
    """Let the target continue the prompts of a corpus, and write its text as data to train a draft on.

    A draft makes it faster; the file is the same without.
    """
    from ..drafting.methods import make_drafter, method_for, parse_method
    from ..interface.load import fitting_draft
    from ..sources import check_exists
    from ..train.regenerate import Regeneration, regenerate_by
    from ..train.regenerate import regenerate as run

    if out.suffix != ".jsonl":
        raise InputError(f"--output takes a .jsonl file, not {out}")
    plan = Regeneration(prompt_tokens, max_new_tokens, temperature, top_p, seed, limit)
    if endpoint is not None:
        refuse_local(ctx, "--endpoint", ("revision", "trust_remote_code"))
        check_exists(data)
        with only_writer(out, folder=False), resumable(out):
            known, there = _of_server(target, endpoint, model_name, api_key, machine)
            regenerate_by(there, known, data, out, plan, concurrency, command_line())
        return
    _refuse_for_a_server(ctx)
    method = method or ("plain" if draft is None else method_for("usual", kind_of(draft)))
    parse_method(method)
    refuse_unused(ctx, [method])
    check_exists(data)
    with only_writer(out, folder=False):  # asked before the model is loaded, too
        model = machine.load(target)
        drafter = make_drafter(method, fitting_draft(draft, method, model), options)
        machine.compile_models(model, [drafter], (limit or 10**9) * max_new_tokens)
        with resumable(out):
            run(model, data, out, plan, drafter, batch, command_line())


def _refuse_for_a_server(ctx: typer.Context) -> None:
    """Refuse options that say how a server is asked.

    Raises:
        InputError: one was typed.
    """
    for name in ("model_name", "api_key", "concurrency"):
        if typed(ctx, name):
            raise InputError(f"--{name.replace('_', '-')} is for a server: name it with --endpoint, or leave it out")


def _of_server(
    target: str, url: str, model: str | None, key: str | None, machine: ServingMachine
) -> tuple[DescribedTarget, Endpoint]:
    """What is known of the target here, and the server that runs it."""
    from ..asking import Server
    from ..train.endpoint import DescribedTarget, Endpoint

    server = Server(url, key, "--endpoint")
    known = DescribedTarget.of(target, revision=machine.revision, trust_remote_code=machine.trust_remote_code)
    there = Endpoint(server, model, known.tokenizer)
    note(f"{there.model} at {server.url}")
    return known, there
