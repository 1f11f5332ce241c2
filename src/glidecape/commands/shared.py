"""What the commands share: option types, loading a target, reading prompts."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TextIO

import typer

from ..errors import InputError
from ..files import only_writer
from ..options import option
from ..progress import bar, note, on_terminal
from ..train.stopping import Stopped
from .waiting import waiting

if TYPE_CHECKING:
    from ..batch.text import Prompt
    from ..core.constraint import Constraint
    from ..drafting.drafter import Drafter
    from ..drafting.methods import AnyDraft
    from ..drafting.options import MethodOptions
    from ..interface.language_model import LanguageModel
    from ..target.target import Target

TargetName = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or Hub name.")]
TargetOrShipped = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Model folder or Hub name, or a draft that names its model; default: the pair shipped with a checkout.",
    ),
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Write to this file instead of standard output.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
_DRAFT = "GliDe, EAGLE or Medusa draft, or a draft LM for vanilla: folder or Hub name, OWNER/NAME@REVISION to pin one"
ApiKey = Annotated[
    str | None,
    typer.Option(
        help="Key for the server. Other users of this machine can see options: set the variable instead.",
        envvar="GLIDECAPE_API_KEY",
    ),
]
Draft = Annotated[str | None, typer.Option("--draft", help=f"{_DRAFT}.")]
_SEVERAL = typer.Option("--draft", help=f"{_DRAFT}; repeat for several, NAME=FOLDER where two are of one kind.")
Drafts = Annotated[list[str] | None, _SEVERAL]
SomeDrafts = Annotated[list[str], _SEVERAL]  # one at least


MAPS = ("auto", "balanced", "balanced_low_0", "sequential", "cpu")


def device_map_from(typed: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """A device map as transformers takes it.

    Raises:
        InputError: it is none.

    >>> device_map_from('{"model": "cpu", "lm_head": 0}')
    {'model': 'cpu', 'lm_head': 0}
    """
    if typed is None or typed in MAPS:
        return typed
    try:
        found = json.loads(typed) if isinstance(typed, str) else typed
    except ValueError:
        found = None
    if isinstance(found, dict) and found and all(type(where) in (str, int) for where in found.values()):
        return found
    raise InputError(
        f"--device-map takes {', '.join(MAPS)}, or a JSON object from modules to devices such as "
        f'\'{{"model.embed_tokens": 0, "model.layers": "disk"}}\', not {typed}'
    )


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
            InputError, CheckpointError, UnsupportedError: see `load_target`.
        """
        with waiting(f"loading {short(name)}", shown=not _downloaded(name)):
            from transformers.utils import logging

            from ..interface.load import load_target

            logging.set_verbosity_error()
            return load_target(
                name,
                self.dtype,
                self.device,
                self.threads,
                pack=pack,
                quantize=quantize,
                revision=self.revision,
                trust_remote_code=self.trust_remote_code,
                device_map=self.where,
            )

    @property
    def where(self) -> str | dict[str, Any] | None:
        """The device map, where there is one."""
        return None

    def check(self) -> None:
        """See `use_device`."""
        from ..interface.load import use_device

        use_device(self.device, self.threads)


@dataclass(frozen=True)
class ServingMachine(Machine):
    """Where a target that is only decoded runs: it may be split over devices, its weights quantized, and its forward
    compiled."""

    quantize: str | None = option(None, "int8: the target's weights in 8 bits, by torchao.")
    device_map: str | dict[str, Any] | None = option(
        None,
        "In the place of --device: let accelerate split the model over devices. auto, balanced, balanced_low_0, sequential, "
        'cpu, or a JSON object such as {"model.embed_tokens": 0, "model.layers": "disk"}.',
        type=str | None,
        read=device_map_from,
    )
    compile: str = option(
        "auto",
        "Decode with compiled programs: on, off, or auto: those that are there, and new ones for 20,000 tokens or more; bench "
        "and measure always compile. off also measures no costs, so that a chain is drafted where no method is named.",
        environment="GLIDECAPE_COMPILE",
    )

    def __post_init__(self) -> None:
        if self.compile not in ("auto", "on", "off"):
            raise InputError(f"--compile takes auto, on or off, not '{self.compile}'")

    @property
    def where(self) -> str | dict[str, Any] | None:
        return self.device_map

    def load(self, name: str, pack: bool = True, quantize: str | None = None) -> Target:
        return super().load(name, pack, quantize or self.quantize)

    def load_pair(self, target: str, draft: str | None, method: str, options: MethodOptions) -> LanguageModel:
        """The target with its draft, ready to write by a method.

        Raises: see `load` and `with_draft`.
        """
        from ..drafting.methods import DRAFTLESS, parse_method
        from ..drafts.checkpoint import resolve

        if draft is not None and parse_method(method)[0] not in DRAFTLESS:
            resolve(draft)  # a mistyped path is an error before the target is loaded
        model = self.load(target)
        with waiting(f"loading {short(draft or '')}", shown=draft is not None):
            from ..interface.load import with_draft

            return with_draft(model, draft, method, options)

    def prepared(self, lm: LanguageModel, tokens: float, may_choose: bool) -> LanguageModel:
        """See `interface.load.prepared`."""
        from ..interface.load import prepared

        with bar("preparing", ends=False):  # whatever takes long there says so itself
            return prepared(lm, self.compile, tokens, may_choose)

    def compile_models(
        self, target: Target, drafters: Iterable[Drafter], tokens: float = math.inf, price: bool = True
    ) -> None:
        """Compile what decodes, if that was asked for or is worth it for so many tokens; and let `auto` know what a round
        costs, unless `price` is False."""
        from ..interface.load import compile_models, set_prices

        drafters = list(drafters)
        if self.compile != "off":
            with bar("preparing compiled programs", ends=False):  # whatever takes long there says so itself
                compile_models(target, drafters, self.compile, tokens)
        if price:
            set_prices(target, drafters)


def load_drafts(folders: dict[str, str], target: Target) -> dict[str, AnyDraft]:
    """The drafts by name.

    Raises: see `load_draft`.
    """
    from ..drafts.checkpoint import load_draft

    loaded: dict[str, AnyDraft] = {}
    with bar("loading drafts", len(folders)) as shown:
        for name, folder in folders.items():
            loaded[name] = load_draft(folder, target)
            shown.advance()
    return loaded


def short(name: str) -> str:
    """A model's name for a bar, which has one line: of a path the last two parts.

    >>> short("/home/me/models/pysource/target"), short("owner/model")
    ('pysource/target', 'owner/model')
    """
    return "/".join(Path(name).parts[-2:])


def _downloaded(name: str) -> bool:
    """Will the model come from the Hub now? On a terminal the Hub draws bars of its own, and elsewhere none."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError, disable_progress_bars

    from ..target.loading import pinned

    if not on_terminal():
        disable_progress_bars()
    try:
        name, revision = pinned(name)
        return not Path(name).exists() and not isinstance(
            try_to_load_from_cache(name, "config.json", revision=revision), str
        )
    except HFValidationError:  # it is no name of the Hub: loading it will say so
        return False


def pair_or_shipped(target: str | None, drafts: list[str]) -> tuple[str, list[str]]:
    """The target and the drafts that are meant; with nothing named, the shipped pair.

    Raises:
        CheckpointError: nothing is named, and this is no checkout; or a draft alone does not say what it is for.
    """
    from ..interface.load import pair_of
    from ..shipped import shipped_pair

    if target is None and drafts:
        target, _ = map(str, pair_of(drafts[0].rpartition("=")[2]))
        return target, drafts
    if target is None:
        model, draft = shipped_pair()
        note(f"no model is named: this is the pair in {model.parent}")
        return str(model), [str(draft)]
    model_name, draft_name = pair_of(target, drafts[0] if drafts else None)
    return str(model_name), drafts or ([] if draft_name is None else [str(draft_name)])


def choose(target: str | None, draft: str | None, method: str) -> tuple[str, str | None, str]:
    """The target, the draft and the method that are meant: of the shipped pair where none is named; see `method_for`.

    Raises:
        CheckpointError, InputError: see `pair_or_shipped` and `parse_method`.
    """
    from ..drafting.methods import BY_DRAFT, DRAFTLESS, method_for, parse_method

    needs_draft = method in BY_DRAFT or parse_method(method)[0] not in DRAFTLESS
    target, found = pair_or_shipped(target, [] if draft is None else [draft])
    draft = found[0] if found and needs_draft else draft
    if method in BY_DRAFT:
        method = method_for(method, None if draft is None else kind_of(draft))
    return target, draft, method


@contextmanager
def opened(path: Path | None) -> Iterator[TextIO | None]:
    """The file of `--output`, which appears when it is whole; None for standard output.

    Raises:
        CheckpointError: see `only_writer`.
    """
    if path is None:
        yield None
        return
    if path.is_symlink() or path.is_char_device() or path.is_fifo():
        with path.open("w", encoding="utf-8") as file:  # such as /dev/null, which a file must not replace
            yield file
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with only_writer(path, folder=False):
        try:
            with temporary.open("w", encoding="utf-8") as file:
                yield file
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def resumable(out: Path | None) -> Iterator[None]:
    """Say how to resume what is interrupted while it writes to `out`, and exit as a shell does: 130, or 143 for SIGTERM."""

    def ended(number: int, _: object) -> NoReturn:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, ended)
    try:
        yield
    except KeyboardInterrupt as stop:
        if out is not None:
            print(f"stopped; give the same command again to resume from {out}", file=sys.stderr)
        raise typer.Exit(128 + getattr(stop, "signal", signal.SIGINT)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


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
        from ..train.rows import read_prompts as of_file

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


def kind_of(folder: str) -> str:
    """What a draft folder holds: "glide", "eagle", "medusa" or "lm"."""
    from ..drafts.checkpoint import WEIGHTS, read_card, resolve

    path = resolve(folder)
    return read_card(path).kind if (path / WEIGHTS).is_file() else "lm"


def named_folders(items: list[str]) -> dict[str, str]:
    """`--draft` options, each NAME=FOLDER or a folder, which is then named by what it holds, such as "glide" or "vanilla".

    Raises:
        InputError: two of one name.
        CheckpointError: nothing is there, which is noticed before a target is loaded.
    """
    from ..drafting.methods import base_for
    from ..drafts.checkpoint import resolve

    named: dict[str, str] = {}
    for item in items:
        name, _, folder = item.rpartition("=")
        resolve(folder)
        name = name or base_for(kind_of(folder))
        if name in named:
            raise InputError(f"two drafts named '{name}': give each a name of its own with --draft NAME=FOLDER")
        named[name] = folder
    return named
