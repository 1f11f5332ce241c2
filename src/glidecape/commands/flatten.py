"""Commands take dataclasses of options; typer sees the classes' fields, each as an option of its own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from inspect import Parameter
from typing import Annotated, Any, get_type_hints

import typer

from ..options import option_of

PANELS = {
    "SamplingParams": "Sampling",
    "MethodOptions": "Method",
    "Machine": "Machine",
    "ServingMachine": "Machine",
    "DraftRecipe": "Draft and its training",
    "TargetShape": "Model",
    "Windowing": "Windows",
    "Settings": "Run",
    "ReplicaSettings": "Replicas",
    "StudyOptions": "Run",
}  # of options in the help, by their class


def flattened(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with each parameter that is a dataclass replaced by the options of its fields (`options.option`).

    A default of such a parameter is an instance, whose values become the options' defaults. The command is called with an
    instance of the class, made of what was typed; so the class refuses bad values with its own sentences.
    """
    classes: dict[str, tuple[type, Any]] = {}
    parameters: list[Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for name, one in inspect.signature(command).parameters.items():
        if is_dataclass(hints[name]):
            classes[name] = hints[name], None if one.default is Parameter.empty else one.default
            parameters += _parameters(*classes[name])
        else:
            parameters.append(one.replace(annotation=hints[name], kind=Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def run(**typed: Any) -> Any:
        for name, (form, _) in classes.items():
            typed[name] = _instance(form, typed)
        return command(**typed)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _parameters(form: Any, start: Any) -> Iterator[Parameter]:
    """The options of a class; `start` is an instance of it with their defaults, None for the class's own."""
    hints = get_type_hints(form)
    for one in fields(form):
        default = one.default if start is None else getattr(start, one.name)
        if is_dataclass(hints[one.name]):
            yield from _parameters(hints[one.name], None if start is None else default)
        elif (how := option_of(one)) is not None:
            name = how.parameter(one.name)
            # A switch that is off needs no name for off.
            flags = [f"--{name.replace('_', '-')}"] if default is False else []
            shown = typer.Option(
                *flags, help=how.help, min=how.least, envvar=how.environment, rich_help_panel=PANELS.get(form.__name__)
            )
            typed: Any = how.type or hints[one.name]
            annotation = Annotated[typed, shown]
            yield Parameter(name, Parameter.KEYWORD_ONLY, default=how.write(default), annotation=annotation)


def _instance(form: Any, typed: dict[str, Any]) -> Any:
    """An instance of a class, whose options are taken out of what was typed."""
    hints, values = get_type_hints(form), {}
    for one in fields(form):
        if is_dataclass(hints[one.name]):
            values[one.name] = _instance(hints[one.name], typed)
        elif (how := option_of(one)) is not None:
            values[one.name] = how.read(typed.pop(how.parameter(one.name)))
    return form(**values)
