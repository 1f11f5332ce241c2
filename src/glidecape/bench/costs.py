"""The costs of a run: v(n) of its target and c of each of its drafts, after as many tokens as its prompts have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..costs import LONG, REPEATS, draft_step_s, verification_ratios
from ..drafting.methods import AnyDraft
from ..drafts.base import DepthModel
from ..progress import bar
from ..target.target import Target

NODES = (0, 1, 2, 4, 8, 16, 32, 64)  # besides the root


def measure_costs(target: Target, drafts: Mapping[str, AnyDraft], context: int) -> dict[str, Any]:
    """Median seconds after `context` tokens: `verify_s` by drafted nodes (0: a plain step), `draft_step_s` by draft; and both
    over a plain step as `v` and `c`."""
    context = max(2, min(context, target.context - max(NODES) - 2))
    prompt = [(7 * i + 1) % target.vocab_size for i in range(context)]
    steps: dict[str, float] = {}
    with bar("timing single steps", 1 + len(drafts)) as shown:
        found = verification_ratios(target, [prompt], sizes=[1 + n for n in NODES], repeats=REPEATS)
        for name, model in drafts.items():
            shown.advance()
            if not isinstance(model, DepthModel) and model.max_lag >= LONG:
                steps[name] = draft_step_s(target, model, prompt, REPEATS)
    v = dict(zip(map(str, NODES), found.ratios, strict=True))
    return {
        "context": context,
        "verify_s": {n: round(ratio * found.step_s, 7) for n, ratio in v.items()},
        "draft_step_s": {name: round(s, 7) for name, s in steps.items()},
        "v": v,
        "c": {name: round(s / found.step_s, 4) for name, s in steps.items()},
    }
