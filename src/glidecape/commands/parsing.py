"""How a command is read: one vocabulary, the names of other programs, options from a file, help with examples."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .. import progress
from ..errors import InputError, did_you_mean
from .flatten import flattened

MODEL = "MODEL"
CLOSED_PIPE = 141  # exit code, as shells have it
# Names that transformers, vLLM, llama.cpp and earlier versions have for an option; MODEL is the positional argument.
ALIASES = {
    MODEL: ("--target", "--model", "-m"),
    "--draft": ("--draft-model", "--assistant-model", "--model-draft", "-md"),
    "--draft-length": ("--num-speculative-tokens", "--num-assistant-tokens", "--draft-max"),
    "--svip-cap": ("--cap",),
    "--svip-threshold": ("--threshold",),
    "--cape-bins": ("--bins",),
    "--max-new-tokens": ("--max-tokens", "--n-predict", "-n"),
    "--min-new-tokens": ("--min-tokens",),
    "--stop-token": ("--stop-token-ids", "--eos-token-id"),
    "--stop": ("--stop-strings",),
    "--temperature": ("--temp",),
    "--repetition-penalty": ("--repeat-penalty",),
    "--dtype": ("--torch-dtype",),
    "--quantize": ("--quantization",),
    "--threads": ("-t",),
    "--output": ("--out", "--output-dir"),
    "--rate": ("--learning-rate", "--lr"),
    "--length": ("--max-length", "--max-seq-length"),
    "--accumulate": ("--gradient-accumulation-steps",),
    "--clip": ("--max-grad-norm",),
    "--batch": ("--batch-size",),
    "--rows": ("--batch-size", "--per-device-train-batch-size"),
}


class Command(TyperCommand):
    """A command that knows the names of other programs, and takes underscores for dashes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self.rewritten(args))

    def rewritten(self, args: list[str]) -> list[str]:
        """The words of the command line with our own names of options, and a model that was an option in front."""
        words, done, models = list(args), [], []
        while words:
            word = words.pop(0)
            if word == "--":
                done += [word, *words]
                break
            if not word.startswith("-") or word == "-":
                done.append(word)
                continue
            name, equals, value = word.partition("=")
            own = self.own_name(name)
            if own == MODEL:
                models += [value] if equals else words[:1]
                words = words if equals else words[1:]
                continue
            done.append(own + equals + value)
            if not equals and self._takes_value(own):  # which may look like an option
                done += words[:1]
                words = words[1:]
        return models[-1:] + done  # the last one counts, as of any option

    def own_name(self, name: str) -> str:
        """Our name of an option of whatever name; of an unknown one, the name itself."""
        known = {flag for one in self.params for flag in (*one.opts, *one.secondary_opts)}
        if name in known:
            return name
        dashed = name.replace("_", "-")
        if dashed in known:
            return dashed
        for own, others in ALIASES.items():
            there = any(one.name == "target" for one in self.params) if own == MODEL else own in known
            if dashed in others and there:
                return own
        return name

    def _takes_value(self, name: str) -> bool:
        return any(name in one.opts and not getattr(one, "is_flag", False) for one in self.params)


def add_to(app: typer.Typer, *examples: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that adds a command to `app`: dataclasses flattened, with --config and --quiet, and with examples below its
    help."""
    shown = "\n\n".join(["[bold]Examples[/]", *(f"  [cyan]{one}[/]" for one in examples)])

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        app.command(cls=Command, epilog=shown)(_with_common_options(flattened(command)))
        return command

    return add


def _with_common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    config = typer.Option(
        "--config",
        help="YAML or JSON file of this command's options; typed options override it, and so do environment variables.",
        callback=_take_config,
        is_eager=True,
        rich_help_panel="Common",
    )
    quiet = typer.Option("--quiet", "-q", help="No notes, bars or figures on standard error.", rich_help_panel="Common")
    added = (
        Parameter("config", Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, config]),
        Parameter("quiet", Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, quiet]),
    )

    @wraps(command)
    def run(config: Path | None = None, quiet: bool = False, **typed: Any) -> Any:
        progress.be_quiet(quiet)
        try:
            result = command(**typed)
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output ended
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(CLOSED_PIPE) from None
        return result

    parameters = [*signature(command).parameters.values(), *added]
    run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _take_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Let the options of a file be those of the command, where none is typed.

    Raises:
        InputError: the file cannot be read, or one of its keys is no option of the command.
    """
    if path is None or ctx.resilient_parsing:
        return path
    command: Any = ctx.command
    params = {one.name: one for one in command.params if one.name != "config"}
    values: dict[str, Any] = {}
    for key, value in _read(path).items():
        own = command.own_name(f"--{key}".replace("_", "-"))
        name = "target" if own == MODEL else next((p.name for p in command.params if own in p.opts), key)
        if name not in params:
            hint = did_you_mean(key, [one.replace("_", "-") for one in params], f"see `{ctx.command_path} --help`")
            raise InputError(f"{path}: '{key}' is no option of {ctx.command_path}: {hint}")
        if name in values:
            raise InputError(f"{path}: '{key}' is given twice, by two of its names")
        if value is not None:
            values[name] = _option_value(path, key, value, params[name])
    ctx.default_map = values
    return path


def _option_value(path: Path, key: str, value: Any, param: Any) -> Any:
    many = isinstance(value, list)
    if isinstance(value, dict) or (many and any(isinstance(one, (dict, list)) for one in value)):
        raise InputError(f"{path}: '{key}' takes a value or a list of values, not {json.dumps(value)[:60]}")
    if param.multiple or param.nargs != 1:
        return [str(one) for one in (value if many else [value])]
    if many:
        return ",".join(map(str, value))  # lists that the command line joins by commas
    return value if isinstance(value, bool) else str(value)


def _read(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8-sig"))  # JSON is YAML, too
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is neither YAML nor JSON ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{path} holds no options: write a line such as `max-new-tokens: 64` for each")
    return found
