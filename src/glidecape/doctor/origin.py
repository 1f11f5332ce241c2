"""What a draft was trained for, as its folder tells, and where the target at hand differs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from ..drafts.card import CARD, WEIGHTS, Fingerprint, checked
from ..drafts.checkpoint import fingerprint, read_card
from ..errors import CheckpointError, first_line
from ..target.target import Target
from ..train.figures import template_digest
from .row import Row

AGAIN = "train a draft for this target with glidecape train"


class TrainedOn(BaseModel):
    """See `train.figures.trained_on`."""

    length: int
    dtype: str
    chat_template: str | None


class Figures(BaseModel):
    """Of a card's figures those that are read here; other ones are other readers'."""

    greedy_acceptance_by_lag: list[float] = Field(default_factory=list)
    overlap_by_lag: list[float] = Field(default_factory=list)
    alpha_greedy: float | None = None
    alpha_t1: float | None = None
    trained_on: TrainedOn | None = None


@dataclass(frozen=True)
class Origin:
    """What a draft's folder tells of its training.

    Attributes:
        kind: of the draft: "glide", "eagle", "medusa" or "lm".
        fingerprint: of the target that it was trained for; None: it is a causal LM, which names none.
        figures: that its training left.
    """

    kind: str
    fingerprint: Fingerprint | None
    figures: Figures

    @classmethod
    def of(cls, folder: Path) -> Origin:
        """Raises CheckpointError: see `read_card`; or the figures are no figures."""
        path = folder / CARD
        figures: Any = {}
        if (folder / WEIGHTS).is_file():
            card = read_card(folder)
            return cls(card.kind, card.fingerprint, _figures(card.figures, folder / WEIGHTS))
        if path.is_file():  # a draft LM of ours
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                figures = found.get("figures", {}) if isinstance(found, dict) else {}
            except (OSError, ValueError, RecursionError) as error:
                raise CheckpointError(f"{path} is no card of a draft ({first_line(error)})") from None
        return cls("lm", None, _figures(figures, path))

    def acceptance(self, temperature: float) -> list[float]:
        """By depth, teacher-forced on text that was held out of training; empty: not stored."""
        return self.figures.overlap_by_lag if temperature else self.figures.greedy_acceptance_by_lag

    def alpha(self, temperature: float) -> float | None:
        """As decoded after training, by a chain of 5."""
        return self.figures.alpha_t1 if temperature else self.figures.alpha_greedy

    @property
    def trained_on(self) -> TrainedOn | None:
        return self.figures.trained_on


def _figures(found: Any, path: Path) -> Figures:
    try:
        return checked(Figures, found)
    except ValueError as error:
        raise CheckpointError(f"{path} holds figures that cannot be read: {first_line(error)}") from None


def refusals(origin: Origin, target: Target) -> Iterator[Row]:
    """What makes the draft unusable with this target, if it is: another shape, another tokenizer."""
    if origin.fingerprint is None:
        return
    own, saved = fingerprint(target), origin.fingerprint.model_dump()
    for part, cause in (("shape", "shape of the target"), ("tokenizer", "tokenizer")):
        if part == "tokenizer" and target.tokenizer is None:
            yield Row(cause, "this target has none", known=False)
        elif saved[part] == own[part]:
            yield Row(cause, "as in training")
        else:
            yield Row(cause, "another than the draft was trained for: it cannot be used", AGAIN)


def differences(origin: Origin, target: Target, fell: bool) -> Iterator[Row]:
    """What else is not as it was in training: weights, chat template, dtype.

    Args:
        fell: is less accepted than in training? Another dtype alone is no cause.
    """
    if origin.fingerprint is not None:
        same = origin.fingerprint.weights == target.weights_digest
        yield Row(
            "weights of the target",
            "as in training" if same else "other weights than the draft was trained for",
            "" if same else f"{AGAIN}, or use the target that it was trained for",
        )
    trained = origin.trained_on
    if trained is None:
        yield Row("chat template", "the draft does not say which one it was trained with", known=False)
        yield Row("dtype", f"{_dtype(target)}; the draft does not say which one it was trained in", known=False)
        return
    same = trained.chat_template == template_digest(target)
    had, has = ("one" if digest else "none" for digest in (trained.chat_template, template_digest(target)))
    yield Row(
        "chat template",
        "as in training" if same else f"another one: {had} in training, {has} now" if had != has else "another one",
        "" if same else f"use the tokenizer of the training, or {AGAIN}",
    )
    now, same, without = _dtype(target), trained.dtype == _dtype(target), ""
    if target.quantized:
        without = ", and without --quantize"
    yield Row(
        "dtype",
        now if same else f"{now}; in training {trained.dtype}",
        f"load the target with --dtype {trained.dtype}{without}" if fell and not same else "",
    )


def _dtype(target: Target) -> str:
    name = str(target.dtype).removeprefix("torch.")
    return f"{name}, {target.quantized} weights" if target.quantized else name
