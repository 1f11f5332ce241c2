"""What a replica loads, from the command line's options or, for a Ray cluster that reads a file, from that file's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..drafting.options import MethodOptions
from ..errors import InputError, did_you_mean
from ..options import option_of
from ..progress import note
from ..serve.replicas.settings import ReplicaSettings
from ..serve.settings import ServeSettings
from .shared import ServingMachine, choose

if TYPE_CHECKING:
    from ..interface.language_model import LanguageModel
    from ..serve.replicas.replica import Recipe


def chosen(target: str | None, draft: str | None, method: str, fixed: bool) -> tuple[str, str | None, str]:
    """See `choose`; but the usual method of a server is plain decoding without a draft, and with one measured costs decide
    what is drafted, unless an option of a method is given (`fixed`)."""
    usual = method == "usual"
    target, draft, method = choose(target, draft, "auto" if usual and not fixed else method)
    if usual and draft is None:
        method = "plain"  # copying is for those who know that their prompts repeat
        note("no draft is named: decoding is plain; --draft makes it faster, and --method lookup needs none")
    return target, draft, method


def loaded(
    target: str, draft: str | None, method: str, options: MethodOptions, machine: ServingMachine
) -> LanguageModel:
    """A model with its draft, compiled where programs are there."""
    lm = machine.load_pair(target, draft, method, options)
    machine.compile_models(lm.target, [lm.drafter], tokens=0)  # auto: a start is to take seconds
    return lm


def served_name(target: str, settings: ServeSettings) -> str:
    """The name that clients ask for."""
    return settings.model_name or (Path(target).resolve().name if Path(target).exists() else target)


def recipe_of(
    target: str,
    draft: str | None,
    method: str,
    settings: ServeSettings,
    options: MethodOptions,
    machine: ServingMachine,
) -> Recipe:
    """What each replica is made of; the arguments as those of `loaded`.

    Raises:
        InputError: a device map: Ray gives a replica one device.
    """
    if machine.device_map is not None:
        raise InputError("replicas run on one device each: leave --device-map out with --ray")
    from ..serve.replicas.replica import Recipe

    name, target, draft = served_name(target, settings), _whole(target), None if draft is None else _whole(draft)
    load = partial(loaded, target, draft, method, options, machine)
    return Recipe(load, settings, name, method, machine.threads, machine.device)


def _whole(name: str) -> str:
    """A path from the root, because replicas run in other folders; another name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def application(args: Mapping[str, Any]) -> Any:
    """What Ray Serve runs, for `import_path` in a file of Ray's: see deploy/rayservice.yaml.

    Args:
        args: `target`, `draft`, `method`, `replicas`, and the other options of `glidecape serve` with underscores for dashes.
            Keys come from the variable GLIDECAPE_API_KEY. Address and port are Ray's.

    Raises:
        InputError: an option that is not known, or cannot be used.
    """
    from ..serve.replicas.deploy import application as made

    return made(*read(args))


def read(args: Mapping[str, Any]) -> tuple[Recipe, int]:
    """What each replica is made of, and how many there are to be; see `application`."""
    given = dict(args)
    pair = (given.pop("target", None), given.pop("draft", None), given.pop("method", "usual"))
    replicas = ReplicaSettings(ray=True, replicas=given.pop("replicas", 1)).replicas
    settings, machine = _taken(ServeSettings, given), _taken(ServingMachine, given)
    options = _taken(MethodOptions, given)
    if given:
        known = [one.name for form in (ServeSettings, ServingMachine) for one in fields(form)]
        unknown = next(iter(given))
        raise InputError(f"'{unknown}' is no option of the server: {did_you_mean(unknown, known, 'leave it out')}")
    if keys := os.environ.get("GLIDECAPE_API_KEY", "").split():
        settings = replace(settings, api_key=tuple(keys))
    return recipe_of(*chosen(*pair, options != MethodOptions()), settings, options, machine), replicas


def _taken(form: Any, given: dict[str, Any]) -> Any:
    """An instance of a class of options; those that it knows are taken out of `given`."""
    values = {}
    for one in fields(form):
        how = option_of(one)
        name = one.name if how is None else how.parameter(one.name)
        if how is not None and name in given:
            values[one.name] = how.read(given.pop(name))
    return form(**values)
