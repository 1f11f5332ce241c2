"""vLLM's own methods and GliDe inside vLLM, on the same weights: tokens a second, and tokens emitted a round.

    .venv-vllm/bin/python runs/vllm_methods.py [--repeats 5] [--minutes 8] [--threads 1] [--output table.md]

On the shipped pair in float32, greedily: plain decoding, n-gram lookup, the shipped draft LM as vLLM's draft model, GliDe, and
GliDe with SVIP. Each has an engine in a process of its own, which stays: it decodes the prompts once to warm up, and then the
engines are timed in turn, `--repeats` times, with all prompts in one batch, and with one after the other. Only the engine that
is timed has work. Prompts whose plain answers loop are left out, since any method copies a loop. A method whose tokens are not
plain decoding's ends the run, and so does one that computes with another number of threads. No repeat begins that would not
end within `--minutes`. It needs the environment of `make test-vllm`, and a machine that does nothing else: where one of several
threads waits for a CPU, all do.
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
from typing import Any

from glidecape.bench.provenance import commit
from glidecape.core.stats import loops

PAIR = Path("models/pysource")
PROMPTS = Path("evaluation/prompts/python.jsonl")
ROOM = 512  # tokens of a prompt, most
Answers = list[list[int]]


def surroundings(threads: int) -> dict[str, str]:
    """The environment of an engine: vLLM, OpenMP and numba read it when they are loaded.

    numba, with which vLLM looks for n-grams, sets OpenMP's number of threads, and so PyTorch's, to its own: else all CPUs.
    """
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    counts = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
    return {**defaults, **os.environ, **own, **counts}


def method(name: str, length: int) -> dict[str, Any]:
    """vLLM's settings of a method that drafts `length` tokens, most."""
    common = {"num_speculative_tokens": length}
    glide = {"method": "custom_class", "model": "glidecape.integrations.vllm.GlideProposer"}
    return {
        "plain": {},
        "n-gram": {"speculative_config": common | {"method": "ngram", "prompt_lookup_min": 1, "prompt_lookup_max": 3}},
        "draft model": {"speculative_config": common | {"method": "draft_model", "model": str(PAIR / "lm")}},
        "GliDe": {
            "speculative_config": common | glide,
            "additional_config": {"glide": {"draft": str(PAIR / "glide"), "method": "glide"}},
        },
        "GliDe with SVIP": {
            "speculative_config": common | glide,
            "additional_config": {"glide": {"draft": str(PAIR / "glide"), "method": "glide+svip"}},
        },
    }[name]


METHODS = ("plain", "n-gram", "draft model", "GliDe", "GliDe with SVIP")


def made(name: str, options: argparse.Namespace) -> Any:
    from vllm import LLM

    settings = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": options.prompts, "seed": 0}
    settings |= {"enforce_eager": not options.compile, "enable_prefix_caching": False, "disable_log_stats": False}
    settings |= {"use_tqdm_on_load": False}
    return LLM(str(PAIR / "target"), **(settings | method(name, options.length)))


def decode(llm: Any, prompts: Answers, tokens: int) -> tuple[Answers, float]:
    """What follows each prompt, all of them in one batch, and the seconds that it took."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    begun = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": one} for one in prompts], sampling, use_tqdm=False)
    return [list(one.outputs[0].token_ids) for one in outputs], time.perf_counter() - begun


def counted(llm: Any) -> tuple[int, int, int]:
    """vLLM's counters: drafts verified, tokens drafted, tokens accepted."""
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafts, drafted, accepted = (
        found.get(f"vllm:spec_decode_num_{name}", 0) for name in ("drafts", "draft_tokens", "accepted_tokens")
    )
    return drafts, drafted, accepted


def measure(llm: Any, prompts: Answers, tokens: int) -> dict[str, Any]:
    """Tokens a second with all prompts in one batch and with one after the other, the answers, and what was counted."""
    import torch

    before = counted(llm)
    answers, seconds = decode(llm, prompts, tokens)
    drafts, drafted, accepted = (now - then for now, then in zip(counted(llm), before, strict=True))
    alone = sum(decode(llm, [prompt], tokens)[1] for prompt in prompts)
    total = sum(map(len, answers))
    return {
        "answers": answers,
        "together": total / seconds,
        "alone": total / alone,
        "length": 1 + accepted / drafts if drafts else 1.0,
        "drafted": drafted / drafts if drafts else 0.0,
        "threads": torch.get_num_threads(),
    }


def obey(options: argparse.Namespace) -> None:
    """In a process of its own: make an engine, and measure the prompts of each line of standard input."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    llm = made(options.engine, options)
    for line in sys.stdin:
        print(json.dumps(measure(llm, json.loads(line), options.tokens)), file=answers, flush=True)


class Engine:
    """vLLM with one of the methods, in a process of its own with this one's options."""

    def __init__(self, name: str, threads: int) -> None:
        words = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--engine", name]
        self.name, self.threads, pipe = name, threads, subprocess.PIPE
        self.process = subprocess.Popen(words, text=True, env=surroundings(threads), stdin=pipe, stdout=pipe)

    def __call__(self, prompts: Answers) -> dict[str, Any]:
        """What `measure` finds there."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(prompts), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name}: its process has ended; see above")
        found = json.loads(answer)
        if found["threads"] != self.threads:
            raise SystemExit(f"{self.name} computes with {found['threads']} threads instead of {self.threads}")
        return found


def chosen(plain: Engine, count: int) -> tuple[Answers, Answers]:
    """Prompts whose answers by plain decoding do not loop, as token ids, and these answers."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(PAIR / "target" / "tokenizer.json"))
    texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[: 2 * count]]
    prompts = [tokenizer.encode(text).ids[:ROOM] for text in texts]
    both = zip(prompts, plain(prompts)["answers"], strict=True)
    kept = [(prompt, answer) for prompt, answer in both if not loops(answer)][:count]
    return [prompt for prompt, _ in kept], [answer for _, answer in kept]


def compare(engines: dict[str, Engine], options: argparse.Namespace) -> tuple[Answers, dict[str, list[dict[str, Any]]]]:
    """The prompts, and what each method's repeats found. The first measurement of each method is its warm-up."""
    begun, longest = time.perf_counter(), 0.0
    prompts, wanted = chosen(engines["plain"], options.prompts)
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in engines}
    for repeat in range(options.repeats + 1):
        start = time.perf_counter()
        if repeat > 1 and start + longest - begun > 60 * options.minutes:
            break
        for name in list(engines)[:: -1 if repeat % 2 else 1]:  # back and forth: what drifts meets all of them alike
            one = engines[name](prompts)
            if one.pop("answers") != wanted:
                raise SystemExit(f"{name} emits other tokens than plain decoding: its speed says nothing")
            rates = f"{one['alone']:.0f} and {one['together']:.0f} tokens/s"
            print(f"{repeat or 'warm-up'}: {name}: {rates}", file=sys.stderr, flush=True)
            if repeat:
                found[name].append(one)
        longest = max(longest, time.perf_counter() - start)
    return prompts, found


def table(found: dict[str, list[dict[str, Any]]], rows: int) -> str:
    """Medians of the repeats. The ratios are medians of those within each repeat, with the least and the greatest."""
    lines = [
        f"| method | drafted | acceptance length | tokens/s, one row | over plain | tokens/s, {rows} rows | over plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, repeats in found.items():
        cells = [name, f"{repeats[0]['drafted']:.2f}", f"{repeats[0]['length']:.2f}"]
        for kind in ("alone", "together"):
            rates = [one[kind] for one in repeats]
            ratios = [one[kind] / plain[kind] for one, plain in zip(repeats, found["plain"], strict=True)]
            spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if name != "plain" else ""
            cells += [f"{statistics.median(rates):.0f}", f"{statistics.median(ratios):.2f}{spread}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--minutes", type=float, default=8, help="begin no repeat that would take longer than this in all"
    )
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--length", type=int, default=5, help="tokens drafted a round, most")
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the target, as it does by default")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--engine", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.engine:
        obey(options)
        return
    engines = {name: Engine(name, options.threads) for name in METHODS if name in {"plain", *options.methods}}
    try:
        prompts, found = compare(engines, options)
    finally:
        for engine in engines.values():
            engine.process.kill()
    lengths = sorted(map(len, prompts))
    mode = "compiled" if options.compile else "eager"
    head = (
        f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, {options.tokens} new ones, medians of "
        f"{len(found['plain'])} repeats, threads: {options.threads}, {mode}, commit {commit()}"
    )
    text = f"{head}\n\n{table(found, len(prompts))}\n"
    print(text)
    if options.output:
        options.output.write_text(text)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
