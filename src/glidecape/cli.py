"""The command `glidecape`. Heavy imports happen inside the commands, so that `--help` is instant."""

from __future__ import annotations

import io
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from .commands.bench import bench
from .commands.certify import certify
from .commands.chat import chat
from .commands.data import app as data_app
from .commands.doctor import doctor
from .commands.export import export
from .commands.generate import generate
from .commands.measure import app as measure_app
from .commands.parsing import add_to
from .commands.plan import plan
from .commands.publish import publish
from .commands.regenerate import regenerate
from .commands.report import report
from .commands.serve import serve
from .commands.study import study
from .commands.train import train, train_target
from .commands.tune import tune
from .errors import GlideCapeError
from .progress import note

EXIT_CODES = """[bold]Exit codes[/]

  0  done

  1  a method's output is not the target's (certify, demo, bench)

  2  an option, a file or a model cannot be used; one sentence says why and what to do

  3  a fault of GlideCape's own; please report it

  130  interrupted

  141  whoever read the output ended, as `head` does

  143  a training ended by SIGTERM, and saved

[bold]Names[/] of transformers, vLLM and llama.cpp are understood, such as --max-tokens or --assistant-model, with dashes or \
underscores."""

app = typer.Typer(
    help="Lossless speculative decoding with GliDe, CaPE and SVIP: the target's own output, faster.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@add_to(app, "glidecape demo", "glidecape demo path/to/model --draft draft --max-new-tokens 64")
def demo(
    target: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="Model folder; default: the pair shipped in the checkout.")
    ] = None,
    draft: Annotated[Path | None, typer.Option(help="Its GliDe draft.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=2, help="Most tokens of each output.")] = 96,
    threads: Annotated[int, typer.Option(min=0, help="CPU threads; 0: PyTorch's choice.")] = 0,
    compile: Annotated[
        str,
        typer.Option(
            help="Decode with compiled programs: on, off, or auto: those that are there, else race eagerly, then compiled.",
            envvar="GLIDECAPE_COMPILE",
        ),
    ] = "auto",
) -> None:
    """Race plain decoding and GlideCape on the shipped model: same tokens, less time."""
    from .demo import run_demo

    if not run_demo(target, draft, max_new_tokens, threads, compile):
        raise typer.Exit(1)


_PAIR = "path/to/model --draft draft"
_EXAMPLES: dict[Callable[..., Any], tuple[str, str]] = {
    generate: (
        f'glidecape generate {_PAIR} --prompt "Once upon a time"',
        f"glidecape generate {_PAIR} --file prompts.jsonl --temperature 0.8 --max-tokens 64 --json --output answers.jsonl",
    ),
    chat: (
        f"glidecape chat {_PAIR} --temperature 0.7",
        "glidecape chat --url http://127.0.0.1:8000/v1",
    ),
    train: (
        "glidecape train path/to/model --data texts.jsonl --output draft --tokens 4e6",
        "glidecape train path/to/model --data chats.jsonl --output draft --minutes 60 --loss-on completion",
    ),
    train_target: (
        "glidecape train-target --data corpus --output model --tokens 2e7",
        "glidecape train-target --data corpus --output model --minutes 60 --with-draft",
    ),
    study: (
        "glidecape study path/to/model --data texts.jsonl --output study --tokens 1e6 --factor loss",
        "glidecape study path/to/model --data texts.jsonl --output study --tokens 1e6 --row wide=width:2",
    ),
    regenerate: (
        "glidecape regenerate path/to/model --data prompts.jsonl --output own.jsonl",
        f"glidecape regenerate {_PAIR} --data prompts.jsonl --output own.jsonl --limit 1000",
    ),
    plan: (
        "glidecape plan path/to/model",
        "glidecape plan path/to/model --data texts.jsonl --tokens 4e6 --dtype bfloat16",
    ),
    certify: (
        f"glidecape certify {_PAIR}",
        f"glidecape certify {_PAIR} --methods glide+cape,lookup --temperature 1 --prompts prompts.jsonl",
    ),
    doctor: (
        f"glidecape doctor {_PAIR}",
        f"glidecape doctor {_PAIR} --prompts prompts.jsonl --chat --json --output why.json",
    ),
    tune: (
        f"glidecape tune {_PAIR}",
        f"glidecape tune {_PAIR} --again --store --prompts prompts.jsonl",
    ),
    bench: (
        f"glidecape bench {_PAIR} --prompts prompts.jsonl --output run",
        f"glidecape bench {_PAIR} --methods plain,lookup,glide+cape --suite own --limit 8 --temperature 1",
    ),
    serve: (
        "glidecape serve",
        f"glidecape serve {_PAIR} --port 8080 --max-batch 32 --shadow 0.01",
    ),
    publish: (
        "glidecape publish draft me/model-glide --base-model owner/model --license apache-2.0",
        "glidecape publish draft me/model-glide --base-model owner/model --output upload",
    ),
    export: (
        "glidecape export draft exported",
        "glidecape export draft exported --format speculators --base-model owner/model",
    ),
    report: ("glidecape report run", "glidecape report run-greedy run-sampled --output page"),
}
for _command, _shown in _EXAMPLES.items():
    add_to(app, *_shown)(_command)  # train_target becomes train-target
app.add_typer(data_app, name="data")
app.add_typer(measure_app, name="measure")


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the versions of GlideCape, torch and transformers, and exit.")
    ] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        print(", ".join(f"{name} {installed(name)}" for name in ("glidecape", "torch", "transformers")))
        raise typer.Exit


def main() -> None:
    """Entry point: errors meant for users become one sentence and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that has not the letter shows a question mark
    warnings.showwarning = lambda message, *_, **__: note(str(message))
    try:
        app()
    except GlideCapeError as error:
        rank = os.environ.get("RANK", "0")  # of the processes that torchrun started
        print(f"{'' if rank == '0' else f'rank {rank}: '}error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        # torch says so in words only; importing it to ask for its exception would make every --help wait.
        told = "out of memory" in str(error) or "allocate memory" in str(error)
        if isinstance(error, RuntimeError) and not told:
            _own_fault()
        print("error: out of memory: lower the batch, the window, --rows or max_new_tokens", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception:
        _own_fault()


def _own_fault() -> NoReturn:
    """Nothing that a user does should lead here; so the exit code is one that nothing else has."""
    traceback.print_exc()
    print("error: this is a fault of GlideCape: please report it with the lines above", file=sys.stderr)
    sys.exit(3)


if __name__ == "__main__":
    main()
