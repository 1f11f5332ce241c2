"""`glidecape certify`: every method's output against plain decoding and transformers, on the user's own pair."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from ..core.params import SamplingParams
from ..errors import InputError
from ..progress import bar
from .effects import need_draft, note_unused
from .shared import (
    AsJson,
    ConstraintOptions,
    Drafts,
    Output,
    ServingMachine,
    TargetOrShipped,
    load_drafts,
    named_folders,
    opened,
    pair_or_shipped,
    read_prompts,
    short,
)

if TYPE_CHECKING:
    from ..certify import Finding
    from ..drafting.drafter import Drafter

Batch = Annotated[
    int, typer.Option(min=1, help="Prompts decoded side by side; each is compared with the same prompt decoded alone.")
]


def certify(
    ctx: typer.Context,
    target: TargetOrShipped = None,
    draft: Drafts = None,
    methods: Annotated[
        str, typer.Option(help="all, or names joined by commas; NAME:method uses the draft of that name.")
    ] = "all",
    prompts: Annotated[
        Path | None, typer.Option(help=".jsonl with a prompt column, or a text file; default: built in.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0: greedy.")] = 0.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of each output.")] = 64,
    seed: Annotated[int, typer.Option(help="Prompt i uses seed + i.")] = 0,
    batch: Batch = 1,
    constraint: ConstraintOptions = ConstraintOptions(),
    as_json: AsJson = False,
    output: Output = None,
    machine: ServingMachine = ServingMachine(),
) -> None:
    """Check each method against plain decoding and transformers; exit code 1 on a real difference.

    Every output is equal, a near-tie (rounding explains the first differing token), or a bug. The target is loaded twice.
    """
    from ..certify import BUG, PROMPTS
    from ..certify import certify as run

    asked = _asked(methods)
    note_unused(ctx, asked, temperature)
    params = SamplingParams(temperature, seed=seed, max_new_tokens=max_new_tokens, constraint=constraint.read())
    texts = list(PROMPTS) if prompts is None else [prompt.text for prompt in read_prompts(None, prompts)]
    target, drafts = pair_or_shipped(target, draft or [])
    with opened(output) as out:
        folders = named_folders(drafts if need_draft(asked) else [])
        model = machine.load(target)
        drafters = make_drafters(methods, load_drafts(folders, model))
        # What a round costs decides what auto drafts, never what is written: a guess will do.
        machine.compile_models(model, drafters.values(), len(texts) * max_new_tokens * len(drafters), price=False)
        with bar(f"loading {short(target)} for transformers"):
            reference = _reference(target, model.dtype, machine)
        with bar("certifying", (len(drafters) + ("plain" not in drafters)) * len(texts)) as shown:
            findings = run(model, reference, drafters, texts, params, batch, shown.at)
        dtype = str(model.dtype).removeprefix("torch.")
        if as_json:
            report: dict[str, Any] = {
                "target": target,
                "drafts": folders,
                "dtype": dtype,
                "temperature": temperature,
                "max_new_tokens": max_new_tokens,
                "prompts": len(texts),
                "batch": batch,
                "constraint": None if params.constraint is None else asdict(params.constraint),
                "verdict": worst(findings),
                "findings": [finding.as_dict() for finding in findings],
            }
            print(json.dumps(report), file=out)
        else:
            print_table(findings, dtype, out)
    if worst(findings) == BUG:
        raise typer.Exit(1)


def _reference(target: str, dtype: Any, machine: ServingMachine) -> Any:
    """A second copy of the target, run by transformers alone."""
    from ..target.loading import load_model
    from ..target.quantize import quantize

    options = {"revision": machine.revision, "trust_remote_code": machine.trust_remote_code}
    model, _ = load_model(target, dtype, options, machine.device_map)
    if machine.device_map is not None:
        return model.eval()
    if machine.quantize is not None:
        quantize(model, machine.quantize)
    return model.eval().to(machine.device)


def check_methods(methods: str) -> list[str]:
    """The names in `--methods`, where it is not "all".

    Raises:
        InputError: an unknown one.
    """
    from ..drafting.methods import parse_method

    named = [] if methods == "all" else [item.strip() for item in methods.split(",")]
    for item in named:
        parse_method(item.rpartition(":")[2])
    return named


def _asked(methods: str) -> list[str]:
    """The methods in `--methods`, without the names of drafts.

    Raises:
        InputError: see `check_methods`.
    """
    from ..drafting.methods import METHODS

    return [item.rpartition(":")[2] for item in check_methods(methods)] or list(METHODS)


def make_drafters(methods: str, drafts: dict[str, Any]) -> dict[str, Drafter]:
    """The drafters of `--methods`, with loaded drafts by name; "all": plain, and every method that a draft there is for.

    Raises:
        InputError: an unknown method, or one whose draft is missing or of another kind.
    """
    from ..drafting.methods import DRAFTLESS, METHODS, base_for, make_drafter, parse_method

    if methods == "all":
        wanted = [one for one in METHODS if one.split("+")[0] in DRAFTLESS]
        for name, draft in drafts.items():
            base = base_for(draft.kind)
            label = "" if name == base else f"{name}:"
            wanted += [label + m for m in METHODS if m.split("+")[0] == base]
    else:
        wanted = check_methods(methods)
    made: dict[str, Drafter] = {}
    for item in wanted:
        key, _, method = item.rpartition(":")
        base, _added = parse_method(method)
        key = key or base
        if base not in DRAFTLESS and key not in drafts:
            raise InputError(f"'{item}' needs a draft named '{key}': give --draft {key}=FOLDER")
        made[item] = make_drafter(method, drafts.get(key))
    return made


def worst(findings: list[Finding]) -> str:
    """The worst verdict there is."""
    from ..certify import BUG, EQUAL, NEAR_TIE

    return max((f.verdict for f in findings), key=(EQUAL, NEAR_TIE, BUG).index, default=EQUAL)


MEANING = """\
index: the first new token that differs, counted from 0; expected and got are its ids.
gap: how far the lower of these two tokens' logits lies below the highest one.
error: how far our logits there are from those of transformers.
rounding: how far {dtype} may move a logit.
near-tie: a gap of at most twice the rounding, and an error of at most the rounding, so that
rounding alone may decide between the two tokens. Anything else is a bug."""


def print_table(findings: list[Finding], dtype: str, out: TextIO | None = None) -> None:
    """A row a method, then one for each output that is not equal, with what its columns mean; to `out` or standard output.

    Args:
        dtype: of the target, as users write it.
    """
    from ..certify import BUG, EQUAL, NEAR_TIE
    from ..tables import TextTable, wide_console

    console, verdicts = wide_console(out), (EQUAL, NEAR_TIE, BUG)
    by_method: dict[str, list[str]] = {}
    for f in findings:
        by_method.setdefault(f.method, []).append(f.verdict)
    counts = [[method, *(str(own.count(v)) for v in verdicts)] for method, own in by_method.items()]
    TextTable(f"prompts by verdict, in {dtype}", ["method", *verdicts], counts).print(console)
    exact = ["method", "prompt", "verdict", "against", "index", "expected", "got"]
    rounded = ["gap", "error", "rounding"]
    apart = [
        [*(str(getattr(f, name)) for name in exact), *(f"{getattr(f, name):.2g}" for name in rounded)]
        for f in findings
        if f.verdict != EQUAL
    ]
    if apart:
        TextTable("first differing tokens", [*exact, *rounded], apart).print(console)
        console.print(MEANING.format(dtype=dtype), soft_wrap=True, highlight=False)
    meaning = {
        EQUAL: "every output is the target's own",
        NEAR_TIE: "wherever outputs differ, two tokens are almost equally probable, and rounding decided",
        BUG: "an output is not the target's: please report it with this table",
    }
    console.print(f"verdict: {worst(findings)}\n({meaning[worst(findings)]})", soft_wrap=True)
    if worst(findings) == NEAR_TIE and dtype != "float32":
        console.print("--dtype float32 has fewer near-ties.", highlight=False)
