"""What a round's time consists of: networks alone, bookkeeping around them, and padding that the networks compute.

.venv/bin/python runs/rounds.py --batch 4 --batch 16 --threads 2
.venv/bin/python runs/rounds.py --batch 1 --threads 2 --compile on --rounds 48

Two passes over the same prompts emit the same tokens. The first times whole rounds. The second times each call of a network
alone: it is made three times in a row, and the median counts. The last lines compare plain decoding with
`transformers.generate` on the same batch.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM

from glidecape import SamplingParams, Target, load_draft, make_drafter
from glidecape.bench.prompts import stdlib_prompts
from glidecape.core.cache import KVCache
from glidecape.drafting.drafter import NoDraft
from glidecape.engine.decode import start
from glidecape.engine.round import run_round


class Alone:
    """Calls a function three times and keeps the median time: the calls write the same numbers to the same slots."""

    def __init__(self, call):
        self.call, self.seconds, self.tokens = call, 0.0, 0

    def __call__(self, *args, **kwargs):
        caches = [one for one in (*args, *kwargs.values()) if isinstance(one, KVCache)]
        before = [(one, list(one.host_lengths), one.scratch) for one in caches]
        times = []
        for _ in range(3):
            for cache, lengths, scratch in before:
                cache.truncate(lengths)
                cache.scratch = scratch
            started = time.perf_counter()
            result = self.call(*args, **kwargs)
            times.append(time.perf_counter() - started)
            self.tokens += getattr(args[0], "tokens", args[0]).numel()  # a draft's queries, or tokens
        self.seconds += statistics.median(times)
        return result


def rounds(target, drafter, prompts, params, number):
    """The time of each of the first rounds, in which all rows still run."""
    batch = start(target, drafter, prompts, params)
    times, emitted = [], 0
    for _ in range(number):
        started = time.perf_counter()
        events = run_round(target, drafter, batch)
        times.append(time.perf_counter() - started)
        emitted += sum(len(event.tokens) for event in events)
        assert not any(event.finish for event in events), "a row ended: measure fewer rounds"
    return times, emitted


def networks_alone(target, drafter, prompts, params, number):
    """Seconds of draft and target alone in these rounds, and how many of the tokens they ran were padding."""
    batch = start(target, drafter, prompts, params)
    model = getattr(drafter, "model", None)
    # A compiled draft runs a chain or a step by one program, and `step` where there is none.
    drafts = [name for name in ("step", "ranked_step", "draft_chain") if hasattr(model, name)]
    parts = [(target, "forward"), *((model, name) for name in drafts)]
    alone = [Alone(getattr(of, name)) for of, name in parts]
    for (of, name), one in zip(parts, alone, strict=True):
        setattr(of, name, one)
    drafted, verified, padding = [], [], 0
    try:
        for _ in range(number):
            if model is not None:  # the first step runs as many tokens for each row as for the one with most
                behind = [len(r.tokens) - n for r, n in zip(batch.rows, batch.draft.own.host_lengths, strict=False)]
                padding += sum(max(behind) - count for count in behind)
            for one in alone:
                one.seconds = 0.0
            before = alone[0].tokens
            events = run_round(target, drafter, batch)
            padding += (alone[0].tokens - before) // 3 - sum(event.stats.drafted + 1 for event in events)
            verified.append(alone[0].seconds)
            drafted.append(sum(one.seconds for one in alone[1:]))
    finally:
        for of, name in parts:
            delattr(of, name)
    return drafted, verified, 3 * padding / sum(one.tokens for one in alone)


def transformers_pace(model, prompts, tokens):
    """Tokens a second of `transformers.generate` on the batch, left-padded, its prefill included; greedy, no stop token."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    config = {"do_sample": False, "min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
    started = time.perf_counter()
    model.generate(ids, attention_mask=mask, **config)
    return len(prompts) * tokens / (time.perf_counter() - started)


def plain_pace(target, prompts, tokens):
    started = time.perf_counter()
    batch = start(target, NoDraft(), prompts, SamplingParams(max_new_tokens=tokens, ignore_eos=True))
    while not all(row.finish for row in batch.rows):
        run_round(target, NoDraft(), batch)
    return len(prompts) * tokens / (time.perf_counter() - started)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--target", default="models/pysource/target")
    parser.add_argument("--draft", default="models/pysource/glide", help="a GliDe draft of the target")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--compile", choices=["on", "off"], default="off")
    parser.add_argument("--method", action="append", help="methods of `generate`")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target = Target.from_pretrained(options.target, dtype=getattr(torch, options.dtype), pack=True)
    target.compile(options.compile)
    reference = AutoModelForCausalLM.from_pretrained(options.target, dtype=target.dtype)
    how = f"{options.threads} threads, {options.dtype}, T={options.temperature:g}, compiled programs {options.compile}"
    print(f"torch {torch.__version__}, {how}, {options.target}, {options.rounds} rounds, medians")
    print("| batch | method | round ms | draft alone | verify alone | ratio | padding | tokens/s |")
    for size in options.batch or [1, 4, 16]:
        prompts = [target.encode(text) for text in stdlib_prompts(size)]
        prompts = [p[: len(p) - 17 * i % 97] for i, p in enumerate(prompts)]
        params = SamplingParams(options.temperature, seed=1, max_new_tokens=options.rounds * 8, ignore_eos=True)
        for method in options.method or ["plain", "glide", "glide+cape"]:
            draft = None if method == "plain" else load_draft(options.draft, target)
            drafter = make_drafter(method, draft, length=4)
            drafter.compile(options.compile)
            rounds(target, drafter, prompts, params, 3)
            whole, ratios, alone, paces = [], [], [], []
            for _ in range(options.repeats):
                times, emitted = rounds(target, drafter, prompts, params, options.rounds)
                drafted, verified, padding = networks_alone(target, drafter, prompts, params, options.rounds)
                sums = [d + v for d, v in zip(drafted, verified, strict=True)]
                ratios += [t / s for t, s in zip(times, sums, strict=True)]
                whole += times
                alone += zip(drafted, verified, strict=True)
                paces.append(emitted / sum(times))
            ms = [statistics.median(column) * 1000 for column in (whole, *zip(*alone, strict=True))]
            print(
                f"| {size} | {method} | {ms[0]:.2f} | {ms[1]:.2f} | {ms[2]:.2f} | {statistics.median(ratios):.3f} "
                f"| {padding:.0%} | {statistics.median(paces):.0f} |",
                flush=True,
            )
        plain = [
            (plain_pace(target, prompts, 48), transformers_pace(reference, prompts, 48)) for _ in range(options.repeats)
        ]
        ours, theirs = (statistics.median(column) for column in zip(*plain, strict=True))
        ratio = statistics.median(a / b for a, b in plain)
        print(
            f"plain at batch {size}: {ours:.0f} tokens/s, transformers.generate {theirs:.0f}, ratio {ratio:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
