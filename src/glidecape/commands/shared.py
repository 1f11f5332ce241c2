"""What the commands share: option types, loading a target, reading prompts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, first_line

if TYPE_CHECKING:
    from ..batch.text import Prompt
    from ..target.target import Target

TargetName = Annotated[str, typer.Option("--target", help="Model folder or Hub name of the target.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as stored.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: PyTorch's choice.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")]
Quantize = Annotated[str | None, typer.Option(help="int8: the target's weights in 8 bits, by torchao.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Run model code that comes with the weights.")]


def load_target(
    name: str,
    dtype: str,
    device: str,
    threads: int,
    revision: str | None,
    trust: bool,
    pack: bool = True,
    quantize: str | None = None,
) -> Target:
    import torch
    from transformers.utils import logging

    from ..target.target import Target

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if threads:
        torch.set_num_threads(threads)
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"unknown dtype '{dtype}': choose float32, bfloat16, float16 or auto")
    check_device(device)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    return Target.from_pretrained(name, wanted, device, revision, trust, pack=pack, quantize=quantize)


def check_device(name: str) -> None:
    """Raises InputError for a device that is not there."""
    import torch

    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device '{name}' cannot be used here: {first_line(error)}") from None


def command_line() -> str:
    return " ".join(["glidecape", *sys.argv[1:]])


def parse_bins(text: str) -> tuple[int, ...]:
    from ..drafting.expansions.cape import Cape

    named = {"paper": Cape.PAPER, "small": Cape.SMALL}
    try:
        return named[text] if text in named else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--cape-bins takes 'paper', 'small' or numbers like 7,5,3,1, not '{text}'") from None


def read_prompts(given: list[str] | None, file: Path | None) -> list[Prompt]:
    """The prompts that were given and those of a file; with neither, standard input. A row's own answer is left out.

    Raises:
        InputError: there is none, or an empty one.
        DataError: the file cannot be read.
    """
    from ..batch.text import Prompt

    prompts = [Prompt(text) for text in given or []]
    if file is not None:
        from ..train.data import read_prompts as of_file

        prompts += list(of_file(file))
        if not prompts:
            raise InputError(f"{file} holds no prompt")
    if not prompts:
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError("no prompt: give --prompt, --file, or text on standard input")
        try:
            prompts = [Prompt(sys.stdin.read())]
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8 text ({error})") from None
    for i, prompt in enumerate(prompts):
        if not prompt.text.strip():
            raise InputError(f"prompt {i} is empty: give at least one token to continue")
    return prompts


def base_of(folder: str) -> str:
    """The base of the methods that a draft folder is for, such as "glide" or "vanilla"."""
    from ..drafts.checkpoint import WEIGHTS, read_card, resolve

    path = resolve(folder)
    return read_card(path).kind if (path / WEIGHTS).is_file() else "vanilla"


def named_folders(items: list[str]) -> dict[str, str]:
    """`--draft` options, each NAME=FOLDER or a folder, which is then named by what it holds (`base_of`).

    Raises:
        InputError: two of one name.
    """
    named: dict[str, str] = {}
    for item in items:
        name, _, folder = item.rpartition("=")
        name = name or base_of(folder)
        if name in named:
            raise InputError(f"two drafts named '{name}': give each a name of its own with --draft NAME=FOLDER")
        named[name] = folder
    return named
