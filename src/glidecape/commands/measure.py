"""`glidecape measure …`: the papers' studies on the user's own target and drafts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..drafting.options import CAPPED, SMALL_BINS, SVIP, MethodOptions, bins_from
from ..errors import InputError
from .effects import refuse_unused
from .flatten import flattened
from .shared import ServingMachine, TargetName, command_line, named_folders

if TYPE_CHECKING:
    from ..bench.settings import Settings
    from ..bench.suites import Suite
    from ..drafting.drafter import Drafter
    from ..drafting.methods import AnyDraft
    from ..drafts.base import DraftModel
    from ..measure.table import Study
    from ..target.target import Target

app = typer.Typer(help="The papers' studies, on your own target and drafts.", no_args_is_help=True)

Drafts = Annotated[list[str], typer.Option("--draft", help="NAME=FOLDER, such as glide=models/pysource/glide; repeat.")]
SuiteNames = Annotated[
    str, typer.Option("--suite", help="Suites or files of prompts, joined by commas; see `glidecape bench --help`.")
]
OWN = "own,stdlib:400"  # small targets loop on most prompts when they are greedy
Folder = Annotated[Path | None, typer.Option("--suites", help="Folder of suites; default: GLIDECAPE_SUITES.")]
Temperatures = Annotated[str, typer.Option("--temperature", help="One, or several joined by commas.")]
NewTokens = Annotated[int, typer.Option("--max-new-tokens")]
PromptTokens = Annotated[int, typer.Option("--prompt-tokens", help="Prompts are cut to so many tokens; 0: whole.")]
Limit = Annotated[int, typer.Option("--limit", help="Prompts of a category; greedily, ones that don't loop.")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed repeats; medians are reported.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write this JSON file, and a Markdown table beside it.")]
Methods = Annotated[str, typer.Option("--methods", help="Joined by commas, written as for `glidecape bench`.")]
Length = Annotated[int, typer.Option("--draft-length", min=1, help="Tokens drafted a round.")]
FLOAT32 = ServingMachine(dtype="float32")
SMALL = MethodOptions(bins=SMALL_BINS)


@dataclass
class _Opened:
    """What every study begins with."""

    target: Target
    drafts: Mapping[str, AnyDraft]
    suites: list[Suite]
    settings: Settings
    study: Study
    out: Path | None

    def at(self, temperature: float) -> Settings:
        return replace(self.settings, temperature=temperature)

    def finish(self) -> None:
        self.study.print()
        if self.out is not None:
            self.study.write(self.out)


def _open(
    name: str,
    target: str,
    draft: list[str],
    suite: str,
    suites: Path | None,
    out: Path | None,
    machine: ServingMachine,
    **options: Any,
) -> _Opened:
    from ..bench.provenance import circumstances, digest_of_model
    from ..bench.settings import Settings
    from ..bench.suites import read_suites
    from ..drafts.checkpoint import load_draft
    from ..measure.table import Study

    if out is not None and (out.suffix == ".md" or out.is_dir()):
        raise InputError(f"--out names a JSON file, beside which a .md is written, not {out}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)  # not after an hour
    settings = Settings(**options)
    read = read_suites([one for one in suite.split(",") if one.strip()], suites)
    model = machine.load(target)
    # An answer that is decoded past its end is nothing that anybody asks for, and easy to predict.
    chat = bool(getattr(model.tokenizer, "chat_template", None)) and any(
        p.conversation for s in read for p in s.prompts
    )
    settings = replace(settings, stop_at_eos=chat)
    folders = named_folders(draft)
    facts = {"command": command_line()} | circumstances(model)
    facts |= {f"sha256 of {one.name}": one.sha256[:16] for one in read}
    facts |= {f"weights of {key}": digest_of_model(folder)[:16] for key, folder in folders.items()}
    drafts = {key: load_draft(folder, model) for key, folder in folders.items()}
    return _Opened(model, drafts, read, settings, Study(name, facts, asdict(settings)), out)


def _drafters(ctx: typer.Context, methods: str, opened: _Opened, also: tuple[str, ...] = ()) -> dict[str, Drafter]:
    """Plain decoding and the drafters of `--methods`, by name.

    Raises:
        InputError: an option that none of them uses; see `read_methods` and `Method.drafter`.
    """
    from ..bench.methods import read_methods

    chosen = read_methods(methods.split(","), opened.settings.options)
    refuse_unused(ctx, [one.method for one in chosen], also)
    return {one.name: one.drafter(opened.drafts) for one in chosen}


def _numbers(text: str, option: str, kind: type = int) -> list[Any]:
    """Numbers joined by commas; of integers also FIRST-LAST.

    Raises:
        InputError: something else, or a number below the smallest that makes sense.
    """
    made: list[Any] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            made += range(int(first), int(last) + 1) if dash and kind is int else [kind(part)]
    except ValueError:
        raise InputError(f"{option} takes numbers joined by commas, not '{text}'") from None
    if not made or min(made) < (1 if kind is int else 0):
        raise InputError(f"{option} takes numbers of at least {1 if kind is int else 0}, not '{text}'")
    return list(dict.fromkeys(made))


@app.command()
@flattened
def cape(
    target: TargetName,
    draft: Drafts,
    suite: SuiteNames = OWN,
    suites: Folder = None,
    name: Annotated[str, typer.Option("--use", help="Which --draft; default: the first.")] = "",
    siblings: Annotated[str, typer.Option(help="Fixed numbers of siblings.")] = "2,4,8",
    beams: str = "4,8",
    bins: Annotated[
        list[str] | None, typer.Option(help="NAME=7,5,3,1: an entry of the grid; repeat. Default: the built-in grid.")
    ] = None,
    length: Length = 5,
    temperature: Temperatures = "0",
    max_new_tokens: NewTokens = 128,
    prompt_tokens: PromptTokens = 192,
    limit: Limit = 16,
    repeats: Repeats = 2,
    out: Out = None,
    machine: ServingMachine = FLOAT32,
) -> None:
    """CaPE against fixed sibling sets, beams and the plain chain; drafting and verification apart; the best bins."""
    from ..measure.cape import GRID, study_cape
    from ..measure.runs import prompts_of
    from ..measure.sweeps import params_of

    grid = dict(GRID)
    if bins:
        parts = [one.partition("=") for one in bins]
        grid = {key.strip(): bins_from(value) for key, _, value in parts if value}
        if len(grid) < len(bins):
            raise InputError("each --bins is NAME=NUMBERS with a name of its own, such as --bins mine=5,3,1,0")
    sets, widths = _numbers(siblings, "--siblings"), _numbers(beams, "--beams")
    temperatures = _numbers(temperature, "--temperature", float)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "prompt_tokens": prompt_tokens, "limit": limit}
    options |= {"options": MethodOptions(length), "repeats": repeats}
    opened = _open("cape", target, draft, suite, suites, out, machine, **options)
    model = _chosen(name, opened.drafts)
    for warmth in temperatures:
        settings = opened.at(warmth)
        prompts = prompts_of(opened.target, opened.suites, settings)
        found = study_cape(
            opened.target, model, prompts, params_of(settings), length, sets, widths, grid, settings.repeats
        )
        opened.study.tables.append(found[0])
        opened.study.notes += [f"T={warmth:g}. {sentence}" for sentence in found[1]]
    opened.finish()


def _chosen(name: str, drafts: Mapping[str, AnyDraft]) -> DraftModel:
    from ..drafts.base import DepthModel

    if name and name not in drafts:
        raise InputError(f"no draft named '{name}': give --draft {name}=FOLDER")
    chosen = drafts[name or next(iter(drafts))]
    if isinstance(chosen, DepthModel):
        raise InputError(
            "Medusa heads have no confidence at a node, only at a depth: CaPE and beams need another draft"
        )
    return chosen


@app.command()
@flattened
def svip(
    ctx: typer.Context,
    target: TargetName,
    draft: Drafts,
    methods: Annotated[
        str, typer.Option(help="vanilla, glide, …, with +cape or +beam; the stop policies are the study's own.")
    ] = "glide",
    suite: SuiteNames = OWN,
    suites: Folder = None,
    calibration: Annotated[
        str, typer.Option(help="Suites or files to fit the threshold on; default: every fourth prompt is kept for it.")
    ] = "",
    lengths: Annotated[str, typer.Option(help="Constant lengths, such as 1-16 or 1,2,4,8.")] = "1-6,8,12,16",
    method_options: MethodOptions = SMALL,
    temperature: Temperatures = "0,1",
    max_new_tokens: NewTokens = 128,
    prompt_tokens: PromptTokens = 192,
    limit: Limit = 16,
    repeats: Repeats = 1,
    out: Out = None,
    machine: ServingMachine = FLOAT32,
) -> None:
    """SVIP against constant and heuristic draft lengths, and the gap to an oracle that knows what will be accepted."""
    from ..drafting.drafter import ModelDrafter
    from ..measure.costs import verification_ratios
    from ..measure.svip import Lengths, study_svip
    from ..measure.sweeps import params_of

    tried = Lengths(tuple(_numbers(lengths, "--lengths")), threshold=method_options.threshold, cap=method_options.cap)
    temperatures = _numbers(temperature, "--temperature", float)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "prompt_tokens": prompt_tokens, "limit": limit}
    options |= {"options": method_options, "repeats": repeats}
    opened = _open("svip", target, draft, suite, suites, out, machine, **options)
    drafters = _drafters(ctx, methods, opened, also=(SVIP, CAPPED))
    for name, drafter in drafters.items():
        if name != "plain" and (not isinstance(drafter, ModelDrafter) or {"svip", "heuristic"} & set(name.split("+"))):
            raise InputError(f"--methods {name}: name a draft model and an expansion only, such as glide or glide+cape")
    for warmth in temperatures:
        settings = opened.at(warmth)
        prompts, kept = _calibrated(opened, settings, calibration, suites)
        params = params_of(settings)
        verification = verification_ratios(opened.target, prompts[:1], params)
        for name, drafter in drafters.items():
            if isinstance(drafter, ModelDrafter):
                table, _ = study_svip(
                    opened.target,
                    drafter.model,
                    drafter.expansion,
                    name,
                    prompts,
                    kept,
                    params,
                    verification,
                    tried,
                    repeats,
                )
                opened.study.tables.append(table)
        sizes = ", ".join(f"{n}: {v:.2f}" for n, v in zip(verification.sizes, verification.ratios, strict=True))
        opened.study.notes.append(f"T={warmth:g}, v(n) by nodes, the root counted: {sizes}.")
    opened.finish()


def _calibrated(
    opened: _Opened, settings: Settings, calibration: str, suites: Path | None
) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts to measure, and those to fit a threshold on; without suites for these, every fourth prompt."""
    from ..bench.suites import read_suites
    from ..measure.runs import prompts_of

    prompts = prompts_of(opened.target, opened.suites, settings)
    apart = [one for one in calibration.split(",") if one.strip()]
    if apart:
        return prompts, prompts_of(opened.target, read_suites(apart, suites), settings)
    if len(prompts) < 2:
        raise InputError("one prompt is not enough: every fourth is kept for calibration; give more, or --calibration")
    return [p for i, p in enumerate(prompts) if i % 4], prompts[::4]


@app.command()
@flattened
def batch(
    ctx: typer.Context,
    target: TargetName,
    draft: Drafts,
    methods: Methods = "glide,glide+cape,glide+cape+svip",
    suite: SuiteNames = OWN,
    suites: Folder = None,
    sizes: Annotated[str, typer.Option(help="Batch sizes.")] = "1,4,16",
    method_options: MethodOptions = SMALL,
    temperature: Temperatures = "0,1",
    max_new_tokens: NewTokens = 128,
    prompt_tokens: PromptTokens = 192,
    limit: Limit = 16,
    repeats: Repeats = 1,
    out: Out = None,
    machine: ServingMachine = FLOAT32,
) -> None:
    """Speed-ups over plain decoding of the same batch, by batch size."""
    from ..measure.runs import prompts_of
    from ..measure.sweeps import params_of, study_batches

    wanted = _numbers(sizes, "--sizes")
    temperatures = _numbers(temperature, "--temperature", float)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "prompt_tokens": prompt_tokens, "limit": limit}
    options |= {"options": method_options, "repeats": repeats}
    opened = _open("batch", target, draft, suite, suites, out, machine, **options)
    drafters = _drafters(ctx, methods, opened)
    for warmth in temperatures:
        settings = opened.at(warmth)
        prompts = prompts_of(opened.target, opened.suites, settings)
        table = study_batches(opened.target, drafters, prompts, params_of(settings), wanted, repeats)
        opened.study.tables.append(table)
    opened.finish()


@app.command()
@flattened
def context(
    ctx: typer.Context,
    target: TargetName,
    draft: Drafts,
    methods: Methods = "glide,glide+cape,glide+cape+svip",
    suite: SuiteNames = "own",
    suites: Folder = None,
    lengths: Annotated[str, typer.Option(help="Tokens of the prompts, padded with earlier text.")] = "256,1024,4096",
    method_options: MethodOptions = SMALL,
    temperature: Temperatures = "0,1",
    max_new_tokens: NewTokens = 128,
    limit: Limit = 8,
    repeats: Repeats = 1,
    out: Out = None,
    machine: ServingMachine = FLOAT32,
) -> None:
    """Speed-ups over plain decoding by the length of the prompt."""
    from ..measure.sweeps import study_contexts

    wanted = _numbers(lengths, "--lengths")
    temperatures = _numbers(temperature, "--temperature", float)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "limit": limit}
    options |= {"options": method_options, "repeats": repeats}
    opened = _open("context", target, draft, suite, suites, out, machine, **options)
    drafters = _drafters(ctx, methods, opened)
    for warmth in temperatures:
        table = study_contexts(opened.target, drafters, opened.suites, opened.at(warmth), wanted, repeats)
        opened.study.tables.append(table)
    opened.finish()


@app.command()
@flattened
def long(
    ctx: typer.Context,
    target: TargetName,
    draft: Drafts,
    methods: Methods = "glide,glide+cape,glide+cape+svip",
    suite: SuiteNames = "own:4",
    suites: Folder = None,
    method_options: MethodOptions = SMALL,
    temperature: Temperatures = "1,0",
    max_new_tokens: NewTokens = 4096,
    prompt_tokens: PromptTokens = 192,
    repeats: Repeats = 1,
    out: Out = None,
    machine: ServingMachine = FLOAT32,
) -> None:
    """Long outputs: figures up to 128, 256, … tokens, with the repetition of what was emitted. Loops stay in."""
    from ..bench.draw import encode
    from ..measure.sweeps import params_of, study_long

    temperatures = _numbers(temperature, "--temperature", float)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "prompt_tokens": prompt_tokens}
    options |= {"options": method_options, "repeats": repeats}
    opened = _open("long", target, draft, suite, suites, out, machine, **options)
    drafters = _drafters(ctx, methods, opened)
    ids = [encode(opened.target, p, opened.settings)[0] for one in opened.suites for p in one.prompts]
    prompts = [p[: prompt_tokens or None] for p in ids]
    for warmth in temperatures:
        table = study_long(opened.target, drafters, prompts, params_of(opened.at(warmth)), repeats)
        opened.study.tables.append(table)
    opened.finish()
