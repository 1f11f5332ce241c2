"""The examination: every possible cause in turn, and one sentence that says what to expect and what to change first."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ..core.params import SamplingParams
from ..costmodel import Prices, RoundCosts, best_length, chain_speedup
from ..drafting.auto.drafter import AutoDrafter
from ..drafting.auto.state import GREEDY, SAMPLED
from ..drafting.methods import AUTO, AnyDraft, base_for, make_drafter
from ..drafting.options import MethodOptions
from ..drafts.causal_lm import StandaloneDraft
from ..drafts.checkpoint import load_draft
from ..drafts.glide.network import GlideModel
from ..errors import MismatchError
from ..target.target import Target
from .acceptance import DEEPEST, Acceptance, acceptance_of
from .origin import AGAIN, Origin, differences, refusals
from .row import Row

FELL = 0.8  # of the acceptance before: less is a cause
LITTLE = 0.4  # teacher-forced at the first depth: a draft that accepts less has learned little
TOO_LITTLE = 0.2  # of the tested nodes: drafts of which less is accepted hardly ever pay
DEAR, DEAR_START = 0.35, 0.6  # of a plain round: a draft step, and what drafting takes besides, that cost too much
SLOWER = 0.95  # of the best length's speed-up: the usual length is too far from it
MISSING = 0.02  # of the tokens written: more outside a reduced vocabulary are a cause
GUESSED = 0.75  # of EAGLE's acceptance is left where it reads its own guesses
SURE = 40  # tested nodes: fewer say little
USUAL = MethodOptions().length

Measure = Callable[[AutoDrafter], Sequence[Prices]]


@dataclass(frozen=True)
class Diagnosis:
    """What an examination came to.

    Attributes:
        rows: the causes, those that are to be changed first before others.
        training, forced, decoded: acceptance by depth: as the draft's card has it, teacher-forced, and while decoding.
        costs: of a round over a plain one; None: the draft could not be loaded.
        length, speedup: of the fastest chain, and what it is expected to bring over plain decoding; 0: none is faster.
    """

    rows: list[Row]
    sentence: str
    training: list[float] = field(default_factory=list)
    forced: list[float] = field(default_factory=list)
    decoded: list[tuple[float, int]] = field(default_factory=list)
    costs: RoundCosts | None = None
    length: int | None = None
    speedup: float | None = None

    @property
    def findings(self) -> list[Row]:
        return [row for row in self.rows if row.is_finding]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        found = asdict(self)
        found["rows"] = [asdict(row) | {"verdict": row.verdict} for row in self.rows]
        return found


def examine(
    target: Target, folder: Path, prompts: Sequence[Sequence[int]], params: SamplingParams, measure: Measure
) -> Diagnosis:
    """Look for whatever makes the draft in `folder` slow with this target.

    Args:
        prompts: token ids; the target continues each.
        measure: the prices of what auto would run, greedily and sampled, see `costs.prices_of`.

    Raises:
        CheckpointError: the draft's file cannot be read.
        InputError: a prompt that does not fit the context.
    """
    origin = Origin.of(folder)
    refused = list(refusals(origin, target))
    if any(row.is_finding for row in refused):
        return Diagnosis(refused, f"This draft cannot be used with this target: {AGAIN}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say becomes a row
            draft = load_draft(folder, target)
    except MismatchError as error:  # of a draft LM
        return Diagnosis(
            [*refused, Row("tokenizer", str(error), AGAIN)], f"This draft cannot be used with this target: {AGAIN}."
        )
    drafter = make_drafter(f"{base_for(draft.kind)}+{AUTO}", draft)
    assert isinstance(drafter, AutoDrafter)
    longest = max(map(len, prompts))
    costs = measure(drafter)[GREEDY if params.greedy else SAMPLED].at(1, longest)
    found = acceptance_of(target, draft, prompts, params)
    training = origin.acceptance(params.temperature)
    fell = bool(training and found.forced) and found.forced[0] < FELL * training[0]
    rates = [(rate * count + SURE * found.alpha) / (count + SURE) for rate, count in found.decoded]
    length, speedup = best_length(costs, rates)
    rows = [
        *refused,
        *differences(origin, target, fell),
        _vocabulary(draft, found.outputs),
        _context(origin, draft, longest + params.max_new_tokens),
        _while_decoding(origin, found, params.temperature),
        _in_training(training),
        _on_this_text(training, found.forced, fell),
        _cost(costs, target),
        _length(costs, rates, length, speedup),
    ]
    sentence = _sentence(rows, found.alpha, costs, length, speedup)
    rows.sort(key=lambda row: not row.is_finding)  # what is to be changed comes first
    return Diagnosis(rows, sentence, training, found.forced, found.decoded, costs, length, speedup)


def _vocabulary(draft: AnyDraft, outputs: Sequence[Sequence[int]]) -> Row:
    module, cause = getattr(draft, "module", None), "vocabulary of the draft"
    if not isinstance(module, GlideModel) or not module.config.draft_vocab:
        return Row(cause, "the target's")
    kept = set(module.kept.tolist())
    written = [token for tokens in outputs for token in tokens]
    missing = sum(token not in kept for token in written) / max(1, len(written))
    found = f"{len(kept):,} tokens of {module.config.vocab_size:,}; it lacks {missing:.1%} of those that were written"
    change = f"train it with a --draft-vocab above {len(kept)}, or on text like this" if missing > MISSING else ""
    return Row(cause, found, change)


def _context(origin: Origin, draft: AnyDraft, longest: int) -> Row:
    cause, trained = "context", origin.trained_on
    if isinstance(draft, StandaloneDraft) and draft.model.context < longest:
        found = f"up to {longest} tokens; the draft LM's context is {draft.model.context}"
        return Row(cause, found, f"use a draft LM with a context of {longest} tokens, or shorter prompts")
    if trained is None:
        return Row(
            cause, f"up to {longest} tokens; the draft does not say how long its training's windows were", known=False
        )
    found = f"up to {longest} tokens; in training windows of {trained.length}"
    return Row(cause, found, f"train it with --length {longest}" if longest > trained.length else "")


def _while_decoding(origin: Origin, found: Acceptance, temperature: float) -> Row:
    """Less accepted in the loop than teacher-forced on the same text: decoding shows the draft something else."""
    cause, alpha = "acceptance while decoding", origin.alpha(temperature)
    left_out = f"; {found.looping} looping outputs are left out" if found.looping else ""
    stored = "" if alpha is None else f"; after its training {alpha:.2f}"
    tested = sum(count for _, count in found.decoded)
    told = f"{found.alpha:.2f} of {tested} tested nodes{stored}{left_out}"
    if tested < SURE or not found.forced:
        return Row(cause, f"{told}: too few to say more", known=False)
    expected = mean(found.forced[:DEEPEST]) * (GUESSED if origin.kind == "eagle" else 1.0)
    if found.alpha >= FELL * expected:
        too_little = "train it longer, and on text like this: so little hardly ever pays"
        return Row(cause, told, too_little if found.alpha < TOO_LITTLE else "")
    change = (
        "decoding shows the draft something else than training did: train it again, and report it if that is no cure"
    )
    return Row(cause, f"{told}; teacher-forced on the same text {expected:.2f}", change)


def _in_training(training: Sequence[float]) -> Row:
    cause = "acceptance in training"
    if not training:
        return Row(cause, "the draft's card does not hold it", known=False)
    found = f"{training[0]:.2f} at depth 1" + (f", {training[-1]:.2f} at depth {len(training)}" if training[1:] else "")
    return Row(cause, found, "train it longer, or with more layers or width" if training[0] < LITTLE else "")


def _on_this_text(training: Sequence[float], forced: Sequence[float], fell: bool) -> Row:
    cause = "acceptance on this text"
    if not forced:
        return Row(cause, "the text is too short to tell: give more prompts with --prompts", known=False)
    found = f"{forced[0]:.2f} at depth 1, teacher-forced" + (f"; in training {training[0]:.2f}" if training else "")
    change = "train it on text like this: glidecape regenerate makes it from your prompts"
    return Row(cause, found, change if fell or (not training and forced[0] < LITTLE) else "")


def _cost(costs: RoundCosts, target: Target) -> Row:
    found = f"a step {costs.draft:.2f}, to begin {costs.start:.2f}, verifying 6 nodes {costs.verify(6):.2f} of a plain round"
    dear = costs.draft > DEAR or costs.start > DEAR_START
    change = "train a smaller draft, such as with --width 0.5"
    if target.compiled is None:
        # A program computes in neither on a CPU.
        half = target.device.type == "cpu" and target.dtype == torch.float16
        change = f"give {'--dtype float32 ' if half else ''}--compile on; if that is no cure, {change}"
    return Row("cost of drafting", found, change if dear else "")


def _length(costs: RoundCosts, rates: Sequence[float], length: int, speedup: float) -> Row:
    cause = "length of a draft"
    if length == 0:
        return Row(
            cause, "no length is faster than plain decoding", "use --method plain, or lookup where text is copied"
        )
    usual = chain_speedup(costs, rates[:USUAL])
    found = f"{length} is the fastest: {speedup:.2f}x plain decoding; the usual {USUAL}: {usual:.2f}x"
    return Row(cause, found, f"use --draft-length {length}, or +auto" if usual < SLOWER * speedup else "")


def _sentence(rows: Sequence[Row], alpha: float, costs: RoundCosts, length: int, speedup: float) -> str:
    first = next((row for row in rows if row.is_finding), None)
    given = f"{alpha:.2f} of the tested nodes are accepted and a draft step takes {costs.draft:.2f} of a plain round"
    tokens = f"{length} tokens" if length > 1 else "1 token"
    expected = f"Expect {speedup:.2f} times plain decoding from drafts of {tokens}, where {given}"
    if length == 0:
        expected = f"Expect no gain over plain decoding, where {given}"
    if first is None:
        return f"{expected}; there is nothing to change."
    return f"{expected}; change first: {first.cause}: {first.change}."


def cells(one: Diagnosis) -> Iterator[list[str]]:
    """Acceptance by depth as text: depth, in training, teacher-forced, decoded with the nodes tested."""
    for n in range(min(DEEPEST, max(len(one.training), len(one.forced), len(one.decoded)))):
        decoded = f"{one.decoded[n][0]:.2f} ({one.decoded[n][1]})" if n < len(one.decoded) else ""
        known = (f"{own[n]:.2f}" if n < len(own) else "" for own in (one.training, one.forced))
        yield [str(n + 1), *known, decoded]
