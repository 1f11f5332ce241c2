"""How sure a comparison over prompts is: bootstrap intervals and paired permutation tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def bootstrap_ratio(
    over: Sequence[float], under: Sequence[float], draws: int = 5000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of sum(over) / sum(under) when prompts are drawn again with replacement.

    >>> bootstrap_ratio([2.0, 2.0, 2.0], [1.0, 1.0, 1.0])
    (2.0, 2.0)
    """
    a, b = np.asarray(over, dtype=float), np.asarray(under, dtype=float)
    picked = np.random.default_rng(seed).integers(0, len(a), (draws, len(a)))
    ratios = a[picked].sum(1) / b[picked].sum(1)
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2])
    return round(float(low), 4), round(float(high), 4)


def paired_permutation(a: Sequence[float], b: Sequence[float], draws: int = 20_000, seed: int = 0) -> float:
    """Two-sided p-value of "a and b have the same mean": signs of the paired differences are flipped at random.

    The observed arrangement counts as one of the draws, so the value is never 0.

    >>> paired_permutation([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    1.0
    """
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (draws, len(difference)))
    reached = np.abs((signs * difference).sum(1)) >= abs(difference.sum()) - 1e-12
    return float((1 + reached.sum()) / (1 + draws))
