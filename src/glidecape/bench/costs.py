"""What single steps cost in this process: the target's forward by number of nodes, and one step of each draft."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from ..core.params import SamplingParams
from ..drafting.drafter import ModelDrafter
from ..drafting.expansions.chain import Chain
from ..drafting.methods import AnyDraft
from ..drafting.stop import FixedLength
from ..drafts.base import DepthModel, DraftModel
from ..engine.decode import start
from ..target.target import Target

NODES = (0, 1, 2, 4, 8, 16, 32, 64)  # besides the root
REPEATS = 15
LONG, SHORT = 4, 1  # draft lengths whose difference is the cost of steps


def _timed(call: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


@torch.no_grad()
def measure_costs(target: Target, drafts: Mapping[str, AnyDraft], context: int) -> dict[str, Any]:
    """Median seconds after `context` tokens: `forward` by drafted nodes (0: a plain step), `draft_step` by draft; and both
    over a plain step as `v` and `c`. Steps of different kinds alternate.
    """
    context = max(2, min(context, target.context - max(NODES) - 2))
    prompt = [(7 * i + 1) % target.vocab_size for i in range(context)]
    cache = target.new_cache(1, context + max(NODES) + 2)
    target.prefill([prompt], cache)
    forwards: dict[int, list[float]] = {n: [] for n in NODES}
    for _ in range(REPEATS):
        for nodes in NODES:
            tokens = torch.tensor([[prompt[(i + nodes) % context] for i in range(nodes + 1)]], device=target.device)
            positions = torch.arange(context - 1, context + nodes, device=target.device)[None]
            above = torch.ones(1, nodes + 1, nodes + 1, dtype=torch.bool, device=target.device).tril()
            forwards[nodes].append(
                _timed(
                    lambda t=tokens, p=positions, a=above: target.forward(t, p, cache, a).logits.argmax(-1).tolist(),
                    target.device,
                )
            )
            cache.keep([[]])
    forward = {n: statistics.median(times) for n, times in forwards.items()}
    steps = {
        name: _draft_step(target, m, prompt)
        for name, m in drafts.items()
        if not isinstance(m, DepthModel) and m.max_lag >= LONG
    }
    plain = forward[0]
    return {
        "context": context,
        "forward_s": {str(n): round(s, 7) for n, s in forward.items()},
        "draft_step_s": {name: round(s, 7) for name, s in steps.items()},
        "v": {str(n): round(s / plain, 4) for n, s in forward.items()},
        "c": {name: round(s / plain, 4) for name, s in steps.items()},
    }


def _draft_step(target: Target, model: DraftModel, prompt: list[int]) -> float:
    drafters = {length: ModelDrafter(model, Chain(), FixedLength(length)) for length in (LONG, SHORT)}
    params = SamplingParams(max_new_tokens=max(drafters) + 2)
    if len(prompt) + params.max_new_tokens > target.context:
        prompt = prompt[: target.context - params.max_new_tokens]
    states = {length: start(target, drafter, [prompt], params) for length, drafter in drafters.items()}
    times: dict[int, list[float]] = {length: [] for length in drafters}
    for _ in range(REPEATS):
        for length, drafter in drafters.items():
            state = states[length]
            times[length].append(_timed(lambda d=drafter, s=state: d.propose(s).tokens.tolist(), target.device))
            state.draft.own.keep([[]])  # forget the proposal: the next one begins at the same root
    return max(0.0, statistics.median(times[LONG]) - statistics.median(times[SHORT])) / (LONG - SHORT)
