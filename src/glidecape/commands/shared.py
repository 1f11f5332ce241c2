"""What the commands share: option types, loading a target, reading prompts."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError, first_line
from ..options import option

if TYPE_CHECKING:
    from ..batch.text import Prompt
    from ..core.constraint import Constraint
    from ..drafting.drafter import Drafter
    from ..drafting.methods import AnyDraft
    from ..target.target import Target

TargetName = Annotated[str, typer.Option("--target", help="Model folder or Hub name of the target.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
Draft = Annotated[
    str | None,
    typer.Option("--draft", help="GliDe, EAGLE or Medusa draft, or a draft LM for vanilla: folder or Hub name."),
]


@dataclass(frozen=True)
class Machine:
    """Where a target runs, and how it is loaded."""

    device: str = option("cpu", "cpu, cuda, cuda:1, …")
    dtype: str = option("auto", "float32, bfloat16, float16, or auto: as stored.")
    threads: int = option(0, "CPU threads; 0: PyTorch's choice.", least=0)
    revision: str | None = option(None, "Branch, tag or commit of a Hub model.")
    trust_remote_code: bool = option(False, "Run model code that comes with the weights.")

    def load(self, name: str, pack: bool = True, quantize: str | None = None) -> Target:
        """The target; `pack=False`: to be trained on.

        Raises:
            InputError: an unknown dtype, or a device that is not there.
            CheckpointError, UnsupportedError: see `Target.from_pretrained`.
        """
        import torch
        from transformers.utils import logging

        from ..target.target import Target

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.check()
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise InputError(f"unknown dtype '{self.dtype}': choose float32, bfloat16, float16 or auto")
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        return Target.from_pretrained(
            name, dtype, self.device, self.revision, self.trust_remote_code, pack=pack, quantize=quantize
        )

    def check(self) -> None:
        """Set the threads; refuse a device that is not there.

        Raises:
            InputError: it is not.
        """
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        try:
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device '{self.device}' cannot be used here: {first_line(error)}") from None


WORTH = 20_000  # tokens to decode from which on compiling, a minute or two, is made up for


@dataclass(frozen=True)
class ServingMachine(Machine):
    """Where a target that is only decoded runs: its weights may be quantized, and its forward compiled."""

    quantize: str | None = option(None, "int8: the target's weights in 8 bits, by torchao.")
    compile: str = option(
        "auto",
        "Decode by compiled programs: on, off, or auto: where they were compiled before, or there is enough to decode.",
        environment="GLIDECAPE_COMPILE",
    )

    def __post_init__(self) -> None:
        if self.compile not in ("auto", "on", "off"):
            raise InputError(f"--compile takes auto, on or off, not '{self.compile}'")

    def load(self, name: str, pack: bool = True, quantize: str | None = None) -> Target:
        return super().load(name, pack, quantize or self.quantize)

    def compile_models(
        self, target: Target, drafters: Iterable[Drafter], tokens: float = math.inf, noisy: bool = False
    ) -> None:
        """Compile what decodes, if that was asked for or is worth it for so many tokens; `noisy`: above temperature 0."""
        if self.compile == "off":
            return
        mode = "on" if self.compile == "on" or tokens >= WORTH else "kept"

        def say(text: str) -> None:
            print(f"note: {text}", file=sys.stderr)

        target.compile(mode, say)
        for drafter in drafters:
            drafter.compile(mode, say, noisy)


@dataclass(frozen=True)
class ConstraintOptions:
    """What the text must be; one of them at most."""

    json_object: bool = option(False, "The text is a JSON object.")
    json_schema: Path | None = option(None, "A file with a JSON schema that the text follows.")
    regex: str | None = option(None, "A regular expression that the whole text matches.")

    def read(self) -> Constraint | None:
        """The constraint, if there is one.

        Raises:
            InputError: there are several, or the file cannot be read or holds no schema.
        """
        from ..core.constraint import Constraint

        if sum([self.json_object, self.json_schema is not None, self.regex is not None]) > 1:
            raise InputError("a text has one constraint: use one of --json-object, --json-schema and --regex")
        if self.json_schema is not None:
            try:
                text = self.json_schema.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise InputError(f"the JSON schema {self.json_schema} cannot be read ({error})") from None
            return Constraint.json_schema(text)
        if self.regex is not None:
            return Constraint.regex(self.regex)
        return Constraint.json_object() if self.json_object else None


def command_line() -> str:
    return " ".join(["glidecape", *sys.argv[1:]])


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
    from ..drafting.methods import base_for
    from ..drafts.checkpoint import WEIGHTS, read_card, resolve

    path = resolve(folder)
    return base_for(read_card(path).kind if (path / WEIGHTS).is_file() else "lm")


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


def load_fitting_draft(name: str | None, base: str, target: Target) -> AnyDraft | None:
    """The draft for a method of this base; None where it needs none. Whether it fits, `make_drafter` says.

    Raises:
        CheckpointError, MismatchError: see `load_draft`.
    """
    from ..drafting.methods import DRAFTLESS
    from ..drafts.checkpoint import load_draft

    return None if name is None or base in DRAFTLESS else load_draft(name, target)
