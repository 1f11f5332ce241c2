"""Options that would have no effect: refused where a method does not use them, noted where the sampling does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

import typer

from ..drafting.options import CAPPED, FIXED, LOOKUP, PRICED, SVIP, TREE, MethodOptions
from ..errors import InputError
from ..options import option_of
from ..progress import note
from .shared import ServingMachine

# By parameter: what is to be in a method's name for it to be used.
USES = {how.parameter(one.name): how.needs for one in fields(MethodOptions) if (how := option_of(one)) is not None}
USES["svip_fit"] = SVIP
SAMPLES = ("top_k", "top_p", "min_p", "seed", "sampling")  # used at temperatures above 0 only


def typed(ctx: typer.Context, name: str) -> bool:
    """Did the user give this option, by hand or in a file?"""
    source = ctx.get_parameter_source(name)  # an enumeration of click, which newer versions of typer bring with them
    return source is not None and source.name in ("COMMANDLINE", "DEFAULT_MAP")


def uses_of(method: str) -> set[str]:
    """What of `USES` a method has.

    >>> sorted(uses_of("glide+cape"))
    ['+cape', 'a fixed length']
    """
    from ..drafting.methods import AUTO, form_of, parse_method

    base, added = parse_method(method)
    if base == "plain":
        return set()
    if AUTO in added:
        return {PRICED}
    uses = {LOOKUP} if base == "lookup" else {{"tree": TREE, "static": TREE}.get(form_of(base, added), "")}
    uses |= {f"+{name}" for name in added}
    if {"svip", "heuristic"} & added:
        uses.add(CAPPED)
    if "svip" not in added:
        uses.add(FIXED)
    return uses - {"", "+chain", "+tree", "+static", "+heuristic"}


def refuse_unused(ctx: typer.Context, methods: Iterable[str], also: Iterable[str] = ()) -> None:
    """Refuse options that none of the methods uses; `also` are parts that something else uses.

    Raises:
        InputError: naming the option and the methods that would use it.
    """
    methods = list(methods)
    used = set(also).union(*(uses_of(method) for method in methods))
    for name, need in USES.items():
        if typed(ctx, name) and need not in used:
            option = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{option} has no effect with method {', '.join(methods)}: it needs {need}, so choose such a method or leave "
                f"{option} out"
            )


def refuse_local(ctx: typer.Context, beside: str, read: Iterable[str] = ()) -> None:
    """Raises InputError for an option that says how a local model runs, given beside the option that names a server; those in
    `read` are used nevertheless."""
    local = {"draft", "method", "batch"}
    for form in (MethodOptions, ServingMachine):
        local |= {how.parameter(one.name) for one in fields(form) if (how := option_of(one)) is not None}
    for name in sorted(local - set(read)):
        if typed(ctx, name):
            raise InputError(f"--{name.replace('_', '-')} is for a local model: leave it out with {beside}")


def names_options(ctx: typer.Context) -> bool:
    """Did the user give an option of a method, which says how that one is to draft?"""
    return any(typed(ctx, name) for name in USES)


def need_draft(methods: Iterable[str]) -> bool:
    """Does one of the methods need a draft model?"""
    from ..drafting.methods import DRAFTLESS, parse_method

    return any(parse_method(one)[0] not in DRAFTLESS for one in methods)


def note_unused(ctx: typer.Context, methods: Sequence[str], temperature: float) -> None:
    """Say on standard error that no method needs a draft, and which sampling options greedy decoding leaves unused."""
    if typed(ctx, "draft") and not need_draft(methods):
        note(f"method {', '.join(methods)} needs no draft model, so --draft is not loaded")
    note_greedy(ctx, temperature)


def note_greedy(ctx: typer.Context, temperature: float) -> None:
    """Say on standard error which sampling options greedy decoding leaves unused."""
    unused = [f"--{name.replace('_', '-')}" for name in SAMPLES if temperature == 0 and typed(ctx, name)]
    if unused:
        note(f"{', '.join(unused)}: no effect at temperature 0")
