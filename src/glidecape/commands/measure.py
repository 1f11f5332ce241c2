"""`glidecape measure …`: the papers' studies on the user's own target and drafts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..drafting.options import AUTO_PARTS, CAPPED, SVIP, MethodOptions, bins_from
from ..errors import InputError
from ..files import only_writer
from ..options import option
from .effects import refuse_unused
from .parsing import add_to
from .shared import ServingMachine, SomeDrafts, TargetName, command_line, load_drafts, named_folders

if TYPE_CHECKING:
    from ..bench.settings import Settings
    from ..bench.suites import Suite
    from ..drafting.drafter import Drafter
    from ..drafting.methods import AnyDraft
    from ..drafts.base import DraftModel
    from ..measure.table import Study
    from ..target.target import Target

app = typer.Typer(help="The papers' studies, on your own target and drafts.", no_args_is_help=True)

PromptTokens = Annotated[int, typer.Option("--prompt-tokens", help="Cut prompts to this many tokens; 0: do not cut.")]
Limit = Annotated[
    int,
    typer.Option(
        "--limit", help="Prompts in each category; with greedy decoding, only those whose output does not loop."
    ),
]
UsedDraft = Annotated[str, typer.Option("--use", help="Name of the draft to use; default: the first.")]
Methods = Annotated[str, typer.Option("--methods", help="Methods, joined by commas, as for `glidecape bench`.")]
Length = Annotated[int, typer.Option("--draft-length", min=1, help="Tokens drafted in each round.")]


@dataclass(frozen=True)
class StudyOptions:
    """The options of every study."""

    suite: str = option(
        "own,stdlib:400",  # small targets loop on most prompts when they are greedy
        "Suites or files of prompts, joined by commas; see `glidecape bench --help`.",
    )
    suites: Path | None = option(None, "Folder of suites; default: GLIDECAPE_SUITES.")
    temperature: str = option("0,1", "Sampling temperatures, joined by commas; 0: greedy.")
    max_new_tokens: int = option(128, "Most tokens of each output.")
    repeats: int = option(1, "Timed repeats; medians are reported.", least=1)
    out: Path | None = option(None, flag="output", help="Write this JSON file, and a Markdown table beside it.")
    machine: ServingMachine = field(default_factory=lambda: ServingMachine(dtype="float32"))

    @property
    def temperatures(self) -> list[float]:
        """Raises InputError for what are no temperatures."""
        return _numbers(self.temperature, "--temperature", float)


@dataclass
class _Opened:
    """What every study begins with."""

    target: Target
    drafts: Mapping[str, AnyDraft]
    suites: list[Suite]
    settings: Settings
    study: Study
    run: StudyOptions

    def each_temperature(self) -> Iterator[Settings]:
        for temperature in self.run.temperatures:
            yield replace(self.settings, temperature=temperature)

    def finish(self) -> None:
        self.study.print()
        if self.run.out is not None:
            self.study.write(self.run.out)


def _open(name: str, target: str, draft: list[str], run: StudyOptions, **settings: Any) -> _Opened:
    """Load the target, the drafts and the prompts; `settings` are those of the study besides `run`'s."""
    from ..bench.provenance import circumstances, digest_of_model
    from ..bench.settings import Settings
    from ..bench.suites import read_suites
    from ..measure.table import Study

    out = run.out
    if out is not None and (out.suffix == ".md" or out.is_dir()):
        raise InputError(f"--output names a JSON file, beside which a .md is written, not {out}")
    if out is not None:
        with only_writer(out, folder=False):
            pass  # it can be written, which is no discovery to make after an hour
    chosen = Settings(max_new_tokens=run.max_new_tokens, repeats=run.repeats, **settings)
    for temperature in run.temperatures:
        replace(chosen, temperature=temperature).params("check")  # bad ones are an error before anything is loaded
    read = read_suites([one for one in run.suite.split(",") if one.strip()], run.suites)
    folders = named_folders(draft)
    model = run.machine.load(target)
    # An answer that is decoded past its end is nothing that anybody asks for, and easy to predict.
    chat = bool(getattr(model.tokenizer, "chat_template", None)) and any(
        p.conversation for s in read for p in s.prompts
    )
    chosen = replace(chosen, stop_at_eos=chat)
    facts = {"command": command_line()} | circumstances(model)
    facts |= {f"sha256 of {one.name}": one.sha256[:16] for one in read}
    facts |= {f"weights of {key}": digest_of_model(folder)[:16] for key, folder in folders.items()}
    drafts = load_drafts(folders, model)
    run.machine.compile_models(model, [])
    facts["compiled"] = model.compiled is not None
    return _Opened(model, drafts, read, chosen, Study(name, facts, asdict(chosen)), run)


def _drafters(ctx: typer.Context, methods: str, opened: _Opened, also: tuple[str, ...] = ()) -> dict[str, Drafter]:
    """Plain decoding and the drafters of `--methods`, by name.

    Raises:
        InputError: an option that none of them uses; see `read_methods` and `Method.drafter`.
    """
    from ..bench.methods import read_methods

    chosen = read_methods(methods.split(","), opened.settings.options)
    refuse_unused(ctx, [one.method for one in chosen], also)
    made = {one.name: one.drafter(opened.drafts) for one in chosen}
    opened.run.machine.compile_models(opened.target, made.values())
    return made


def _numbers(text: str, name: str, read: type = int) -> list[Any]:
    """Numbers joined by commas; of integers also FIRST-LAST.

    Raises:
        InputError: something else, or a number below the smallest that makes sense.
    """
    made: list[Any] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            made += range(int(first), int(last) + 1) if dash and read is int else [read(part)]
    except ValueError:
        raise InputError(f"{name} takes numbers joined by commas, not '{text}'") from None
    if not made or min(made) < (1 if read is int else 0):
        raise InputError(f"{name} takes numbers of at least {1 if read is int else 0}, not '{text}'")
    return list(dict.fromkeys(made))


@add_to(
    app,
    "glidecape measure cape models/pysource/target --draft glide=models/pysource/glide",
    "glidecape measure cape path/to/model --draft draft --siblings 2,4 --output cape.json",
)
def cape(
    target: TargetName,
    draft: SomeDrafts,
    name: UsedDraft = "",
    siblings: Annotated[str, typer.Option(help="Fixed numbers of siblings, joined by commas.")] = "2,4,8",
    beams: Annotated[str, typer.Option(help="Numbers of beams, joined by commas.")] = "4,8",
    bins: Annotated[
        list[str] | None, typer.Option(help="NAME=7,5,3,1: an entry of the grid; repeat. Default: the built-in grid.")
    ] = None,
    length: Length = 5,
    prompt_tokens: PromptTokens = 192,
    limit: Limit = 16,
    run: StudyOptions = StudyOptions(temperature="0", repeats=2),
) -> None:
    """CaPE against fixed sibling sets, beams and the plain chain; drafting and verification apart; the best bins."""
    from ..drafting.drafter import ModelDrafter
    from ..drafting.expansions.cape import Cape
    from ..drafting.stop import FixedLength
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
    opened = _open("cape", target, draft, run, prompt_tokens=prompt_tokens, limit=limit, options=MethodOptions(length))
    model = _chosen(name, opened.drafts)
    run.machine.compile_models(opened.target, [ModelDrafter(model, Cape(), FixedLength(length))])
    for settings in opened.each_temperature():
        prompts = prompts_of(opened.target, opened.suites, settings)
        found = study_cape(
            opened.target, model, prompts, params_of(settings), length, sets, widths, grid, settings.repeats
        )
        opened.study.tables.append(found[0])
        opened.study.notes += [f"T={settings.temperature:g}. {sentence}" for sentence in found[1]]
    opened.finish()


def _chosen(name: str, drafts: Mapping[str, AnyDraft]) -> DraftModel:
    from ..drafts.base import DepthModel

    if name and name not in drafts:
        raise InputError(f"no draft named '{name}': give --draft {name}=FOLDER")
    chosen = drafts[name or next(iter(drafts))]
    if isinstance(chosen, DepthModel):
        raise InputError("Medusa heads have no confidence at a node, only at a depth: this study needs another draft")
    return chosen


@add_to(
    app,
    "glidecape measure svip models/pysource/target --draft glide=models/pysource/glide --limit 8",
    "glidecape measure svip path/to/model --draft draft --methods glide+cape --lengths 1-8",
)
def svip(
    ctx: typer.Context,
    target: TargetName,
    draft: SomeDrafts,
    methods: Annotated[
        str, typer.Option(help="vanilla, glide, …, with +cape or +beam; the stop policies are the study's own.")
    ] = "glide",
    calibration: Annotated[
        str, typer.Option(help="Suites or files to fit the threshold on; default: every fourth prompt.")
    ] = "",
    lengths: Annotated[str, typer.Option(help="Constant lengths, such as 1-16 or 1,2,4,8.")] = "1-6,8,12,16",
    method_options: MethodOptions = MethodOptions(),
    prompt_tokens: PromptTokens = 192,
    limit: Limit = 16,
    run: StudyOptions = StudyOptions(),
) -> None:
    """SVIP against constant and heuristic draft lengths, and the gap to an oracle that knows what will be accepted."""
    from ..costs import verification_ratios
    from ..drafting.drafter import ModelDrafter
    from ..drafting.stop import FixedLength
    from ..measure.svip import Lengths, study_svip
    from ..measure.sweeps import params_of

    tried = Lengths(tuple(_numbers(lengths, "--lengths")), threshold=method_options.threshold, cap=method_options.cap)
    opened = _open("svip", target, draft, run, prompt_tokens=prompt_tokens, limit=limit, options=method_options)
    drafters = _drafters(ctx, methods, opened, also=(SVIP, CAPPED))
    for name, drafter in drafters.items():
        if name != "plain" and not (isinstance(drafter, ModelDrafter) and isinstance(drafter.stop, FixedLength)):
            raise InputError(f"--methods {name}: name a draft model and an expansion only, such as glide or glide+cape")
    for settings in opened.each_temperature():
        prompts, kept = _calibrated(opened, settings, calibration)
        params = params_of(settings)
        verification = verification_ratios(opened.target, prompts[:1], settings.temperature)
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
                    run.repeats,
                )
                opened.study.tables.append(table)
        sizes = ", ".join(f"{n}: {v:.2f}" for n, v in zip(verification.sizes, verification.ratios, strict=True))
        opened.study.notes.append(f"T={settings.temperature:g}, v(n) by nodes, the root counted: {sizes}.")
    opened.finish()


def _calibrated(opened: _Opened, settings: Settings, calibration: str) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts to measure, and those to fit a threshold on; without suites for these, every fourth prompt."""
    from ..bench.suites import read_suites
    from ..measure.runs import prompts_of

    prompts = prompts_of(opened.target, opened.suites, settings)
    apart = [one for one in calibration.split(",") if one.strip()]
    if apart:
        return prompts, prompts_of(opened.target, read_suites(apart, opened.run.suites), settings)
    if len(prompts) < 2:
        raise InputError("one prompt is not enough: every fourth is kept for calibration; give more, or --calibration")
    return [p for i, p in enumerate(prompts) if i % 4], prompts[::4]


@add_to(
    app,
    "glidecape measure auto models/pysource/target --draft glide=models/pysource/glide --limit 8 --compile on",
    "glidecape measure auto path/to/model --draft draft --suite code.jsonl,chat.jsonl --lengths 1-8 --output auto.json",
)
def auto(
    target: TargetName,
    draft: SomeDrafts,
    name: UsedDraft = "",
    lengths: Annotated[str, typer.Option(help="Lengths of the draft's chains to compare with, such as 1-8.")] = "1-8",
    copies: Annotated[str, typer.Option(help="Lengths of copied chains (lookup) to compare with.")] = "3,5,10",
    without: Annotated[
        str, typer.Option(help="Parts of auto that are left out, each in a row of its own; empty: none.")
    ] = ",".join(AUTO_PARTS),
    prompt_tokens: PromptTokens = 192,
    limit: Limit = 16,
    run: StudyOptions = StudyOptions(),
) -> None:
    """`auto` against the best constant of each kind of prompt and temperature, and the gap to an oracle that knows the text."""
    from ..bench.methods import read_methods
    from ..costs import ALONE_ROWS, prices_of
    from ..drafting.auto.drafter import AutoDrafter
    from ..drafting.methods import base_for
    from ..measure.auto import mixed_jobs, study_auto
    from ..progress import note
    from ..usual import kind_of

    sizes, copied = _numbers(lengths, "--lengths"), _numbers(copies, "--copies")
    opened = _open("auto", target, draft, run, prompt_tokens=prompt_tokens, limit=limit)
    model = _chosen(name, opened.drafts)
    base = f"{name or next(iter(opened.drafts))}:{base_for(kind_of(model) or 'lm')}"
    judged = f"{base}+auto"
    names = [f"{base}+chain@length={n}" for n in sizes if n <= model.max_lag] + [f"lookup@length={n}" for n in copied]
    names += [judged, *(f"{judged}@without={part.strip()}" for part in without.split(",") if part.strip())]
    drafters = {one.name: one.drafter(opened.drafts) for one in read_methods(names, opened.settings.options)}
    run.machine.compile_models(opened.target, drafters.values(), price=False)
    autos = [one for one in drafters.values() if isinstance(one, AutoDrafter)]
    prices = prices_of(opened.target, autos[0], note, rows=ALONE_ROWS)
    for one in autos:
        one.set_prices(prices, timed=True)
    jobs = mixed_jobs(opened.target, opened.suites, list(opened.each_temperature()))
    opened.study.tables += study_auto(opened.target, drafters, judged, jobs, run.repeats)
    opened.finish()


@add_to(
    app,
    "glidecape measure batch models/pysource/target --draft glide=models/pysource/glide --sizes 1,4",
    "glidecape measure batch path/to/model --draft draft --temperature 0 --output batch.json",
)
def batch(
    ctx: typer.Context,
    target: TargetName,
    draft: SomeDrafts,
    methods: Methods = "glide,glide+cape,glide+cape+svip",
    sizes: Annotated[str, typer.Option(help="Batch sizes, joined by commas.")] = "1,4,16",
    method_options: MethodOptions = MethodOptions(),
    prompt_tokens: PromptTokens = 192,
    limit: Limit = 16,
    run: StudyOptions = StudyOptions(),
) -> None:
    """Speed-ups over plain decoding of the same batch, by batch size."""
    from ..measure.runs import prompts_of
    from ..measure.sweeps import params_of, study_batches

    wanted = _numbers(sizes, "--sizes")
    opened = _open("batch", target, draft, run, prompt_tokens=prompt_tokens, limit=limit, options=method_options)
    drafters = _drafters(ctx, methods, opened)
    for settings in opened.each_temperature():
        prompts = prompts_of(opened.target, opened.suites, settings)
        table = study_batches(opened.target, drafters, prompts, params_of(settings), wanted, run.repeats)
        opened.study.tables.append(table)
    opened.finish()


@add_to(
    app,
    "glidecape measure context models/pysource/target --draft glide=models/pysource/glide --lengths 256,1024",
    "glidecape measure context path/to/model --draft draft --suite prompts.jsonl",
)
def context(
    ctx: typer.Context,
    target: TargetName,
    draft: SomeDrafts,
    methods: Methods = "glide,glide+cape,glide+cape+svip",
    lengths: Annotated[
        str, typer.Option(help="Lengths of the prompts in tokens, joined by commas; earlier text pads them.")
    ] = "256,1024,4096",
    method_options: MethodOptions = MethodOptions(),
    limit: Limit = 8,
    run: StudyOptions = StudyOptions(suite="own"),
) -> None:
    """Speed-ups over plain decoding by the length of the prompt."""
    from ..measure.sweeps import study_contexts

    wanted = _numbers(lengths, "--lengths")
    opened = _open("context", target, draft, run, limit=limit, options=method_options)
    drafters = _drafters(ctx, methods, opened)
    for settings in opened.each_temperature():
        table = study_contexts(opened.target, drafters, opened.suites, settings, wanted, run.repeats)
        opened.study.tables.append(table)
    opened.finish()


@add_to(
    app,
    "glidecape measure long models/pysource/target --draft glide=models/pysource/glide --max-new-tokens 1024",
    "glidecape measure long path/to/model --draft draft --suite own:2",
)
def long(
    ctx: typer.Context,
    target: TargetName,
    draft: SomeDrafts,
    methods: Methods = "glide,glide+cape,glide+cape+svip",
    method_options: MethodOptions = MethodOptions(),
    prompt_tokens: PromptTokens = 192,
    run: StudyOptions = StudyOptions(suite="own:4", temperature="1,0", max_new_tokens=4096),
) -> None:
    """Long outputs: figures up to 128, 256, … tokens, with the repetition of what was emitted. Looping outputs are included."""
    from ..bench.draw import encode
    from ..measure.sweeps import params_of, study_long

    opened = _open("long", target, draft, run, prompt_tokens=prompt_tokens, options=method_options)
    drafters = _drafters(ctx, methods, opened)
    ids = [encode(opened.target, p, opened.settings)[0] for one in opened.suites for p in one.prompts]
    prompts = [p[: prompt_tokens or None] for p in ids]
    for settings in opened.each_temperature():
        table = study_long(opened.target, drafters, prompts, params_of(settings), run.repeats)
        opened.study.tables.append(table)
    opened.finish()
