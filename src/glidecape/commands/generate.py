"""`glidecape generate`: complete prompts with any method."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from .effects import note_unused, refuse_unused, typed
from .shared import Device, Dtype, Quantize, Revision, TargetName, Threads, Trust, load_target, parse_bins, read_prompts


def generate(
    ctx: typer.Context,
    target: TargetName,
    draft: Annotated[
        str | None, typer.Option(help="GliDe, EAGLE or Medusa draft, or a draft LM for vanilla: folder or Hub name.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="plain, lookup, vanilla, glide, eagle or medusa. All but the first two also +chain, +cape, +beam, +tree "
            "(EAGLE-2's, usual for eagle) or +static (EAGLE-1's, usual for medusa), and +svip or +heuristic."
        ),
    ] = "glide+cape",
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeat for several.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="A text file (one prompt), or .jsonl with text, prompt or messages; a row's own answer is left out.",
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Prompts are a user's messages: apply the tokenizer's chat template.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Prompts decoded side by side.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to emit at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="1: all.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Row i of the prompts uses seed + i.")] = 0,
    sampling: Annotated[
        str, typer.Option(help="noise: same seed, same text with any method. residual: papers' rule.")
    ] = ("noise"),
    stop_token: Annotated[list[int] | None, typer.Option(help="Token id that ends a row; repeat for several.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a row, left out; repeat for several.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after end-of-text.")] = False,
    min_new_tokens: Annotated[int, typer.Option(help="Nothing ends a row before.")] = 0,
    min_p: Annotated[float, typer.Option(help="Keep tokens of this share of the largest probability; 0: all.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="On tokens of prompt and output; 1: off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="On tokens of the output, once; 0: off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="On tokens of the output, each time; 0: off.")] = 0.0,
    logit_bias: Annotated[list[str] | None, typer.Option(help="ID=NUMBER added to a token's logit; repeat.")] = None,
    draft_length: Annotated[
        int, typer.Option(help="Tokens drafted a round, or a tree's depth, without SVIP; the first one with heuristic.")
    ] = 5,
    cape_bins: Annotated[
        str, typer.Option(help="Siblings by confidence: paper, small, or numbers like 7,5,3,1.")
    ] = "paper",
    svip_threshold: Annotated[float, typer.Option(help="Stop drafting when sqrt(0.15 entropy) is above.")] = 0.3,
    svip_fit: Annotated[
        Path | None, typer.Option(help="Prompts to fit the threshold on first; .jsonl, or a text file.")
    ] = None,
    svip_cap: Annotated[
        int, typer.Option(help="Tokens at most with svip or heuristic; the draft's max lag also holds.")
    ] = 40,
    svip_over: Annotated[
        str, typer.Option(help="Whose entropy, with beam or a tree: best, mean or min of the frontier.")
    ] = "best",
    beams: Annotated[int, typer.Option(help="Nodes a depth with beam.")] = 4,
    tree_top: Annotated[
        int, typer.Option(help="With tree or static: choices of a node that go on; with tree also nodes run a depth.")
    ] = 10,
    tree_total: Annotated[int, typer.Option(help="Nodes verified with tree or static, the root included.")] = 60,
    lookup_ngram: Annotated[int, typer.Option(help="Longest match of prompt lookup.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt instead of text.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    threads: Threads = 0,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Complete prompts, from --prompt, --file or standard input."""
    from ..core.sampling import SamplingParams
    from ..drafting.methods import DRAFTLESS, make_drafter, parse_method
    from ..drafts.checkpoint import load_draft
    from ..show import show

    base, _ = parse_method(method)
    refuse_unused(ctx, [method])
    note_unused(ctx, method, temperature)
    prompts = read_prompts(prompt, file)
    params = [
        SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed + i,
            max_new_tokens=max_new_tokens,
            stop_token_ids=tuple(stop_token or ()),
            ignore_eos=ignore_eos,
            sampling=sampling,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=_bias(logit_bias or []),
            stop=tuple(stop or ()),
            min_new_tokens=min_new_tokens,
        )
        for i in range(len(prompts))
    ]
    bins = parse_bins(cape_bins)
    model = load_target(target, dtype, device, threads, revision, trust_remote_code, quantize=quantize)
    loaded = load_draft(draft, model) if draft is not None and base not in DRAFTLESS else None
    if loaded is not None and typed(ctx, "draft_length") and draft_length > loaded.max_lag:
        print(
            f"note: this draft was trained for {loaded.max_lag} tokens a round, so it drafts no more", file=sys.stderr
        )
    _check_kind(base, loaded, draft)
    drafter = make_drafter(
        method,
        loaded,
        draft_length,
        bins,
        svip_threshold,
        svip_cap,
        over=svip_over,
        beams=beams,
        ngram=lookup_ngram,
        top=tree_top,
        total=tree_total,
    )
    if svip_fit is not None:
        from ..fit import with_fitted_threshold

        drafter, fit = with_fitted_threshold(
            model, drafter, [one.ids(model, chat) for one in read_prompts(None, svip_fit)], params[0]
        )
        print(f"[svip threshold {fit.threshold}, {fit.speedup:.2f}x expected]", file=sys.stderr)
    show(model, drafter, prompts, params, batch, method, as_json, chat)


def _bias(items: list[str]) -> tuple[tuple[int, float], ...]:
    try:
        return tuple((int(token), float(value)) for token, _, value in (item.partition("=") for item in items))
    except ValueError:
        raise InputError(f"--logit-bias takes ID=NUMBER, such as 42=-5, not '{' '.join(items)}'") from None


def _check_kind(base: str, loaded: Any, name: str | None) -> None:
    from ..drafting.methods import WANTS

    if loaded is not None and loaded.base != base:
        fit = f"{loaded.base}, {loaded.base}+svip, …"
        raise InputError(
            f"{name} holds {WANTS[loaded.base]}, which does not fit --method {base}: use {fit}, or name another draft"
        )
