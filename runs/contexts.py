"""Acceptance by the length of the context: the same places of held-out text, with more and more of what comes before.

    python runs/contexts.py text runs/out/contexts/text.jsonl
    python runs/contexts.py measure models/pysource/target --draft glide=models/pysource/glide --output runs/out/contexts/glide

`text` writes Python sources of the installed packages, to train small drafts on. `measure` takes one place in each of some
files of Python's own library, which are in no training corpus, and what comes before it as a prompt, so much that prompt
and 64 new tokens fill a context of 256, 512, … tokens. For each context:

- perplexity of the target on the prompt's last 128 tokens, the same tokens in all contexts;
- agreement of each draft at lags 1 to 4: how often draft and target have the same most likely token at those 128 places,
  and overlap: the chance that a token drawn from the draft is accepted at temperature 1;
- acceptance length of a chain of 4, greedily, on the 64 tokens that are decoded from the place on, and how many of those
  continuations loop.

Drafts are of one layer with a window of 128 tokens at most: their keys then depend on the last 256 tokens only, and those
alone are run. Two drafts whose names end in the same number, such as zero-0 and moved-0, are compared by `summary`.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import random
import sysconfig
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glidecape import SamplingParams, Stats, Target, load_draft, make_drafter
from glidecape.core.stats import loops
from glidecape.drafts.glide.network import GlideModel
from glidecape.engine.decode import engine_of, new_rows
from glidecape.engine.round import run_round
from glidecape.significance import paired_permutation
from glidecape.tables import TextTable

HELD_OUT = {"flask", "networkx", "rich"}  # as the shipped target's
TEXT_BYTES = 3e6
CONTEXTS = (256, 512, 1024, 2048, 4096, 8192)
NEW, SCORED, LAGS = 64, 128, 4


def write_text(out: Path) -> None:
    """Files of all installed packages in a fixed random order, one a row, `TEXT_BYTES` in all."""
    names = sorted(set(importlib.metadata.packages_distributions()) - HELD_OUT)
    root, left = Path(sysconfig.get_paths()["purelib"]), TEXT_BYTES
    files = sorted(path for name in names for path in (root / name).rglob("*.py"))
    random.Random(0).shuffle(files)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as lines:
        for path in files:
            text = path.read_text(encoding="utf-8", errors="ignore")
            if left > 0 and 500 < len(text) < 200_000:
                lines.write(json.dumps({"text": text}) + "\n")
                left -= len(text)


def places(target: Target, count: int, longest: int) -> list[list[int]]:
    """`longest` tokens up to a place in each of `count` files of Python's own library.

    Files and places follow from hashes of the files' names, so one Python version gives one list.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [p for p in root.rglob("*.py") if not {"site-packages", "idlelib", "test", "tests"} & set(p.parts)]
    named = sorted((hashlib.sha256(str(p.relative_to(root)).encode()).hexdigest(), p) for p in files)
    found: list[list[int]] = []
    for digest, path in named:
        text = path.read_text(encoding="utf-8", errors="ignore")
        if len(text) > 2 * longest and len(tokens := target.encode(text)) > longest:  # fewer characters never suffice
            end = longest + int(digest[:8], 16) % (len(tokens) - longest)
            found.append(tokens[end - longest : end])
        if len(found) == count:
            break
    return found


@torch.no_grad()
def read(target: Target, prompt: list[int]) -> Any:
    """A cache that holds a prompt but for the tokens that are scored."""
    cache = target.new_cache(1, len(prompt))
    target.prefill([prompt[: len(prompt) - SCORED + 1]], cache)
    return cache


@torch.no_grad()
def teacher_forced(target: Target, networks: dict[str, GlideModel], prompt: list[int], cache: Any) -> dict[str, Any]:
    """Mean negative logarithm of the last tokens' probabilities, and of each draft agreement and overlap by lag there.

    The cache is that of `read`; it holds the whole prompt afterwards.
    """
    tail = torch.tensor([prompt[-SCORED:]])
    at = torch.arange(len(prompt) - SCORED, len(prompt))[None]
    logits = target.forward(tail, at, cache).logits[0].float()
    cache.commit([SCORED])
    nll = torch.nn.functional.cross_entropy(logits[:-1], tail[0, 1:])
    found: dict[str, Any] = {"nll": float(nll)}
    for name, network in networks.items():
        found[name] = by_lag(network, prompt, cache, logits)
    return found


def by_lag(network: GlideModel, prompt: list[int], cache: Any, logits: Tensor) -> dict[str, list[float]]:
    """Agreement and overlap of a draft's laws with `logits (scored, vocab)` at lags 1, 2, …"""
    config, first = network.config, max(0, len(prompt) - 2 * SCORED)
    if config.layers > 1 or config.glimpse or not 0 < config.window <= SCORED:
        raise SystemExit(
            "only GliDe drafts of one layer are compared, without a glimpse and with a window of 1 to 128 tokens"
        )
    tokens, at = torch.tensor([prompt[first:]]), torch.arange(first, len(prompt))[None]
    kv = {layer: cache.committed(layer) for layer in config.layers_read}
    law, best = logits.softmax(-1), logits.argmax(-1)
    found: dict[str, list[float]] = {"agreement": [], "overlap": []}
    for lag in range(1, LAGS + 1):
        drafted = network.logits(network.hidden(tokens, at, kv, at + 1 - lag)[:, -SCORED:])[0].float()
        found["agreement"].append(float((drafted.argmax(-1) == best).float().mean()))
        found["overlap"].append(float(torch.minimum(drafted.softmax(-1), law).sum(-1).mean()))
    return found


@torch.no_grad()
def decode(target: Target, drafter: Any, prompt: list[int], cache: Any) -> tuple[list[int], Stats]:
    """The tokens after a prompt and the counts of their rounds; what `cache` holds of the prompt is not read again."""
    stats, rows = Stats(), new_rows(target, [prompt], SamplingParams(max_new_tokens=NEW, ignore_eos=True))
    engine = engine_of(target, drafter, rows, 1)
    batch, known = engine.batch, len(prompt) - SCORED
    batch.admit(rows[0])
    batch.use(0, 1)
    for layer in range(len(target.shapes)):
        batch.cache.own_keys[layer][:, :, :known] = cache.own_keys[layer][:, :, :known]
        batch.cache.own_values[layer][:, :, :known] = cache.own_values[layer][:, :, :known]
    batch.cache.commit([known])
    while engine.read_prompts():
        pass
    tokens: list[int] = []
    while len(tokens) < NEW:
        for event in run_round(target, drafter, batch, stats):
            tokens += event.tokens
    return tokens, stats


def measure(
    target: Target, drafts: dict[str, Any], texts: list[list[int]], context: int, decoded: int
) -> list[dict[str, Any]]:
    """What each prompt gives in this context; the first `decoded` are decoded from, too."""
    found = []
    for number, text in enumerate(texts):
        prompt = text[len(text) - (context - NEW) :]
        cache = read(target, prompt)
        one = teacher_forced(target, {name: draft.module for name, draft in drafts.items()}, prompt, cache)
        for name, draft in drafts.items() if number < decoded else ():
            drafter = make_drafter("glide+chain", draft, length=LAGS)
            tokens, stats = decode(target, drafter, prompt, cache)
            one[name] |= {"rounds": stats.rounds, "emitted": stats.emitted}
            one["loops"] = loops(tokens)  # the same for every draft: the output is the target's
        found.append(one)
    return found


def table(results: dict[int, list[dict[str, Any]]], names: list[str]) -> TextTable:
    """A row for each context and draft."""
    heads = ["context", "draft", "perplexity", "loops", "acceptance length"]
    heads += [f"agreement at lag {lag}" for lag in range(1, LAGS + 1)] + ["overlap at lag 1"]
    rows = []
    for context, found in results.items():
        perplexity = math.exp(float(np.mean([one["nll"] for one in found])))
        decoded = [one for one in found if "loops" in one]
        loop = f"{sum(one['loops'] for one in decoded)} of {len(decoded)}"
        for name in names:
            agreement = np.mean([one[name]["agreement"] for one in found], 0)
            row = [f"{context:,}", name, f"{perplexity:.1f}", loop, f"{accepted(decoded, [name]):.2f}"]
            overlap = np.mean([one[name]["overlap"][0] for one in found])
            rows.append([*row, *(f"{share:.3f}" for share in agreement), f"{overlap:.3f}"])
    return TextTable("Acceptance by context length", heads, rows)


def accepted(found: list[dict[str, Any]], names: list[str]) -> float:
    """Acceptance length over these prompts and drafts."""
    emitted, rounds = (sum(one[name][what] for one in found for name in names) for what in ("emitted", "rounds"))
    return float(emitted / rounds) if rounds else math.nan


def summary(results: dict[int, list[dict[str, Any]]], names: list[str]) -> TextTable:
    """Kinds of drafts over their seeds, and p of the paired permutation test over prompts against the first kind."""
    kinds: dict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[name.rpartition("-")[0] or name].append(name)
    heads = ["context", "draft", "acceptance length", "p", "agreement at lags 1 to 4", "p", "overlap at lag 1", "p"]
    rows = []
    for context, found in results.items():
        base: list[list[float]] = []
        decoded = [one for one in found if "loops" in one]
        for kind, seeds in kinds.items():
            figures = [
                [accepted([one], seeds) for one in decoded],
                [float(np.mean([one[name]["agreement"] for name in seeds])) for one in found],
                [float(np.mean([one[name]["overlap"][0] for name in seeds])) for one in found],
            ]
            base = base or figures
            tests = [
                f"{paired_permutation(a, b):.2g}" if a is not b else "" for a, b in zip(base, figures, strict=True)
            ]
            means = [f"{accepted(decoded, seeds):.2f}", *(f"{np.mean(one):.3f}" for one in figures[1:])]
            rows.append([f"{context:,}", kind, *(cell for pair in zip(means, tests, strict=True) for cell in pair)])
    return TextTable("Kinds of drafts by context length", heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("text").add_argument("output", type=Path)
    measured = commands.add_parser("measure")
    measured.add_argument("target", type=Path)
    measured.add_argument("--draft", action="append", required=True, help="NAME=FOLDER; repeat")
    measured.add_argument("--output", type=Path, required=True, help="folder of the figures and tables")
    measured.add_argument("--prompts", type=int, default=16)
    measured.add_argument(
        "--decoded", type=int, default=16, help="on how many of the prompts the drafts are decoded, too"
    )
    measured.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.command == "text":
        write_text(args.output)
        return
    torch.set_num_threads(args.threads)
    target = Target.from_pretrained(args.target, dtype="float32")
    named = dict(one.split("=", 1) for one in args.draft)
    drafts = {name: load_draft(folder, target) for name, folder in named.items()}
    if others := [name for name, draft in drafts.items() if not isinstance(draft.module, GlideModel)]:
        raise SystemExit(f"{others[0]} is no GliDe draft: only those are measured")
    contexts = [one for one in CONTEXTS if one <= target.context]
    texts = places(target, args.prompts, contexts[-1] - NEW)
    args.output.mkdir(parents=True, exist_ok=True)
    results: dict[int, list[dict[str, Any]]] = {}
    for context in contexts:
        started = time.monotonic()
        results[context] = measure(target, drafts, texts, context, args.decoded)
        print(f"{context}: {time.monotonic() - started:.0f} s", flush=True)
        written = [table(results, list(drafts)), summary(results, list(drafts))]
        (args.output / "contexts.json").write_text(json.dumps({"drafts": named, "contexts": results}) + "\n")
        (args.output / "contexts.md").write_text("\n\n".join(one.markdown() for one in written) + "\n")
    print((args.output / "contexts.md").read_text())


if __name__ == "__main__":
    main()
