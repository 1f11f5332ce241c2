"""`glidecape demo`: plain decoding and GliDe methods race on a real model, token for token equal."""

from __future__ import annotations

import json
from contextlib import nullcontext
from importlib import resources
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text

from .batch.text import TextStream
from .chat.figures import COLOURS
from .core.params import SamplingParams
from .core.stats import Stats
from .drafting.drafter import Drafter
from .drafting.methods import make_drafter
from .drafts.checkpoint import load_draft
from .engine.decode import decode
from .errors import InputError
from .shipped import shipped_pair
from .tables import TextTable, millions, several
from .target.packages import have_compiler
from .target.target import Target

HEATS, SEED = (0.0, 0.8), 7  # temperatures that are raced at, and the seed of all racers
SHOWN = 160  # characters of the prompt, before what follows it


def _stream(
    target: Target, drafter: Drafter, prompt: str, params: SamplingParams, stats: Stats, console: Console
) -> list[int]:
    """Decode one prompt, each token coloured by its origin as it comes; returns the tokens."""
    tokens: list[int] = []
    shown, ids = Text(prompt[-SHOWN:], style="dim"), target.encode(prompt)
    stream = TextStream(target.tokenizer, prompt=ids)
    with Live(console=console, refresh_per_second=12) if console.is_terminal else nullcontext() as live:
        for event in decode(target, drafter, [ids], params, stats):
            tokens += event.tokens
            for i, (token, origin) in enumerate(zip(event.tokens, event.origins, strict=True), 1):
                ended = event.finish is not None and i == len(event.tokens)
                shown.append(stream.push([token], ended), style=COLOURS[origin])
            if live is not None:
                live.update(shown)
    if live is None:
        console.print(shown, soft_wrap=True)
    return tokens


def _race(
    target: Target, racers: dict[str, Drafter], prompts: list[str], params: SamplingParams, console: Console
) -> bool:
    """Let each racer decode each prompt, and print a table; returns whether all outputs were equal."""
    heat = "greedy" if params.greedy else f"T={params.temperature:g}, seed {params.seed}"
    stats = {name: Stats() for name in racers}
    equal = dict.fromkeys(racers, True)
    for number, prompt in enumerate(prompts, 1):
        expected: list[int] | None = None
        for name, drafter in racers.items():
            heading = f"prompt {number}, {heat}, {name}"
            if console.is_terminal:
                console.rule(heading, align="left", style="dim")
            else:
                console.print(f"--- {heading}")
            tokens = _stream(target, drafter, prompt, params, stats[name], console)
            expected = tokens if expected is None else expected
            equal[name] = equal[name] and tokens == expected
    pace = stats["plain"].tokens_per_s
    rows = [
        [
            name,
            f"{one.tokens_per_s:.0f}",
            f"{one.tokens_per_s / pace:.2f}x",
            f"{one.acceptance_length:.2f}",
            "yes" if equal[name] else "NO",
        ]
        for name, one in stats.items()
    ]
    heads = ["method", "tokens/s", "speed-up", "acceptance length", "outputs equal"]
    TextTable(f"{heat}, batch 1; prefill not counted", heads, rows).print(console)
    return all(equal.values())


def _races(
    target: Target, racers: dict[str, Drafter], heats: list[SamplingParams], mode: str, console: Console
) -> tuple[bool, bool]:
    """Race greedily and sampled, by compiled programs if `mode` finds or makes them: were all outputs equal, and was it so?"""
    prompts: list[str] = json.loads(resources.files("glidecape").joinpath("demo_prompts.json").read_text())
    fast = mode != "off" and target.compile(mode, console.print)
    for drafter in racers.values() if fast else ():
        drafter.compile(mode, console.print)
    console.print(
        f"[bold]GlideCape[/]: {millions(target.num_parameters)} parameters, float32, "
        f"{several(torch.get_num_threads(), 'thread')}, {'compiled' if fast else 'eager'}. "
        "Tokens: [green]drafted chain[/], [magenta]CaPE sibling[/], target's own (plain)."
    )
    for drafter in racers.values():  # warm-up, not counted
        for _ in decode(target, drafter, [target.encode(prompts[0])], SamplingParams(max_new_tokens=12)):
            pass
    equal = [_race(target, racers, prompts, params, console) for params in heats]
    return all(equal), fast


def run_demo(
    target: Path | None, draft: Path | None, max_new_tokens: int = 96, threads: int = 0, compile: str = "auto"
) -> bool:
    """Print the races, greedy and sampled, and their tables; returns whether all outputs were equal."""
    if threads:
        torch.set_num_threads(threads)
    if (target is None) != (draft is None):
        raise InputError("the demo takes a pair: give both MODEL and --draft, or neither to use the shipped pair")
    if target is None or draft is None:
        target, draft = shipped_pair("name a pair, `glidecape demo MODEL --draft DRAFT`")
    console = Console()
    model = Target.from_pretrained(target, dtype=torch.float32)
    loaded = load_draft(draft, model)
    racers = {
        "plain": make_drafter("plain", None),
        "glide": make_drafter("glide", loaded, length=4),
        "glide+cape": make_drafter("glide+cape", loaded, length=4),
    }
    heats = [SamplingParams(heat, seed=SEED, max_new_tokens=max_new_tokens, ignore_eos=True) for heat in HEATS]

    equal, fast = _races(model, racers, heats, "kept" if compile == "auto" else compile, console)
    if compile == "auto" and not fast and have_compiler():
        console.print(
            "[bold]The same in machine code for this processor.[/] Compiling takes two to four minutes, once; "
            "to leave it out: glidecape demo --compile off"
        )
        del racers["glide+cape"]  # its siblings do not pay there, and would take another program
        equal &= _races(model, racers, heats, "on", console)[0]
    return equal
