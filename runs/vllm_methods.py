"""vLLM's own methods and GliDe inside vLLM, on the same weights: tokens a second, and tokens emitted a draft.

    .venv-vllm/bin/python runs/vllm_methods.py [--repeats 3] [--tokens 96] [--length 5] [--compile] [--output table.md]

On the shipped pair in float32, greedily: plain decoding, n-gram lookup, the shipped draft LM as vLLM's draft model, GliDe, and
GliDe with SVIP. They are run in turn, `--repeats` times, each in a process of its own: it decodes the prompts once to warm up,
and is then timed with all of them in one batch, and with one after the other. Prompts whose plain answers loop are left out,
since any method copies a loop. A method whose tokens are not plain decoding's ends the run. It needs the environment of
`make test-vllm`, and a machine that does nothing else: where one of vLLM's threads waits for a CPU, all do.
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

# vLLM reads them when it is imported.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from glidecape.bench.provenance import commit
from glidecape.core.stats import loops

PAIR = Path("models/pysource")
PROMPTS = Path("evaluation/prompts/python.jsonl")
ROOM = 512  # tokens of a prompt, most
Answers = list[list[int]]


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


def chosen(options: argparse.Namespace) -> Answers:
    """Prompts whose answers by plain decoding do not loop, as token ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(PAIR / "target" / "tokenizer.json"))
    texts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()[: 2 * options.prompts]]
    prompts = [tokenizer.encode(text).ids[:ROOM] for text in texts]
    answers = in_child("plain", prompts)["answers"]
    return [prompt for prompt, answer in zip(prompts, answers, strict=True) if not loops(answer)][: options.prompts]


def in_child(name: str, prompts: Answers) -> dict[str, Any]:
    """`measure` in a process of its own, with this one's options."""
    words = [sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--child", name]
    done = subprocess.run(words, input=json.dumps(prompts), stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str, prompts: Answers, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second with all prompts in one batch and with one after the other, the answers, and what was counted."""
    llm = made(name, options)
    decode(llm, prompts, options.tokens)
    before = counted(llm)
    answers, seconds = decode(llm, prompts, options.tokens)
    drafts, drafted, accepted = (now - then for now, then in zip(counted(llm), before, strict=True))
    alone = sum(decode(llm, [prompt], options.tokens)[1] for prompt in prompts)
    total = sum(map(len, answers))
    return {
        "answers": answers,
        "together": total / seconds,
        "alone": total / alone,
        "length": 1 + accepted / drafts if drafts else 1.0,
        "drafted": drafted / drafts if drafts else 0.0,
    }


def table(found: dict[str, list[dict[str, Any]]], rows: int) -> str:
    """Medians of the repeats; the ratios are medians of those within each repeat."""
    lines = [
        f"| method | drafted | tokens a round | tokens/s, one row | × plain | tokens/s, {rows} rows | × plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, repeats in found.items():
        cells = [name, f"{repeats[0]['drafted']:.2f}", f"{repeats[0]['length']:.2f}"]
        for kind in ("alone", "together"):
            rates = [one[kind] for one in repeats]
            ratios = [one[kind] / plain[kind] for one, plain in zip(repeats, found["plain"], strict=True)]
            cells += [f"{statistics.median(rates):.0f}", f"{statistics.median(ratios):.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--length", type=int, default=5, help="tokens drafted a round, most")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the target, as it does by default")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, json.load(sys.stdin), options)))
        return
    prompts = chosen(options)
    names = ["plain", *(name for name in options.methods if name != "plain")]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(options.repeats):
        for name in names:
            found[name].append(in_child(name, prompts))
            one = found[name][-1]
            print(f"{repeat + 1}: {name}: {one['alone']:.0f} and {one['together']:.0f} tokens/s", flush=True)
            if one["answers"] != found["plain"][0]["answers"]:
                raise SystemExit(f"{name} emits other tokens than plain decoding: its speed says nothing")
    head = (
        f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {options.tokens} new ones, "
        f"{torch.get_num_threads()} threads, {'compiled' if options.compile else 'eager'}, commit {commit()}"
    )
    text = f"{head}\n\n{table(found, len(prompts))}\n"
    print(text)
    if options.output:
        options.output.write_text(text)
    shown = {name: [{k: v for k, v in one.items() if k != "answers"} for one in each] for name, each in found.items()}
    print(json.dumps(shown))


if __name__ == "__main__":
    main()
