"""What a trained draft is worth: by the decode loop, by lag on held-out text, and as a curve in its folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..core.params import SamplingParams
from ..core.stats import Stats, loops
from ..drafting.drafter import Drafter
from ..drafting.methods import make_drafter
from ..engine.decode import decode, generate
from ..errors import DataError
from ..files import write_atomic
from ..progress import bar, note
from ..target.target import Target
from .kinds import training_of
from .loop import CURVE, PICTURE
from .teacher import Teacher


def evaluation_prompts(tokens: np.ndarray, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` prompts of `length` tokens from held-out text, at fixed random places."""
    if len(tokens) < 2 * length:
        raise DataError(
            f"only {len(tokens)} held-out tokens, and evaluation needs at least {2 * length}: give more text as --data"
        )
    starts = np.random.default_rng(seed).integers(0, len(tokens) - length, count)
    return [tokens[s : s + length].astype(int).tolist() for s in starts]


def trial_prompts(tokens: np.ndarray, count: int, context: int, seed: int) -> tuple[list[list[int]], int]:
    """What a trained draft is tried on: prompts of 128 held-out tokens and how many are decoded after each, 64; fewer where
    the target's context is short.

    Raises:
        DataError: too little held-out text.
    """
    new_tokens = min(64, context // 2)
    return evaluation_prompts(tokens, count, min(128, context - new_tokens), seed) if count else [], new_tokens


def evaluate_draft(
    target: Target, module: nn.Module, prompts: list[list[int]], new_tokens: int = 64
) -> dict[str, float]:
    """alpha and acceptance length of a chain of 5, by the real decode loop, greedy and at temperature 1."""
    figures: dict[str, float] = {}
    method, draft = training_of(module).joined()
    with bar("trying the draft", 2 * len(prompts)) as shown:
        for name, temperature in (("greedy", 0.0), ("t1", 1.0)):
            stats = Stats()
            params = SamplingParams(temperature=temperature, max_new_tokens=new_tokens, seed=1)
            for prompt in prompts:
                for _ in decode(target, make_drafter(method + "+chain", draft), [prompt], params, stats):
                    pass
                shown.advance()
            figures[f"alpha_{name}"] = round(stats.alpha, 4)
            figures[f"acceptance_length_{name}"] = round(stats.acceptance_length, 4)
    return figures


def stats_by_prompt(
    target: Target, drafter: Drafter, prompts: list[list[int]], params: SamplingParams, batch: int = 16
) -> list[Stats]:
    """The counts of each prompt's rounds. Prompts are decoded side by side, which changes no row's tokens."""
    each = [Stats() for _ in prompts]
    for first in range(0, len(prompts), batch):
        for event in decode(target, drafter, prompts[first : first + batch], params):
            if event.stats.emitted:
                each[first + event.row].add(event.stats)
    return each


def steady_prompts(
    target: Target, tokens: np.ndarray, count: int, length: int, new_tokens: int, batch: int = 16, most: int = 16
) -> tuple[list[list[int]], int]:
    """The first `count` prompts of held-out text whose greedy continuations don't loop (`stats.loops`).

    Prompts are drawn until there are as many, `most * count` at most.

    Returns:
        The prompts, and how many were drawn for them.
    Raises:
        DataError: every continuation loops.
    """
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    drawn = evaluation_prompts(tokens, most * count, length, 0)
    steady: list[list[int]] = []
    with bar("looking for prompts that don't loop", count) as shown:
        for first in range(0, len(drawn), batch):
            part = drawn[first : first + batch]
            for i, one in enumerate(generate(target, part, params=params)):
                if not loops(one.tokens):
                    steady.append(part[i])
                if len(steady) == count:
                    return steady, first + i + 1
            shown.at(len(steady))
    if not steady:
        raise DataError(f"all {len(drawn)} greedy continuations of {new_tokens} tokens loop: ask for fewer new tokens")
    return steady, len(drawn)


@torch.no_grad()
def figures_by_lag(
    target: Target, module: nn.Module | Target, tokens: np.ndarray, length: int, max_windows: int = 16
) -> dict[str, Any]:
    """How well the draft agrees with the target at each lag, teacher-forced on held-out text.

    Every position of a window from `max_lag` on is drafted once for each lag, so all lags are judged on the same
    positions. That is exact for a draft of one layer, whose own keys don't depend on lags; a second layer's are here those of
    the lag in question throughout. A draft that sees nothing of the target has no lag: its lists hold one number. So do
    EAGLE's, whose deeper nodes read what it guessed itself.

    Returns:
        lags: 1 .. max_lag; positions: how many each is judged on; overlap_by_lag: mean of sum min(p, q), the chance that
        a token drawn from the draft is accepted at temperature 1; greedy_acceptance_by_lag: how often both have the same
        most likely token. Empty when the text is shorter than a window.
    """
    training = training_of(module)
    lags, deepest = list(range(1, training.lags + 1)), training.deepest
    windows = min(max_windows, len(tokens) // length)
    if windows < 1 or length <= deepest:
        return {}
    teacher = Teacher(target, 1, length, hidden=training.reads_hidden)
    overlap, same = [0.0] * len(lags), [0] * len(lags)
    if isinstance(module, nn.Module):
        module.eval()
    with bar("comparing the draft with its target", windows) as shown:
        for at in np.linspace(0, len(tokens) - length, windows).astype(int):
            batch = torch.from_numpy(tokens[at : at + length].astype(np.int64))[None].to(target.device)
            output = teacher(batch)[0, deepest:]
            p = output.float().softmax(-1)
            by_lag = training.logits_by_lag(batch, teacher)
            for i, drafted in enumerate(logits[0, deepest:] for logits in by_lag):
                overlap[i] += float(torch.minimum(p, drafted.float().softmax(-1)).sum())
                same[i] += int((drafted.argmax(-1) == output.argmax(-1)).sum())
            shown.advance()
    count = windows * (length - deepest)
    return {
        "lags": lags,
        "positions": count,
        "overlap_by_lag": [round(value / count, 4) for value in overlap],
        "greedy_acceptance_by_lag": [round(value / count, 4) for value in same],
    }


def trained_on(target: Target, length: int) -> dict[str, Any]:
    """What a draft was trained with, kept among its figures, so that `glidecape doctor` can say what has changed since: tokens
    of a window, dtype of the target, digest of its chat template."""
    return {
        "length": length,
        "dtype": str(target.dtype).removeprefix("torch."),
        "chat_template": template_digest(target),
    }


def template_digest(target: Target) -> str | None:
    """sha256 of the tokenizer's chat template; None: it has none."""
    template = getattr(target.tokenizer, "chat_template", None)
    return hashlib.sha256(json.dumps(template, sort_keys=True).encode()).hexdigest() if template else None


def write_curve(folder: Path, losses: list[float], tokens: int, figures: dict[str, Any]) -> None:
    """The loss of each step and the figures by lag, as `curve.json`, and drawn as `curve.png` if matplotlib is there.

    Args:
        tokens: trained on in all; every step took as many.
    """
    each = tokens // max(1, len(losses))
    curve: dict[str, Any] = {"tokens_a_step": each, "loss": [round(value, 5) for value in losses]}
    curve |= {name: value for name, value in figures.items() if "lag" in name}
    write_atomic(folder / CURVE, lambda path: path.write_text(json.dumps(curve) + "\n"))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        note(f"no {PICTURE}: matplotlib is not installed (pip install matplotlib); the numbers are in {CURVE}")
        return
    picture = Figure(figsize=(10, 4), layout="constrained")
    left, right = picture.subplots(1, 2)
    steps = np.arange(1, len(losses) + 1) * each
    left.plot(steps, losses, linewidth=0.5, alpha=0.4, label="step")
    window = max(1, len(losses) // 50)
    if window > 1:
        smooth = np.convolve(losses, np.ones(window) / window, "valid")
        left.plot(steps[window - 1 :], smooth, label=f"mean of {window} steps")
    left.set(xlabel="tokens", ylabel="training loss (nats)")
    left.legend()
    for name, label in (
        ("overlap_by_lag", "overlap, temperature 1"),
        ("greedy_acceptance_by_lag", "greedy acceptance"),
    ):
        if name in figures:
            right.plot(figures["lags"], figures[name], marker="o", label=label)
    right.set(xlabel="lag (tokens)", ylabel="on held-out text", ylim=(0, 1))
    if "lags" in figures:
        right.legend()
    write_atomic(folder / PICTURE, lambda path: picture.savefig(path, format="png", dpi=120))
