"""The command `glidecape`. Heavy imports happen inside the commands, so that `--help` is instant."""

from __future__ import annotations

import io
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer

from .commands.bench import bench
from .commands.certify import certify
from .commands.data import app as data_app
from .commands.generate import generate
from .commands.measure import app as measure_app
from .commands.plan import plan
from .commands.regenerate import regenerate
from .commands.report import report
from .commands.study import study
from .commands.train import train, train_target
from .errors import GlideCapeError

app = typer.Typer(
    help="Lossless speculative decoding with GliDe, CaPE and SVIP: the target's own output, sooner.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _one in (generate, train, train_target, study, regenerate, plan, certify, bench, report):
    app.command()(_one)  # train_target becomes train-target
app.add_typer(data_app, name="data")
app.add_typer(measure_app, name="measure")


@app.command()
def demo(
    target: Annotated[
        Path | None, typer.Option(help="Model folder; default: the pair shipped in the checkout.")
    ] = None,
    draft: Annotated[Path | None, typer.Option(help="Its GliDe draft.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2)] = 96,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: PyTorch's choice.")] = 0,
    compile: Annotated[
        str,
        typer.Option(
            help="on, off, or auto: by compiled programs if they were compiled before.", envvar="GLIDECAPE_COMPILE"
        ),
    ] = "auto",
) -> None:
    """Plain decoding and GlideCape side by side on the shipped model: same tokens, less time."""
    from .demo import run_demo

    if not run_demo(target, draft, max_new_tokens, threads, compile):
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("glidecape"))
        raise typer.Exit


def main() -> None:
    """Entry point: errors meant for users become one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that has not the letter shows a question mark
    warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
    try:
        app()
    except GlideCapeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        # torch says so in words only; importing it to ask for its exception would make every --help wait.
        told = "out of memory" in str(error) or "allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not told:
            raise
        print("error: out of memory: lower the batch, the window, --rows or max_new_tokens", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
