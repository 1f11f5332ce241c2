"""What a round asks of a GPU: kernels and graphs that are launched, copies, and waits of the host, by PyTorch's profiler.

.venv/bin/python runs/launches.py --device cuda --method plain --method glide --output runs/out/launches.json

It counts calls of CUDA's runtime by name over some rounds, so on a CPU there is nothing to count. The goal is two launches of
a graph a round, and one wait.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from glidecape import SamplingParams, Target, load_draft, make_drafter
from glidecape.bench.provenance import circumstances
from glidecape.engine.decode import start
from glidecape.engine.round import run_round
from glidecape.interface.load import compile_models, load_target

KINDS = {
    "kernels": ("LaunchKernel",),  # cudaLaunchKernel, cuLaunchKernel, cudaLaunchKernelExC
    "graphs": ("GraphLaunch",),
    "copies": ("Memcpy",),
    "waits": ("StreamSynchronize", "DeviceSynchronize", "EventSynchronize"),
}


def calls_of_a_round(target: Target, drafter, rounds: int) -> dict[str, float]:
    """Calls of each kind a round, after three rounds that warm up."""
    prompt = [(7 * i * i + i) % target.vocab_size for i in range(64)]
    batch = start(target, drafter, [prompt], SamplingParams(max_new_tokens=target.context - 80, ignore_eos=True))
    for _ in range(3):
        run_round(target, drafter, batch)
    on_gpu = [ProfilerActivity.CUDA] if target.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *on_gpu]) as seen:
        for _ in range(rounds):
            run_round(target, drafter, batch)
    counts = Counter(dict.fromkeys(KINDS, 0))
    for event in seen.key_averages():
        if event.key.startswith(("cuda", "cu")):
            counts.update({k: event.count for k, names in KINDS.items() if any(name in event.key for name in names)})
    return {kind: count / rounds for kind, count in counts.items()}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--target", default="models/pysource/target")
    made.add_argument("--draft", default="models/pysource/glide")
    made.add_argument("--method", action="append", help="plain, glide, …; repeat")
    made.add_argument("--device", default="cuda")
    made.add_argument("--dtype", default="bfloat16")
    made.add_argument("--compile", choices=["on", "off"], default="off")
    made.add_argument("--rounds", type=int, default=8)
    made.add_argument("--output", type=Path, help="JSON")
    return made


def main() -> None:
    given = parser().parse_args()
    target = load_target(given.target, given.dtype, given.device)
    draft = load_draft(given.draft, target)
    found = {}
    for method in given.method or ["plain", "glide", "glide+cape+svip"]:
        drafter = make_drafter(method, None if method == "plain" else draft)
        compile_models(target, [drafter], given.compile)
        found[method] = calls_of_a_round(target, drafter, given.rounds)
        print(
            f"{method}: " + ", ".join(f"{count:g} {kind}" for kind, count in found[method].items()),
            "a round",
            flush=True,
        )
    if given.output:
        facts = circumstances(target) | {"compiled": target.compiled is not None}
        given.output.write_text(json.dumps(facts | {"calls_a_round": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
