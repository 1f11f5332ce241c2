"""When a continuation loops, and how much of it is repeated.

A greedy continuation *loops* when its second half repeats an earlier span of 8 tokens, the same one, three times or more;
those are reported apart, because a loop is easy to guess and says little about a draft.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence


def loops(tokens: Sequence[int], span: int = 8, times: int = 3) -> bool:
    """Does the second half repeat an earlier span of `span` tokens, one and the same, `times` times or more?

    >>> loops([1, 2, 3, 4] * 16), loops(list(range(64))), loops([*range(40), *range(20), *range(50, 70)])
    (True, False, False)
    """
    seen: set[tuple[int, ...]] = set()
    repeats: Counter[tuple[int, ...]] = Counter()
    for start in range(len(tokens) - span + 1):
        piece = tuple(tokens[start : start + span])
        if piece in seen and start >= len(tokens) // 2:
            repeats[piece] += 1
        seen.add(piece)
    return max(repeats.values(), default=0) >= times


def repetition(tokens: Sequence[int], span: int = 4) -> float:
    """Share of the spans of `span` tokens that occurred before.

    >>> repetition([1, 2, 3, 4, 5]), repetition([7] * 8)
    (0.0, 0.8)
    """
    spans = [tuple(tokens[i : i + span]) for i in range(len(tokens) - span + 1)]
    return 1 - len(set(spans)) / len(spans) if spans else 0.0
