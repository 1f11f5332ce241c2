"""`glidecape bench`: methods beside plain decoding and other libraries, on one target in one run."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bench.settings import Settings
from ..drafting.options import FIXED
from ..errors import InputError, OutputError
from ..files import only_writer
from .effects import note_greedy, refuse_unused
from .shared import (
    AsJson,
    Drafts,
    ServingMachine,
    TargetOrShipped,
    command_line,
    load_drafts,
    named_folders,
    pair_or_shipped,
    resumable,
)

if TYPE_CHECKING:
    from ..bench.runner import Plan

Methods = Annotated[
    str,
    typer.Option(
        help="Methods as for generate, joined by commas: plain,lookup+auto,glide. NAME:method uses the draft of that name; "
        "method@length=8 sets an option (length, bins, threshold, cap, over, beams, ngram, top, total, without) for that "
        "method alone. Default: plain, lookup and lookup+auto; with drafts plain, glide and glide+auto."
    ),
]
SuiteNames = Annotated[
    str,
    typer.Option(
        "--suite",
        help="Suites, joined by commas: spec_bench, glide, humaneval, mt_bench, gsm8k, own, stdlib. Append /CATEGORY, :N or "
        ":A-B to take a part.",
    ),
]
SvipFit = Annotated[
    str,
    typer.Option(help="Fit svip methods' thresholds (not those with @threshold) on these prompts: a file or suite."),
]
Peers = Annotated[
    str | None,
    typer.Option(
        help="Other libraries, joined by commas; '' for none. Default: transformers, at batch 1, not quantized, not split."
    ),
]


def bench(
    ctx: typer.Context,
    target: TargetOrShipped = None,
    draft: Drafts = None,
    methods: Methods = "",
    suite: SuiteNames = "",
    prompts: Annotated[str, typer.Option(help="Files of prompts (.jsonl or text), joined by commas.")] = "",
    suites: Annotated[
        Path | None, typer.Option(help="Folder that holds the suites' .jsonl files; default: GLIDECAPE_SUITES.")
    ] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Download the suites that are not in the folder yet.")] = False,
    settings: Settings = Settings(),
    svip_fit: SvipFit = "",
    peers: Peers = None,
    out: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the records; an interrupted run resumes from it."),
    ] = None,
    as_json: AsJson = False,
    machine: ServingMachine = ServingMachine(dtype="float32"),
) -> None:
    """Compare methods on one target, prompt by prompt in turn, beside plain decoding and other libraries.

    In float32 unless --dtype says otherwise: there every difference in the output is an error. Exit code 1: greedily in
    float32 a method's output is not plain decoding's.
    """
    from ..bench.methods import read_methods
    from ..bench.peers.base import PeerSource
    from ..bench.peers.registry import make_peers
    from ..bench.provenance import digest_of_model
    from ..bench.runner import Plan
    from ..bench.suites import read_suites

    settings.params("check")  # bad sampling options are an error before anything is loaded
    # With no target named, the shipped pair's drafts are at hand.
    methods = methods or ("plain,glide,glide+auto" if draft or target is None else "plain,lookup,lookup+auto")
    chosen = read_methods(methods.split(","), settings.options)
    refuse_unused(ctx, [one.method for one in chosen], also=[FIXED] if peers else [])
    note_greedy(ctx, settings.temperature)
    peer_names = _peer_names(peers, settings, machine)
    names = [name for name in (*suite.split(","), *prompts.split(",")) if name.strip()]
    if target is None and not names:
        names = ["own"]  # what the shipped pair was made for
    target, given = pair_or_shipped(target, draft or [])
    read = read_suites(names, suites, fetch)
    calibration = read_suites([svip_fit], suites, fetch)[0] if svip_fit else None
    folders = named_folders(given)
    with tempfile.TemporaryDirectory() as scratch, only_writer(records := out or Path(scratch) / "run"):
        # The folder is asked for before the model is loaded, too.
        model = machine.load(target)
        drafts = load_drafts(folders, model)
        made = [one.drafter(drafts) for one in chosen]
        machine.compile_models(model, made, price=False)  # the run, whose drafters are others, asks for prices
        digests = {name: digest_of_model(folder) for name, folder in folders.items()}
        others = make_peers(peer_names, PeerSource(target, model, folders, settings.options.length))
        plan = Plan(model, drafts, digests, chosen, read, settings, others, calibration)
        with resumable(out):
            _measure(plan, records, out, as_json)


def _peer_names(names: str | None, settings: Settings, machine: ServingMachine) -> list[str]:
    """The other libraries of `--peers`.

    Raises:
        InputError: an unknown one, or the target is quantized or split over devices.
    """
    from ..bench.peers.registry import check_peers

    if names is None:
        whole = machine.quantize is None and machine.device_map is None
        names = "transformers" if settings.batch == 1 and whole else ""
    elif machine.device_map is not None and names:
        raise InputError("other libraries would run on one device: leave --peers out where --device-map is given")
    elif machine.quantize is not None and names:
        raise InputError("other libraries would run the full weights: leave --peers out where --quantize is given")
    found = [name.strip() for name in names.split(",") if name.strip()]
    check_peers(found)
    return found


def _measure(plan: Plan, records: Path, out: Path | None, as_json: bool) -> None:
    """Run the plan, keep its records in a folder, and show what was measured, of an interrupted run, too.

    Args:
        out: where the user finds them afterwards, if it was named.
    """
    from ..bench.metrics import summarise
    from ..bench.records import RunFolder, write_json
    from ..bench.runner import run
    from ..bench.tables import show

    folder = RunFolder(records, plan.identity())
    try:
        run(plan, folder, command_line())
    except OutputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    finally:
        if folder.measured.lines:
            summary = summarise(folder)
            write_json(folder.path / "summary.json", summary)
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        show(summary, out)
