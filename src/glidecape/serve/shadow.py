"""The shadow check: finished answers are decoded again without drafts while the server is idle, and compared.

Silent damage becomes a metric: "equal", "near_tie" (rounding explains the first differing token, by certify's rule) and
"different", which is a bug and is logged.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..batch.row import Emitted, Row, new_row
from ..certify import BUG, EQUAL, NEAR_TIE, Finding, Judge
from ..core.params import NOISE, SamplingParams
from ..target.target import Target
from .job import Job
from .metrics import Metrics

LOG = logging.getLogger("glidecape.serve")
KEPT = 16  # answers that wait for their check, at most
RESULT = {EQUAL: "equal", NEAR_TIE: "near_tie", BUG: "different"}


@dataclass
class _Case:
    request: str
    prompt: list[int]
    tokens: list[int]
    params: SamplingParams


class Shadow:
    """Chooses answers, hands out rows that decode them again, and compares; the engine thread alone calls it.

    Answers under penalties, a bias or the residual rule are left out: the rule for near-ties is of the bare law, and the
    residual rule draws other tokens with every method.
    """

    def __init__(self, target: Target, share: float, metrics: Metrics) -> None:
        self.target, self.share, self.metrics = target, share, metrics
        self.cases: deque[_Case] = deque(maxlen=KEPT)
        self.row: Row | None = None

    @property
    def wants_to_run(self) -> bool:
        return bool(self.cases) and self.row is None

    def consider(self, job: Job) -> None:
        """An answer has ended: take it with the share's probability."""
        params = job.row.params
        bare = not job.row.adjusts_logits and (params.greedy or params.sampling == NOISE)
        if bare and random.random() < self.share:
            self.cases.append(_Case(job.request, job.prompt, job.row.new_tokens, params))

    def next_row(self) -> Row | None:
        """A row that decodes the next answer again."""
        if not self.wants_to_run:
            return None
        case = self.cases[0]
        self.row = new_row(-1, case.prompt, replace(case.params, logprobs=None), self.target)
        self.row.drafts = False
        return self.row

    def postpone(self) -> Row | None:
        """Stop decoding for now; returns the row that is to be aborted."""
        row, self.row = self.row, None
        return row

    def drop(self) -> None:
        """Leave this answer: it was checked, or decoding it again failed."""
        self.row = None
        if self.cases:
            self.cases.popleft()

    def push(self, event: Emitted) -> None:
        """What the row emitted; when it has ended, the outcome is counted."""
        if self.row is None or event.finish is None:
            return
        case, again = self.cases[0], self.row.new_tokens
        judge = OwnJudge(self.target, case.prompt, case.params)
        with torch.no_grad():
            finding = judge.compare(Finding("served", 0, against="plain"), again, case.tokens)
        self.drop()
        self.metrics.shadow(RESULT[finding.verdict]).inc()
        if finding.verdict == BUG:
            LOG.error("drafts changed an answer", extra={"facts": {"request": case.request} | finding.as_dict()})


class OwnJudge(Judge):
    """Certify's judge without a second model: the target's own forwards of several shapes are compared with each other."""

    def __init__(self, target: Target, prompt: list[int], params: SamplingParams) -> None:
        super().__init__(target, None, prompt, params)

    def _full(self, tokens: list[int]) -> Tensor:
        cache = self.target.new_cache(1, len(tokens))
        ids = torch.tensor([tokens], device=self.target.device)
        return self.target.forward(ids, torch.arange(len(tokens), device=ids.device)[None], cache).logits[0]

    def _after_a_cache(self, tokens: list[int]) -> Any:
        return self._one_node(tokens)
