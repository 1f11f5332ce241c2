"""The command `glidecape`. Heavy imports happen inside the commands, so that `--help` is instant."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .commands.bench import bench
from .commands.certify import certify
from .commands.plan import plan
from .commands.shared import (
    Device,
    Dtype,
    Revision,
    TargetName,
    Threads,
    Trust,
    command_line,
    load_target,
    parse_bins,
    read_prompts,
)
from .errors import GlideCapeError, InputError

if TYPE_CHECKING:
    pass

app = typer.Typer(
    help="Lossless speculative decoding with GliDe, CaPE and SVIP: the target's own output, sooner.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Make training corpora.", no_args_is_help=True)
app.add_typer(data_app, name="data")
for _one in (bench, certify, plan):
    app.command()(_one)


@app.command()
def generate(
    target: TargetName,
    draft: Annotated[
        str | None, typer.Option(help="GliDe draft, or a draft LM for vanilla: folder or Hub name.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="plain, lookup, vanilla or glide; the last two also +cape or +beam, and +svip or +heuristic."
        ),
    ] = "glide+cape",
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt; repeat for several.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="A text file (one prompt) or .jsonl with a prompt column.")
    ] = None,
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
        int, typer.Option(help="Tokens drafted a round, without SVIP; the first one with heuristic.")
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
        str, typer.Option(help="Whose entropy, with beam: best, mean or min of the frontier.")
    ] = "best",
    beams: Annotated[int, typer.Option(help="Nodes a depth with beam.")] = 4,
    lookup_ngram: Annotated[int, typer.Option(help="Longest match of prompt lookup.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a prompt instead of text.")] = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    threads: Threads = 0,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Complete prompts, from --prompt, --file or standard input."""
    from .drafting.methods import DRAFTLESS, make_drafter, parse_method
    from .models.checkpoint import load_draft
    from .sampling import SamplingParams
    from .show import show

    base, _ = parse_method(method)
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
    model = load_target(target, dtype, device, threads, revision, trust_remote_code)
    loaded = load_draft(draft, model) if draft is not None and base not in DRAFTLESS else None
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
    )
    if svip_fit is not None:
        from .fit import with_fitted_threshold

        drafter, fit = with_fitted_threshold(
            model, drafter, [model.encode(text) for text in read_prompts(None, svip_fit)], params[0]
        )
        print(f"[svip threshold {fit.threshold}, {fit.speedup:.2f}x expected]", file=sys.stderr)
    show(model, drafter, prompts, params, batch, method, as_json)


def _bias(items: list[str]) -> dict[int, float]:
    try:
        return {int(token): float(value) for token, _, value in (item.partition("=") for item in items)}
    except ValueError:
        raise InputError(f"--logit-bias takes ID=NUMBER, such as 42=-5, not '{' '.join(items)}'") from None


def _check_kind(base: str, loaded: Any, name: str | None) -> None:
    from .models.glide import GlideDraft

    if loaded is None:
        return
    if (base == "glide") != isinstance(loaded, GlideDraft):
        kind = "a GliDe draft" if isinstance(loaded, GlideDraft) else "a causal LM"
        fit = "glide, glide+cape, …" if isinstance(loaded, GlideDraft) else "vanilla, vanilla+svip, …"
        raise InputError(f"{name} holds {kind}, which does not fit --method {base}: use {fit}, or name another draft")


@app.command()
def train(
    target: TargetName,
    data: Annotated[Path, typer.Option(help="Corpus folder, .jsonl(.gz) with text/prompt/messages, or text files.")],
    out: Annotated[Path, typer.Option(help="Folder of the draft; an interrupted run there goes on.")],
    kind: Annotated[
        str, typer.Option(help="glide, glide-no-cross (the ablation) or lm (an independent LM).")
    ] = "glide",
    preset: Annotated[str, typer.Option(help="default, or paper: the paper's own choices.")] = "default",
    loss: Annotated[str, typer.Option(help="kl, rkl, tv or ce; several joined by +.")] = "kl",
    lags: Annotated[str, typer.Option(help="block-random, block (the paper's), balanced or shift.")] = "block-random",
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on, such as 4e6.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time to train; the first limit reached ends it.")] = None,
    max_lag: Annotated[int, typer.Option(help="Deepest draft to train for; 0: the preset's.")] = 0,
    length: Annotated[int, typer.Option(min=16, help="Window in tokens.")] = 256,
    rows: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 16,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    optimizer: Annotated[str, typer.Option(help="adamw, or muon for the hidden matrices.")] = "adamw",
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of --rows windows a step.")] = 1,
    clip: Annotated[float, typer.Option(min=0, help="Largest norm of a step's gradient; 0: any.")] = 1.0,
    loss_on: Annotated[
        str, typer.Option(help="all tokens, or completion: of prompt+completion and chat data.")
    ] = "all",
    preview: Annotated[bool, typer.Option("--preview", help="Show a window with its loss mask, and exit.")] = False,
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile the draft.")] = False,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between saves; a killed run loses no more.")] = 300,
    seed: int = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    threads: Threads = 0,
    revision: Revision = None,
    trust_remote_code: Trust = False,
) -> None:
    """Train a draft for a frozen target. Its keys and values are made on the fly; nothing is stored."""
    from .train.draft import DraftRecipe, preview_data, train_draft

    muon = _is_muon(optimizer)
    recipe = DraftRecipe(kind, preset, loss, max_lag, length, rows, rate, muon, seed, lags, loss_on, accumulate, clip)
    budget = None if preview else _budget(tokens, minutes)
    model = load_target(target, dtype, device, threads, revision, trust_remote_code, pack=False)
    if budget is None:
        print(preview_data(model, data, recipe))
        return
    train_draft(model, data, out, recipe, budget, command_line(), save_every_s=save_every, compile_model=compile_model)


def _is_muon(optimizer: str) -> bool:
    if optimizer not in ("adamw", "muon"):
        raise InputError(f"unknown optimizer '{optimizer}': choose adamw or muon")
    return optimizer == "muon"


def _budget(tokens: float | None, minutes: float | None) -> Any:
    from .train.loop import Budget

    if not tokens and not minutes:
        raise InputError("give --tokens or --minutes: training has no other end")
    return Budget(int(tokens) if tokens else None, minutes)


@app.command("train-target")
def train_target_command(
    data: Annotated[Path, typer.Option(help="Corpus folder made by `glidecape data pysource`.")],
    out: Annotated[Path, typer.Option(help="Model folder; an interrupted run there goes on.")],
    tokens: Annotated[float | None, typer.Option(help="Tokens to train on, such as 2e7.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Time to train; the first limit reached ends it.")] = None,
    layers: int = 6,
    width: int = 384,
    ffn: int = 1024,
    heads: int = 6,
    kv_heads: int = 6,
    context: Annotated[int, typer.Option(help="Longest sequence that the model declares.")] = 8192,
    rope_theta: Annotated[float, typer.Option(help="Base of the rotary embedding.")] = 1e5,
    length: Annotated[int, typer.Option(min=16, help="Window in tokens.")] = 512,
    rows: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 16,
    long_length: Annotated[int, typer.Option(help="Window at the end of the run.")] = 2048,
    long_share: Annotated[float, typer.Option(min=0, max=1, help="Share of the run with long windows.")] = 0.1,
    rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 3e-3,
    compile_model: Annotated[bool, typer.Option("--compile", help="torch.compile: about a quarter faster.")] = False,
    save_every: Annotated[float, typer.Option(min=0, help="Seconds between saves; a killed run loses no more.")] = 300,
    seed: int = 0,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Train a small Llama-architecture target from scratch, for a machine without any model."""
    import torch

    from .train.target import TargetShape, Windowing, train_target

    if threads:
        torch.set_num_threads(threads)
    if width % heads or heads % kv_heads:
        raise InputError(f"width {width} must be a multiple of heads {heads}, and heads of kv-heads {kv_heads}")
    shape = TargetShape(layers, width, ffn, heads, kv_heads, context, rope_theta)
    windowing = Windowing(length, rows, long_length, long_share)
    budget = _budget(tokens, minutes)
    train_target(data, out, shape, budget, windowing, rate, compile_model, device, seed, command_line(), save_every)


@data_app.command()
def pysource(
    out: Annotated[Path, typer.Option(help="Corpus folder to write.")],
    root: Annotated[
        list[Path] | None, typer.Option(help="Folder of Python packages; repeat. Default: site-packages.")
    ] = None,
    hold_out: Annotated[str, typer.Option(help="Packages kept out of training, joined by commas.")] = "",
    vocab_size: Annotated[int, typer.Option(min=512, max=65_535)] = 4096,
    max_bytes: Annotated[float | None, typer.Option(help="Training text at most, such as 9e7.")] = None,
) -> None:
    """Tokenize the Python sources of installed packages: a corpus without any download."""
    from .train.corpus import build_pysource

    held = tuple(name for name in hold_out.split(",") if name)
    counts = build_pysource(out, root, held, vocab_size, int(max_bytes) if max_bytes else None)
    print(json.dumps(counts))


@app.command()
def demo(
    target: Annotated[
        Path | None, typer.Option(help="Model folder; default: the pair shipped in the checkout.")
    ] = None,
    draft: Annotated[Path | None, typer.Option(help="Its GliDe draft.")] = None,
    max_new_tokens: int = 96,
    threads: Threads = 0,
) -> None:
    """Plain decoding and GlideCape side by side on the shipped model: same tokens, less time."""
    from .demo import run_demo

    run_demo(target, draft, max_new_tokens, threads)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from importlib.metadata import version as installed

        print(installed("glidecape"))
        raise typer.Exit


def main() -> None:
    """Entry point: errors meant for users become one sentence and exit code 2."""
    warnings.showwarning = lambda message, *_, **__: print(f"note: {message}", file=sys.stderr)
    try:
        app()
    except GlideCapeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except MemoryError:
        print("error: out of memory: lower the batch, the window or max_new_tokens", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
