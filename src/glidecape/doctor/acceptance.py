"""How much of a draft's proposals the target takes: teacher-forced on a text, and in the decode loop that writes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..core.params import SamplingParams
from ..core.stats import RoundStats, loops
from ..drafting.methods import AnyDraft, base_for, make_drafter
from ..drafts.checkpoint import NetworkDraft
from ..measure.runs import run
from ..target.target import Target
from ..train.figures import figures_by_lag

DEEPEST = 8  # depths that are looked at
WINDOW = 128  # tokens of a window, teacher-forced


@dataclass(frozen=True)
class Acceptance:
    """Of some prompts, and of what the target wrote after them.

    Attributes:
        forced: at each lag how often draft and target agree, teacher-forced on the prompts and what follows them: greedily the
            most likely token, else the overlap of the two laws at temperature 1. Empty where the text is too short.
        decoded: at each depth, of the nodes that were tested, the share that was accepted; and how many were tested.
        alpha: accepted / tested over all depths.
        outputs: what the target wrote, a list a prompt; looping: how many looping ones were left out.
    """

    forced: list[float]
    decoded: list[tuple[float, int]]
    alpha: float
    outputs: list[list[int]]
    looping: int = 0


def acceptance_of(
    target: Target, draft: AnyDraft, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> Acceptance:
    """Decode the prompts with a chain of 8, and teacher-force what was written. Greedy outputs that loop are left out where
    others are left: what repeats is easy to predict.

    Raises:
        InputError: a prompt that does not fit the context.
    """
    kind: str = getattr(draft, "kind", "")
    drafter = make_drafter(f"{base_for(kind)}+chain", draft, length=min(DEEPEST, draft.max_lag))
    written: list[tuple[list[int], list[int]]] = []
    rounds = []
    for number, ids in enumerate(prompts):
        one = run(target, drafter, [ids], replace(params, seed=params.seed + number))
        written.append((list(ids), one.tokens[0]))
        rounds.append(one.rounds)
    steady = [n for n, (_, tokens) in enumerate(written) if not (params.greedy and loops(tokens))]
    kept = steady or list(range(len(written)))
    text = [token for n in kept for part in written[n] for token in part]
    decoded = rate_by_depth(one for n in kept for one in rounds[n])
    tested = sum(count for _, count in decoded)
    return Acceptance(
        _forced(target, draft, np.array(text), params.greedy),
        decoded,
        sum(rate * count for rate, count in decoded) / max(1, tested),
        [written[n][1] for n in kept],
        len(written) - len(kept),
    )


def _forced(target: Target, draft: AnyDraft, text: np.ndarray, greedy: bool) -> list[float]:
    module = draft.module if isinstance(draft, NetworkDraft) else getattr(draft, "model", None)
    window = min(WINDOW, len(text), target.context)
    found = figures_by_lag(target, module, text, window) if module is not None else {}
    return list(found.get("greedy_acceptance_by_lag" if greedy else "overlap_by_lag", []))


def rate_by_depth(rounds: Iterable[RoundStats]) -> list[tuple[float, int]]:
    """For each depth from 1 the share of tested nodes that was accepted, and how many were tested.

    >>> rate_by_depth([RoundStats(3, 1, 2, tested=2), RoundStats(3, 0, 1, tested=1)])
    [(0.5, 2), (0.0, 1)]
    """
    tested, accepted = Counter[int](), Counter[int]()
    for one in rounds:
        tested.update(range(1, one.tested + 1))
        accepted.update(range(1, one.accepted + 1))
    return [(accepted[depth] / tested[depth], tested[depth]) for depth in sorted(tested)]
