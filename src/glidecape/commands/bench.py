"""`glidecape bench`: methods beside plain decoding and other libraries, on one target in one run."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError, OutputError
from ..files import only_writer
from .shared import (
    Device,
    Dtype,
    Quantize,
    Revision,
    TargetName,
    Threads,
    Trust,
    command_line,
    load_target,
    named_folders,
    parse_bins,
)


def bench(
    target: TargetName,
    draft: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER, such as glide=models/pysource/glide; repeat.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Joined by commas; NAME:method uses the draft of that name, method@length=8 sets an option "
            "(length, bins, threshold, cap, over, beams, ngram, top, total) for it alone."
        ),
    ] = "plain,glide",
    suite: Annotated[
        str,
        typer.Option(
            help="Joined by commas: spec_bench, glide, humaneval, mt_bench, gsm8k, own, stdlib; /CATEGORY, :N, :A-B narrow."
        ),
    ] = "",
    prompts: Annotated[str, typer.Option(help="Joined by commas: .jsonl or text files; names of suites do, too.")] = "",
    suites: Annotated[
        Path | None, typer.Option(help="Folder that holds the suites' .jsonl files; default: GLIDECAPE_SUITES.")
    ] = None,
    fetch: Annotated[bool, typer.Option("--fetch", help="Download suites that the folder lacks.")] = False,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    sampling: Annotated[
        str, typer.Option(help="noise: every method emits the same tokens. residual: papers' rule.")
    ] = "noise",
    seed: int = 11,
    max_new_tokens: int = 128,
    stop_at_eos: Annotated[
        bool | None, typer.Option(help="End a row at end-of-text; default: in conversations only.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts decoded side by side.")] = 1,
    context: Annotated[
        int, typer.Option(help="Pad prompts in front with earlier text of their suite up to so many tokens; 0: don't.")
    ] = 0,
    prompt_tokens: Annotated[int, typer.Option(help="Prompts are cut to so many tokens; 0: whole.")] = 0,
    chat: Annotated[bool, typer.Option(help="Apply the tokenizer's chat template to conversations.")] = True,
    limit: Annotated[
        int, typer.Option(help="Prompts of a category that count: with greedy decoding, ones that don't loop.")
    ] = 32,
    looping: Annotated[
        int, typer.Option(help="Prompts of a category with looping greedy continuations, reported apart.")
    ] = 16,
    repeats: Annotated[int, typer.Option(help="Timed repeats; medians are reported.")] = 3,
    peers: Annotated[
        str | None,
        typer.Option(
            help="Other libraries, joined by commas; '' for none. Default: transformers, at batch 1, not quantized."
        ),
    ] = None,
    draft_length: int = 5,
    cape_bins: Annotated[str, typer.Option(help="paper, small, or numbers like 7,5,3,1.")] = "paper",
    svip_threshold: float = 0.3,
    svip_fit: Annotated[
        str,
        typer.Option(
            help="Fit svip methods' thresholds (not those with @threshold) on these prompts: a file or suite."
        ),
    ] = "",
    svip_cap: int = 40,
    svip_over: Annotated[str, typer.Option(help="best, mean or min of the frontier.")] = "best",
    beams: int = 4,
    lookup_ngram: int = 3,
    tree_top: Annotated[
        int, typer.Option(help="Choices of a node that goes on, in the trees of EAGLE and Medusa.")
    ] = 10,
    tree_total: Annotated[int, typer.Option(help="Their nodes, the root included.")] = 60,
    watch: Annotated[
        int, typer.Option(help="Prompts of a category on which the drafts' laws are written down, untimed.")
    ] = 4,
    watch_depth: Annotated[int, typer.Option(help="Tokens that a draft then runs ahead, of each position.")] = 8,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the records; the same command goes on in it after a stop.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    quantize: Quantize = None,
    threads: Threads = 0,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Compare methods on one target, prompt by prompt in turn, beside plain decoding and other libraries.

    Exit code 1: greedily in float32 a method's output is not plain decoding's.
    """
    from ..bench.methods import read_methods
    from ..bench.metrics import summarise
    from ..bench.peers.base import PeerSource
    from ..bench.peers.registry import make_peers
    from ..bench.provenance import digest_of_model
    from ..bench.records import RunFolder, write_json
    from ..bench.runner import Plan, run
    from ..bench.settings import Settings
    from ..bench.suites import read_suites
    from ..bench.tables import show
    from ..drafts.checkpoint import load_draft

    settings = Settings(
        temperature=temperature,
        sampling=sampling,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop_at_eos=stop_at_eos,
        batch=batch,
        prompt_tokens=prompt_tokens,
        context=context,
        chat=chat,
        limit=limit,
        looping=looping,
        repeats=repeats,
        draft_length=draft_length,
        bins=parse_bins(cape_bins),
        threshold=svip_threshold,
        cap=svip_cap,
        over=svip_over,
        beams=beams,
        ngram=lookup_ngram,
        top=tree_top,
        total=tree_total,
        watch=watch,
        watch_depth=watch_depth,
    )
    settings.params("check")  # bad sampling options are an error before anything is loaded
    chosen = read_methods(methods.split(","), settings)
    names = [name for name in (*suite.split(","), *prompts.split(",")) if name.strip()]
    read = read_suites(names, suites, fetch)
    calibration = read_suites([svip_fit], suites, fetch)[0] if svip_fit else None
    model = load_target(target, dtype, device, threads, revision, trust_remote_code, quantize=quantize)
    folders = named_folders(draft or [])
    drafts = {name: load_draft(folder, model) for name, folder in folders.items()}
    digests = {name: digest_of_model(folder) for name, folder in folders.items()}
    if peers is None:
        peers = "transformers" if batch == 1 and quantize is None else ""
    elif quantize is not None and peers:
        raise InputError("other libraries would run the full weights: leave --peers out where --quantize is given")
    asked = [name for name in peers.split(",") if name.strip()]
    others = make_peers(asked, PeerSource(target, model, folders, draft_length))
    plan = Plan(model, drafts, digests, chosen, read, settings, others, calibration)
    with tempfile.TemporaryDirectory() as scratch, only_writer(out or Path(scratch) / "run"):
        folder = RunFolder(out or Path(scratch) / "run", plan.identity())
        try:
            run(plan, folder, command_line())
        except OutputError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            if out is not None:
                print(f"stopped; the same command goes on from {out}", file=sys.stderr)
            raise
        finally:
            if folder.measured.lines:
                summary = summarise(folder)
                write_json(folder.path / "summary.json", summary)
        if as_json:
            print(json.dumps(summary, indent=1))
        else:
            show(summary)
