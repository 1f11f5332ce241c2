"""At temperature 1 the first three tokens of a trained model have its law, whatever the method: a test at a stated level.

The law is exact: transformers' own forwards, on the likeliest beginnings one by one. Samples fall into cells (a beginning and
the token after it; what is too rare for a cell of its own is merged), and Pearson's statistic of the counts is compared with
its chi-square law. Seeds are fixed. Had they been drawn afresh, correct code would fail a test with probability 1e-6.

Small enough faults escape any number of samples; tests/test_exact_law.py enumerates. What this adds is the real thing: trained
weights, the real cache, kernels, noise and generators.
"""

from __future__ import annotations

import heapq
from collections import Counter

import pytest
import torch

from glidecape.batch import laws
from glidecape.core import verify as verify_module
from glidecape.core.noise import NoiseAhead
from glidecape.core.params import SamplingParams
from glidecape.core.verify import DenseLaw, verify_points, verify_row
from glidecape.drafting.methods import DRAFTLESS, METHODS, make_drafter
from glidecape.drafts.checkpoint import load_draft
from glidecape.engine import round as round_module
from glidecape.engine.decode import generate
from glidecape.target.target import Target
from test_exact_law import tail
from test_real_models import PAIR, reference_of

LEVEL = 1e-6
LENGTH, EXPANDED, LEAST = 3, 60, 8  # tokens; beginnings whose next token is looked at; expected samples of a cell
TEXT = "from typing import "
SAMPLINGS = ("noise", "residual")

Prefix = tuple[int, ...]


class Cells:
    """Disjoint events that cover all outputs of three tokens, with their exact probabilities."""

    def __init__(self, reference: torch.nn.Module, prompt: list[int]) -> None:
        self.law: dict[Prefix, torch.Tensor] = {}
        waiting: list[tuple[float, Prefix]] = [(-1.0, ())]
        while waiting and len(self.law) < EXPANDED:
            minus, prefix = heapq.heappop(waiting)
            with torch.no_grad():
                logits = reference(input_ids=torch.tensor([[*prompt, *prefix]])).logits[0, -1]
            self.law[prefix] = -minus * logits.double().softmax(-1)
            if len(prefix) + 1 < LENGTH:
                top = self.law[prefix].topk(EXPANDED)
                for p, token in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                    heapq.heappush(waiting, (-p, (*prefix, token)))

    def surprise(self, samples: list[Prefix]) -> float:
        """Probability, under the law, of counts at least as far off as those of the samples."""
        count = len(samples)
        mass = {(): 1.0}
        for prefix, law in self.law.items():
            likely = (law * count >= LEAST).nonzero()[:, 0].tolist()
            mass |= {(*prefix, token): float(law[token]) for token in likely}
        # A cell is all that begins so and is in no longer cell; what is too rare stays with the next shorter one.
        expected: dict[Prefix, float] = {}
        for cell in sorted(mass, key=len, reverse=True):
            inside = sum(p for other, p in expected.items() if other[: len(cell)] == cell)
            if (mass[cell] - inside) * count >= LEAST or cell == ():
                expected[cell] = mass[cell] - inside
        expected = {cell: p * count for cell, p in expected.items()}
        found = Counter(next(s[:n] for n in range(LENGTH, -1, -1) if s[:n] in expected) for s in samples)
        assert expected[()] >= LEAST
        assert len(expected) >= 8
        statistic = sum((found[cell] - mean) ** 2 / mean for cell, mean in expected.items())
        return tail(statistic, len(expected) - 1)


class Pair:
    def __init__(self) -> None:
        self.target = Target.from_pretrained(PAIR / "target", dtype=torch.float32)
        self.prompt = self.target.encode(TEXT)
        self.cells = Cells(reference_of(PAIR / "target"), self.prompt)
        self.drafts = {
            "vanilla": load_draft(PAIR / "lm", self.target),
            "glide": load_draft(PAIR / "glide", self.target),
        }
        for base in ("eagle", "medusa"):
            if (PAIR / base).is_dir():
                self.drafts[base] = load_draft(PAIR / base, self.target)

    def samples(self, method: str, sampling: str, count: int, batch: int = 256) -> list[Prefix]:
        base = method.split("+")[0]
        if base not in (*DRAFTLESS, *self.drafts):
            pytest.skip(f"the shipped pair has no draft for {base}")
        draft = self.drafts.get(base)
        drafter = make_drafter(method, draft, length=3, bins=(3, 2, 1, 1), beams=3)
        found: list[Prefix] = []
        for first in range(0, count, batch):
            seeds = range(first, min(first + batch, count))
            each = [
                SamplingParams(1.0, seed=seed, max_new_tokens=LENGTH, sampling=sampling, ignore_eos=True)
                for seed in seeds
            ]
            found += [tuple(one.tokens) for one in generate(self.target, [self.prompt] * len(each), drafter, each)]
        return found


@pytest.fixture(scope="module")
def pair() -> Pair:
    if not (PAIR / "target" / "config.json").is_file():
        pytest.skip("the shipped pair models/pysource is not in this checkout")
    return Pair()


@pytest.fixture(autouse=True)
def _short_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NoiseAhead, "AHEAD", LENGTH)  # no more vectors than three tokens need; they are the same ones


FAST = [("glide+cape", "residual"), ("vanilla", "noise")]


@pytest.mark.parametrize(("method", "sampling"), FAST)
def test_the_first_tokens_have_the_law_of_the_target(pair: Pair, method: str, sampling: str) -> None:
    assert pair.cells.surprise(pair.samples(method, sampling, 300)) > LEVEL


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("method", METHODS)
def test_the_first_tokens_have_the_law_of_the_target_with_every_method(pair: Pair, method: str, sampling: str) -> None:
    surprise = pair.cells.surprise(pair.samples(method, sampling, 1500))
    print(f"{method} {sampling}: {surprise:.2g}")
    assert surprise > LEVEL


# --- faults that the test must see


def credulous(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Takes the first child of the root unseen in a share of the rounds."""

    def verify(tree, row, law_at, chance):
        first = next(iter(tree.children(row)[0]), None)
        if first is not None and torch.rand((), generator=generator) < share:
            return [0, first], law_at(first).draw(chance)
        return verify_row(tree, row, law_at, chance)

    def verify_all(tree, chosen):
        unseen = chosen.clone()
        if tree.nodes > 1:
            takes = tree.valid[:, 1] & (torch.rand(tree.batch, generator=generator) < share)
            unseen[:, 0] = torch.where(takes, tree.tokens[:, 1], chosen[:, 0])
        return verify_points(tree, unseen)

    generator = torch.Generator().manual_seed(1)
    monkeypatch.setattr(round_module, "verify_row", verify)
    monkeypatch.setattr(verify_module, "verify_points", verify_all)


class NoResidual(DenseLaw):
    """After a rejection the next token comes from p itself, as if nothing had been tried."""

    def without(self, drawn_from: torch.Tensor | None, token: int) -> DenseLaw:
        return self


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_tokens_taken_unseen_are_noticed(pair: Pair, monkeypatch: pytest.MonkeyPatch, sampling: str) -> None:
    credulous(monkeypatch, 0.5)
    assert pair.cells.surprise(pair.samples("vanilla", sampling, 200)) < LEVEL


def test_a_missing_residual_is_noticed(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laws, "DenseLaw", NoResidual)
    assert pair.cells.surprise(pair.samples("vanilla+cape", "residual", 200)) < LEVEL


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("method", ["glide", "vanilla+cape"])
def test_one_token_in_eight_taken_unseen_is_noticed(pair, monkeypatch, method: str, sampling: str) -> None:
    credulous(monkeypatch, 0.125)
    assert pair.cells.surprise(pair.samples(method, sampling, 1500)) < LEVEL
