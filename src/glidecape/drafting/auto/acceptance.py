"""How probable it is that the target takes a drafted token, given that it took the token before: learned while decoding.

A logistic regression for each kind of law, greedy and sampled, over what the draft shows of a token. It is learned from every
node that the target reached: there its own choice is known, so it is known of each token that the draft ranked, whether it
was verified or not. Nodes below a rejection, and those that were never drafted, say nothing, and are left out: so a chain that
stopped early doesn't bias the estimate (it is a hazard, estimated from those at risk).

Source: the hazard of survival analysis. vLLM's online estimator (vllm PR#56451) prices verification without a trained head,
too. Differs: it learns from what a draft shows of each token, siblings and copies included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
BINS = 10


class OnlineLogistic:
    """Logistic regression that forgets slowly, one set of weights a kind.

    Args:
        prior: `(kinds, features)` weights to begin with, to which forgetting leads back.
        ridge: how strongly, in observations.

    Attributes:
        seen: `(kinds, bins, 3)`: of the predictions of each tenth of [0, 1], their number, their sum, and how many came true.

    >>> one = OnlineLogistic([[0.0, 0.0]])
    >>> for _ in range(40):
    ...     one.learn(0, np.array([[1.0, 1.0], [1.0, -1.0]] * 8), np.array([1.0, 0.0] * 8))
    >>> bool(one.of(0, np.array([1.0, 1.0])) > 0.9)
    True
    """

    BATCH = 96  # observations that are learned together
    KEEP = 0.985  # of what was learned, a batch

    def __init__(self, prior: Sequence[Sequence[float]], ridge: float = 4.0) -> None:
        self.prior = np.array(prior, dtype=np.float64)
        self.weights = self.prior.copy()
        self._lists: list[list[float]] = self.weights.tolist()
        kinds, features = self.prior.shape
        self.ridge = ridge * np.eye(features)
        self.precision = np.repeat(self.ridge[None], kinds, 0)
        self.seen = np.zeros((kinds, BINS, 3))
        self._new: list[list[tuple[Array, Array]]] = [[] for _ in range(kinds)]
        self._count = [0] * kinds

    def of(self, kind: int, x: Array) -> Array:
        """Probabilities `(…)` of observations `(…, features)`."""
        found: Array = 1.0 / (1.0 + np.exp(np.minimum(-(x @ self.weights[kind]), 30.0)))
        return found

    def one(self, kind: int, x: Sequence[float]) -> float:
        """The probability of one observation, without arrays."""
        z = sum(a * b for a, b in zip(self._lists[kind], x, strict=True))
        return min(0.999, 1.0 / (1.0 + math.exp(min(-z, 30.0))))

    def learn(self, kind: int, x: Array, y: Array) -> None:
        """Observations `(n, features)` and whether they came true, `(n,)` of 0 and 1; weights change once enough are there."""
        self._new[kind].append((x, y))
        self._count[kind] += len(y)
        if self._count[kind] < self.BATCH:
            return
        x, y = (np.concatenate(parts) for parts in zip(*self._new[kind], strict=True))
        self._new[kind], self._count[kind] = [], 0
        p = self.of(kind, x)
        self._note(kind, p, y)
        # One step of Newton's method on the posterior, whose older observations fade towards the prior.
        self.precision[kind] = (
            self.KEEP * self.precision[kind] + (1 - self.KEEP) * self.ridge + (x.T * (p * (1 - p))) @ x
        )
        pull = (1 - self.KEEP) * self.ridge @ (self.prior[kind] - self.weights[kind])
        self.weights[kind] += np.linalg.solve(self.precision[kind], x.T @ (y - p) + pull)
        self._lists[kind] = self.weights[kind].tolist()

    def _note(self, kind: int, p: Array, y: Array) -> None:
        at = np.minimum((p * BINS).astype(int), BINS - 1)
        for column, values in enumerate((np.ones_like(p), p, y)):
            self.seen[kind, :, column] += np.bincount(at, values, BINS)


# Weights that were learned on the shipped pair (dev/LOG.md, 27 November), rounded: greedy and sampled.
DRAFTED = (
    (-0.4, 0.4, 0.0, 0.8, 0.85, 0.75, 0.75, 0.2, -0.1, 1.0, 0.0),
    (-0.15, 0.2, -0.55, 0.7, 0.9, 0.2, 0.2, 0.1, 0.0, 0.7, 0.25),
)
COPIED = ((-0.4, 1.1, 0.7, 1.4), (-2.0, 1.0, 0.3, 1.5))


def drafted_features(scores: Array, log_q: Array, entropy: Array, depth: int, recent: Array) -> Array:
    """What a draft shows of the tokens that it ranks after nodes of a chain, `(batch, depths, count, features)`.

    Args:
        scores, log_q: `(batch, depths, count)`, best first, see `Ranked`.
        entropy: `(batch, depths)` in nats.
        depth: of the first depth's tokens, from 1.
        recent: `(batch,)` how much more was accepted in the row lately than was expected.
    """
    first, other, fixed = _fixed(scores.shape[2])
    gap = scores - scores[..., :1]
    gap[..., 0] = scores[..., 0] - scores[..., min(1, scores.shape[2] - 1)]
    gap = np.minimum(np.maximum(gap, -10.0), 10.0)
    odds = np.maximum(log_q, -8.0)
    odds = odds - np.log1p(-np.exp(np.minimum(odds, -3e-4)))
    x = np.empty((*scores.shape, 11))
    x[..., 0:3] = fixed
    x[..., 3], x[..., 4] = gap * first, gap * other
    x[..., 5], x[..., 6] = odds * first, odds * other
    x[..., 7], x[..., 8] = entropy[..., None], _log_depth(depth, scores.shape[1])
    recent = recent[:, None, None]
    x[..., 9], x[..., 10] = recent * first, recent * other
    return x


@lru_cache(maxsize=256)
def _log_depth(depth: int, count: int) -> Array:
    return np.log(np.arange(depth, depth + count, dtype=np.float64))[:, None]


@lru_cache
def _fixed(count: int) -> tuple[Array, Array, Array]:
    """Which of `count` tokens is the first, which are others, and the features that never change."""
    first = np.eye(1, count)[0]
    return first, 1 - first, np.stack([np.ones(count), first, np.log1p(np.arange(count))], 1)


def copied_features(match: int, count: int, recent: float) -> Array:
    """What is known of `count` copied tokens, `(count, features)`: the length of the match, their depth, and how well copies
    of the row went lately."""
    x = np.empty((count, 4))
    x[:, 0], x[:, 1] = 1.0, math.log(match)
    x[:, 2], x[:, 3] = np.log1p(np.arange(count)), recent
    return x
