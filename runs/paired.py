"""Two versions of GlideCape on the shipped pair, in turn: how much time a round of the one takes over the other's.

    git worktree add /tmp/before cfd1e31
    python runs/paired.py /tmp/before/src src --repeats 40

Each version runs in a process of its own that waits while the other decodes, so that both meet the same drift of the
machine. Prompt, method and options are the same in a pair, and so must be the tokens. The first process started twice
(`SRC SRC`) shows how far two equal versions are apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("plain", "glide", "glide+cape", "glide+cape+svip")
BINS = (3, 3, 3, 2, 2, 1, 1, 1, 0, 0)
PROMPTS = ROOT / "evaluation" / "prompts" / "python.jsonl"


def worker(source: str, threads: int, tokens: int) -> None:
    """Answer each line "METHOD NUMBER" with the seconds of a decoding, as JSON."""
    sys.path.insert(0, source)
    import torch

    import glidecape

    assert glidecape.__file__ is not None
    assert glidecape.__file__.startswith(source), f"{glidecape.__file__} is not below {source}"
    torch.set_num_threads(threads)
    models = ROOT / "models" / "pysource"
    target = glidecape.Target.from_pretrained(str(models / "target"), dtype="float32")
    draft = glidecape.load_draft(models / "glide", target)
    prompts = [target.encode(json.loads(line)["prompt"])[:192] for line in PROMPTS.read_text().splitlines()]
    params = glidecape.SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    drafters = {m: glidecape.make_drafter(m, draft, length=4, bins=BINS) for m in METHODS if m != "plain"}

    def run(method: str, number: int) -> dict[str, object]:
        stats, started = glidecape.Stats(), time.perf_counter()
        (out,) = glidecape.generate(target, [prompts[number % len(prompts)]], drafters.get(method), params, stats)
        return {"seconds": time.perf_counter() - started, "rounds": stats.rounds, "tokens": out.tokens}

    for method in METHODS:
        run(method, 0)
    print("ready", flush=True)
    for line in sys.stdin:
        method, number = line.split()
        print(json.dumps(run(method, int(number))), flush=True)


def start(source: str, threads: int, tokens: int) -> subprocess.Popen[str]:
    words = [sys.executable, __file__, "--worker", str(Path(source).resolve()), "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [*words, "--tokens", str(tokens)], stdin=-1, stdout=-1, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise SystemExit(f"{source} does not run: try python {' '.join(words[1:])}")
    return process


def ask(process: subprocess.Popen[str], method: str, number: int) -> dict[str, object]:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{method} {number}\n")
    process.stdin.flush()
    answer: dict[str, object] = json.loads(process.stdout.readline())
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="the src folders of the version before and of the one now")
    parser.add_argument("--repeats", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.threads, args.tokens)
        return
    before, now = (start(source, args.threads, args.tokens) for source in args.sources)
    print(f"{args.threads} threads, {args.repeats} pairs of {args.tokens} tokens; time now over before, quartiles")
    for method in METHODS:
        ratios = []
        for number in range(args.repeats):
            pair = {}
            for which in (before, now) if number % 2 else (now, before):
                pair[which] = ask(which, method, number)
            if pair[before]["tokens"] != pair[now]["tokens"]:
                raise SystemExit(f"{method}: other tokens for prompt {number}")
            ratios.append(float(str(pair[now]["seconds"])) / float(str(pair[before]["seconds"])))
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{method:16} {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)


if __name__ == "__main__":
    main()
